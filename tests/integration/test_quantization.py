"""bitsandbytes 4-bit and 8-bit bases, which run on the CPU too."""

import pytest
import torch
from mixtures import EXPERTS, mixtral
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import adapted, batch, llama, logits, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_sparsegrad import GradDropConfig, SparseGradConfig, SparseGradLinear, warmup

pytest.importorskip("bitsandbytes")
BATCHES = [batch(seed) for seed in range(4)]
QUANTIZATION = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def quantized(path, bits):
    config = BitsAndBytesConfig(**QUANTIZATION[bits])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize("bits", QUANTIZATION)
@pytest.mark.parametrize("warm_up", ["explicit", "observed"])
def test_warms_up_trains_saves_and_reloads(base_path, tmp_path, bits, warm_up):
    model = adapted(prepare_model_for_kbit_training(quantized(base_path, bits)), warmup_steps=4)
    model.gradient_checkpointing_disable()
    if warm_up == "explicit":
        report = warmup(model, BATCHES, progress=False)
        assert all(group.energy_in_support > 0.1 for group in report.groups)
    losses = train(model, steps=25)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(base_path, bits), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("bits", QUANTIZATION)
def test_defaults_train_through_a_renewal(base_path, tmp_path, bits):
    """Four steps of warm-up, and the support is renewed at the 25th after them."""
    model = adapted(prepare_model_for_kbit_training(quantized(base_path, bits)), density=0.01, warmup_steps=4)
    layers = [module for module in model.modules() if isinstance(module, SparseGradLinear)]
    losses = train(model, steps=27)
    before = [layer.adapter("default").indices for layer in layers]
    assert {layer.adapter("default").num_steps for layer in layers} == {23}
    losses += train(model, steps=10)
    assert not any(
        torch.equal(layer.adapter("default").indices, old) for layer, old in zip(layers, before, strict=True)
    )
    assert {layer.adapter("default").gradient_sum.dtype for layer in layers} == {torch.float32}
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(base_path, bits), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("bits", QUANTIZATION)
def test_warm_up_finds_about_the_basis_of_the_plain_model(base_path, bits):
    models = [quantized(base_path, bits), AutoModelForCausalLM.from_pretrained(base_path)]
    found = []
    for base in models:
        model = adapted(base, warmup_steps=4, rank=24, num_values=200)
        warmup(model, BATCHES, progress=False)
        layer = next(module for module in model.modules() if isinstance(module, SparseGradLinear))
        found.append(layer.adapter("default").basis.U[:, :8])
    cosines = torch.linalg.svdvals(found[0].T.float() @ found[1])
    assert cosines.min() > 0.7


@pytest.mark.parametrize("bits", QUANTIZATION)
def test_saving_after_an_evaluation_leaves_the_base_as_it_was(base_path, tmp_path, bits):
    """bitsandbytes repacks a 4-bit weight for inference on the CPU and undoes it incompletely when it is saved."""
    model = adapted(quantized(base_path, bits))
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


@pytest.mark.parametrize("bits", QUANTIZATION)
def test_merge_into_a_quantized_base(base_path, bits):
    """Up to what quantising the merged weight costs, and also after an inference pass has repacked the weight."""
    model = adapted(quantized(base_path, bits), density=0.2)
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, SparseGradLinear)):
            layer.adapter("default").values.normal_(std=0.1)
    expected = logits(model)
    with model.disable_adapter():
        without = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - expected).norm() < 0.5 * (without - expected).norm()


@pytest.mark.parametrize("bits", QUANTIZATION)
def test_values_cast_to_bf16_are_float32_again_when_training_begins(base_path, bits):
    """TRL casts every trainable parameter of a quantised model to bf16, which would swallow small updates."""
    model = adapted(quantized(base_path, bits))
    values = [p for n, p in model.named_parameters() if "sparsegrad_adapter" in n]
    optimizer = torch.optim.AdamW(values, lr=1e-5)
    for parameter in values:
        parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    assert all(parameter.dtype == torch.float32 for parameter in values)
    train(model, steps=2, optimizer=optimizer)
    assert all(parameter.dtype == torch.float32 and parameter.any() for parameter in values)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS),
        SparseGradConfig(density=0.05, warmup_steps=2, target_modules=["q_proj"], target_parameters=EXPERTS),
        GradDropConfig(target_modules=["q_proj"], target_parameters=EXPERTS),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_experts_beside_4_bit_layers_train_and_are_loaded(tmp_path, config):
    """bitsandbytes leaves fused experts as they are, and has the linear layers in 4 bits."""
    mixtral(hidden_size=64, num_attention_heads=4, head_dim=16).save_pretrained(tmp_path / "base")
    model = get_peft_model(quantized(tmp_path / "base", "4bit"), config)
    losses = train(model, steps=12)
    assert losses[-1] < losses[2]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantized(tmp_path / "base", "4bit"), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
