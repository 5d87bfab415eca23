"""GradDrop on bitsandbytes 4-bit and 8-bit bases, which run on the CPU too."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import llama, logits, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_sparsegrad import GradDrop, GradDropConfig, GradDropLayer, GradDropLinear

pytest.importorskip("bitsandbytes")
QUANTIZATION = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
BITS = pytest.mark.parametrize("bits", QUANTIZATION)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def quantized(path, bits):
    config = BitsAndBytesConfig(**QUANTIZATION[bits])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def graddrop(base, variant="GradDrop", **overrides):
    return get_peft_model(base, GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", **overrides))


def deltas(model):
    return {
        masked.name: masked.parameter
        for layer in model.modules()
        if isinstance(layer, GradDropLayer)
        for masked in layer.masked_parameters()
    }


def kept_in_step(model, step, epoch=None):
    graddrop = GradDrop(model)
    graddrop.set_step(step)
    if epoch is not None:
        graddrop.set_epoch(epoch)
    return {
        masked.name: masked.sampler.mask(masked.name, masked.block).keep(masked.parameter.shape, torch.device("cpu"))
        for layer in model.modules()
        if isinstance(layer, GradDropLayer)
        for masked in layer.masked_parameters()
    }


@pytest.mark.parametrize(
    ("variant", "bits"),
    [
        ("GradDrop", "4bit"),
        ("Layer-GradDrop", "8bit"),
        ("GradDrop-Epoch", "4bit"),
        pytest.param("GradDrop", "8bit", marks=pytest.mark.slow),
        pytest.param("Layer-GradDrop", "4bit", marks=pytest.mark.slow),
        pytest.param("GradDrop-Epoch", "8bit", marks=pytest.mark.slow),
    ],
)
def test_trains_saves_and_reloads(base_path, tmp_path, bits, variant):
    model = graddrop(prepare_model_for_kbit_training(quantized(base_path, bits)), variant)
    model.gradient_checkpointing_disable()
    if variant == "GradDrop-Epoch":
        GradDrop(model, num_epochs=2).set_epoch(1)
    losses = train(model, steps=25, lr=0.01)
    assert losses[-1] < losses[0] - 0.1
    assert all(delta.dtype == torch.float32 for delta in deltas(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(base_path, bits), tmp_path)
    assert all(torch.equal(delta, deltas(loaded)[name]) for name, delta in deltas(model).items())
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@BITS
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("GradDrop", {"p": 0.5, "frozen": "hold"}),
        ("Layer-GradDrop", {"p": 0.5}),
        ("GradDrop-Epoch", {"num_epochs": 3}),
    ],
)
def test_what_is_masked_is_held(base_path, bits, variant, settings):
    model = graddrop(quantized(base_path, bits), variant, **settings)
    for step in range(3):
        kept = kept_in_step(model, step, epoch=0)
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        train(model, steps=1, lr=0.01)
        moved = {name: delta != before[name] for name, delta in deltas(model).items()}
        assert not any((moved[name] & ~keep).any() for name, keep in kept.items())
        wanted = sum(int(keep.sum()) for keep in kept.values())
        assert sum(int(entries.sum()) for entries in moved.values()) >= 0.95 * wanted


@BITS
def test_trains_as_the_adapter_on_the_dequantized_base(base_path, bits):
    model, plain = graddrop(quantized(base_path, bits)), graddrop(llama(hidden_size=64, intermediate_size=128))
    modules = dict(plain.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, GradDropLinear):
            modules[name].get_base_layer().weight.data = layer.get_base_weight().float().clone()
    precision = {"4bit": 1e-4, "8bit": 0.05}[bits]  # 8-bit also quantises what goes into the layer
    assert train(model, steps=5, lr=1e-3) == pytest.approx(train(plain, steps=5, lr=1e-3), abs=precision)


@BITS
def test_saving_after_an_evaluation_leaves_the_base_as_it_was(base_path, tmp_path, bits):
    """bitsandbytes repacks a 4-bit weight for inference on the CPU and undoes it incompletely when it is saved."""
    model = graddrop(quantized(base_path, bits))
    layer = model.get_base_model().model.layers[0].mlp.down_proj  # two blocks of scales in a row, so that order shows
    if bits == "4bit":
        layer.base_layer.weight.quant_state.absmax *= torch.linspace(0.1, 3, 128)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    expected = layer.train()(x)
    logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(layer.train()(x), expected, rtol=0.02, atol=0.01)
    logits(model)
    assert torch.allclose(x @ layer.get_base_weight().float().T, expected, rtol=0.05, atol=0.02)


@BITS
def test_merge_into_a_quantized_base(base_path, bits):
    """Up to what quantising the merged weight costs, and also after an inference pass has repacked the weight."""
    model = graddrop(quantized(base_path, bits))
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.normal_(std=0.03)
    expected = logits(model)
    with model.disable_adapter():
        without = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - expected).norm() < 0.5 * (without - expected).norm()


@BITS
def test_unmerge_gives_the_base_back(base_path, bits):
    model = graddrop(quantized(base_path, bits))
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.normal_(std=0.03)
    expected = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        without = logits(model)
    assert (logits(model) - expected).norm() < 0.5 * (without - expected).norm()


@BITS
def test_linear_deltas_cast_to_bf16_are_float32_again_when_training_begins(base_path, bits):
    model = graddrop(quantized(base_path, bits))
    linear = {name: delta for name, delta in deltas(model).items() if "proj" in name}
    optimizer = torch.optim.AdamW(linear.values(), lr=1e-5)
    for delta in linear.values():
        delta.data = delta.data.to(torch.bfloat16)
    model.train()
    train(model, steps=2, optimizer=optimizer)
    assert all(delta.dtype == torch.float32 and delta.any() for delta in linear.values())
