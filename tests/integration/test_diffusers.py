"""diffusers: several adapters with weights on one model, and a converted adapter loaded as LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_sparsegrad import GradDropConfig, SparseGradConfig, convert_to_lora

pytest.importorskip("diffusers", reason="diffusers is not installed")

TARGETS = ["ff.net.0.proj", "ff.net.2"]
CONFIGS = {
    "LoRA": lambda: LoraConfig(target_modules=TARGETS, init_lora_weights=False),
    "SparseGrad": lambda: SparseGradConfig(target_modules=TARGETS, warmup_steps=0, init_weights=False),
    "GradDrop": lambda: GradDropConfig(target_modules=TARGETS, init_weights=False),
}


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


@torch.no_grad()
def noise(model):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    return model(x, torch.tensor(3), text).sample


def add_to_weights(model, adapted, name, weight):
    """Add an adapter's change times a weight to the weights of the same model without adapters."""
    modules = dict(model.named_modules())
    for layer_name, layer in adapted.named_modules():
        if hasattr(layer, "get_delta_weight"):
            modules[layer_name].weight.data += weight * layer.get_delta_weight(name)
            bias = layer.get_delta_bias(name) if hasattr(layer, "get_delta_bias") else None
            modules[layer_name].bias.data += 0 if bias is None else weight * bias


@pytest.mark.parametrize("method", CONFIGS)
def test_set_adapters_weighs_the_adapters(method):
    model, expected = unet(), unet()
    for name in ("one", "two"):
        model.add_adapter(CONFIGS[method](), name)
    for name, weight in {"one": 0.5, "two": -0.25}.items():
        add_to_weights(expected, model, name, weight)  # before diffusers sets the weights
    model.set_adapters(["one", "two"], [0.5, -0.25])
    assert torch.allclose(noise(model), noise(expected), atol=1e-5)
    model.set_adapters("one", 0.0)
    assert torch.allclose(noise(model), noise(unet()), atol=1e-6)


def test_a_converted_adapter_is_loaded_as_lora(tmp_path):
    model = get_peft_model(unet(), CONFIGS["SparseGrad"]()).eval()
    convert_to_lora(model).save(tmp_path)
    loaded = unet()
    assert not torch.allclose(noise(loaded), noise(model), atol=1e-3)
    loaded.load_lora_adapter(
        str(tmp_path), prefix="base_model.model", adapter_name="converted", weight_name="adapter_model.safetensors"
    )
    assert torch.allclose(noise(loaded), noise(model), atol=1e-5)
