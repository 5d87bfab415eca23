"""The features, each an attempt with one method that says how it failed, if it did."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch._dynamo as dynamo
from peft import PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale as rescale_lora_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
)

from peft_sparsegrad import GradDropConfig, SparseGradConfig, convert_to_lora, rescale_adapter_scale

MakeConfig: TypeAlias = Callable[..., PeftConfig]
VOCABULARY, LENGTH, ROWS = 64, 12, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class WrongError(Exception):
    """The feature ran, and its result is not what it should be."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def adapted(make_config: MakeConfig, names: tuple[str, ...] = ("default",)) -> PeftModel:
    """A LLaMA with adapters of random values."""
    model = get_peft_model(llama(), make_config(), names[0])
    for seed, name in enumerate(names[1:], start=1):
        torch.manual_seed(seed)
        model.add_adapter(name, make_config())
    return model.eval()


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=tokens(), **kwargs).logits


def expect_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.allclose(found, expected, atol=1e-4, rtol=0):
        raise WrongError("wrong outputs, no word")


def alone(model: PeftModel, name: str) -> torch.Tensor:
    """The logits with one adapter, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model)
    model.set_adapter(name)
    return logits(model)


def adapted_layers(model: torch.nn.Module) -> list[Any]:
    """The layers with an adapter, which have what the method gives them."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def train_merge_save_load(make_config: MakeConfig) -> None:
    model = adapted(make_config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    if all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True)):
        raise WrongError("nothing trained")
    expected = logits(model.eval())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        expect_equal(logits(PeftModel.from_pretrained(llama(), folder)), expected)
    expect_equal(logits(model.merge_and_unload()), expected)


def experts(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()
    plain = logits(base)
    model = get_peft_model(base, make_config(target_modules=[], target_parameters=EXPERTS)).eval()
    expected = logits(model)
    if torch.equal(expected, plain):
        raise WrongError("nothing is adapted")
    expect_equal(logits(model.merge_and_unload()), expected)


def mixed_batch(make_config: MakeConfig) -> None:
    model = adapted(make_config, ("first", "second"))
    names = ["second", "__base__", "first", "second"]
    rows = logits(model, adapter_names=names)
    expect_equal(rows, torch.stack([alone(model, name)[row] for row, name in enumerate(names)]))


def unknown_name_in_a_mixed_batch(make_config: MakeConfig) -> None:
    model = adapted(make_config)
    try:
        logits(model, adapter_names=["nonsense"] * ROWS)
    except ValueError:
        return
    raise WrongError("accepted, no word")


def scaling(make_config: MakeConfig) -> None:
    """Half the scale is half the change of the weight, and 1 gives the adapter back."""
    model, other = adapted(make_config), adapted(make_config)
    expected = logits(model)
    layers = adapted_layers(model)
    deltas = [layer.get_delta_weight("default") for layer in layers]
    for layer in layers:
        layer.scale_layer(0.5)
    for layer, delta in zip(layers, deltas, strict=True):
        expect_equal(layer.get_delta_weight("default"), delta / 2)
    scaled = logits(model)
    expect_equal(logits(model.merge_and_unload()), scaled)
    for layer in adapted_layers(other):
        layer.scale_layer(0.5)
        layer.unscale_layer(0.5)
    expect_equal(logits(other), expected)


def rescaling_context(make_config: MakeConfig) -> None:
    model = adapted(make_config)
    before, base = logits(model), alone(model, "__base__")
    ours = isinstance(make_config(), (SparseGradConfig, GradDropConfig))
    rescale = rescale_adapter_scale if ours else rescale_lora_scale  # PEFT's own knows nothing but LoRA
    with rescale(model, 0.0):
        expect_equal(logits(model), base)
    expect_equal(logits(model), before)


def weighted_merge(combination_type: str, **settings: Any) -> Callable[[MakeConfig], None]:
    """Two adapters made one; of "linear" and "cat" the weights are the sum's."""

    def attempt(make_config: MakeConfig) -> None:
        model: Any = adapted(make_config, ("first", "second"))
        model.add_weighted_adapter(
            ["first", "second"], [0.75, -0.5], "both", combination_type=combination_type, **settings
        )
        for layer in adapted_layers(model):
            both, first, second = (layer.get_delta_weight(name) for name in ("both", "first", "second"))
            # LoRA's "linear" adds up factors, whose product is another matrix.
            if combination_type == "cat" or (combination_type == "linear" and not isinstance(layer, LoraLayer)):
                expect_equal(both, 0.75 * first - 0.5 * second)
        model.set_adapter("both")
        logits(model)

    return attempt


def hot_swap(make_config: MakeConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = adapted(make_config)
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(-1.5)
        other.save_pretrained(folder)
        model = adapted(make_config)
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
        expect_equal(logits(model), logits(other))


def export_to_lora(make_config: MakeConfig) -> None:
    """The exported adapter, scaled as llama.cpp does: by `lora_alpha` and each tensor's own rank."""
    model = adapted(make_config)
    if not isinstance(make_config(), (SparseGradConfig, GradDropConfig)):
        raise WrongError("–")
    conversion = convert_to_lora(model, rank=32)  # the weights' own, so that nothing is lost
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            a, b = (conversion.state_dict[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
            delta: torch.Tensor = layer.get_delta_weight("default")  # pyright: ignore
            expect_equal(conversion.config.lora_alpha / a.shape[0] * b @ a, delta)


def compiled(make_config: MakeConfig) -> None:
    """One graph for a training step, and the same one in the next."""
    dynamo.reset()
    model = adapted(make_config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = torch.compile(model, backend="aot_eager")
    dynamo.utils.counters.clear()
    for _ in range(3):
        step(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    breaks = sum(dynamo.utils.counters["graph_break"].values())
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    if breaks or graphs > 1:
        raise WrongError(f"{graphs} graphs, {breaks} breaks")


class Logits(torch.nn.Module):
    """A causal language model as a function of its tokens alone."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def exported(make_config: MakeConfig) -> None:
    """A program for batches of other sizes than the one that it was made with."""
    model = Logits(adapted(make_config))
    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("tokens", max=64)}
    program = torch.export.export(model, (tokens(),), dynamic_shapes=(sizes,)).module()
    expect_equal(program(tokens()[1:, 2:]), model(tokens()[1:, 2:]))


def siglip_classification(make_config: MakeConfig) -> None:
    """Default targets pass gradients and merge, though the vision tower's pooling head is no part of the loss."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(vision_config={**tower, "image_size": 16, "patch_size": 4}, text_config=tower)
    base = SiglipForImageClassification(config).eval()
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = get_peft_model(base, make_config(target_modules=None, task_type=None))
    model(**images).logits.sin().mean().backward()
    with torch.no_grad():
        expected = model(**images).logits
        expect_equal(model.merge_and_unload()(**images).logits, expected)


class ReadsAWeight(torch.nn.Module):
    """Two linear layers, one of which is never called: its weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.called(x), self.read.weight)


def layer_that_is_not_called(make_config: MakeConfig) -> None:
    """A layer that would be idle is named in a warning by the first step."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(ReadsAWeight(), make_config(target_modules=["called", "read"], task_type=None))
        model(torch.randn(4, 8)).sin().mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    if not any("'read'" in str(warning.message) for warning in said):
        raise WrongError("idle, no word")


FEATURES: dict[str, Callable[[MakeConfig], None]] = {
    "train, merge, save, load": train_merge_save_load,
    "fused experts, `target_parameters`": experts,
    "`adapter_names` in one batch": mixed_batch,
    "an unknown name among them is refused": unknown_name_in_a_mixed_batch,
    "`scale_layer`, `unscale_layer`, merged": scaling,
    "a context that rescales": rescaling_context,
    "`add_weighted_adapter`, linear": weighted_merge("linear"),
    "… cat": weighted_merge("cat"),
    "… ties": weighted_merge("ties", density=0.5),
    "… dare_linear": weighted_merge("dare_linear", density=0.5),
    "… magnitude_prune": weighted_merge("magnitude_prune", density=0.5),
    "`hotswap_adapter`": hot_swap,
    "LoRA export by llama.cpp's rule": export_to_lora,
    "`torch.compile`: one graph for all steps": compiled,
    "`torch.export`, for batches of any size": exported,
    "SigLIP classification, default targets": siglip_classification,
    "a layer whose weight is read without a call is named": layer_that_is_not_called,
}
