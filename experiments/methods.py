"""One table of methods for the examples, the benchmarks and the generic tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_sparsegrad import (
    GradDropCallback,
    GradDropConfig,
    SparseGradCallback,
    SparseGradConfig,
    SparseGradModel,
    create_sparsegrad_optimizer,
)
from peft_sparsegrad.common.targets.modules import exact_targets, in_out_features, targeted_modules
from peft_sparsegrad.graddrop import VARIANTS
from peft_sparsegrad.sparsegrad.targets import set_default_targets


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning a model.

    Attributes:
        name: Key in the table.
        description: One line.
        attach: Called with (model, target_modules, density, **overrides); returns the model to train. Without
            `target_modules` the MLP layers train, with GradDrop everything in the transformer blocks. GradDrop and
            full fine-tuning have no use for the density.
        make_optimizer: Called with (model, lr); None means AdamW over what requires a gradient.
        make_callbacks: Makes the callbacks that a Trainer needs for the method; None means none.
        takes_seed: Whether `attach` takes a `seed`, for masks that are drawn at random.
    """

    name: str
    description: str
    attach: Callable[..., nn.Module]
    make_optimizer: Callable[[nn.Module, float], Any] | None = None
    make_callbacks: Callable[[], list[TrainerCallback]] | None = None
    takes_seed: bool = False


def _sparsegrad(variant: str) -> Callable[..., nn.Module]:
    def attach(model: nn.Module, target_modules: Any, density: float, **overrides: Any) -> PeftModel:
        config = SparseGradConfig.from_variant(variant, target_modules=target_modules, density=density, **overrides)
        return get_peft_model(model, config)  # pyright: ignore

    return attach


def _lora(
    model: nn.Module, target_modules: Any, density: float, rank: int | None = None, **overrides: Any
) -> PeftModel:
    """LoRA of a `rank`, or in every layer that whose r (in + out) values are closest to `density` of the weight."""
    ranks = {name: rank or lora_rank(*in_out_features(m), density) for name, m in targeted(model, target_modules)}
    config = LoraConfig(**{**_lora_settings(model, ranks), **overrides})
    return get_peft_model(model, config)  # pyright: ignore


def _lora_settings(model: nn.Module, ranks: dict[str, int]) -> dict[str, Any]:
    """Return `LoraConfig` fields that give each module in `ranks` its rank and a scale of 1, and target no other."""
    r = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    targets = exact_targets(model, list(ranks))
    return {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
    }


def _shira(
    model: nn.Module, target_modules: Any, density: float, seed: int | None = None, **overrides: Any
) -> PeftModel:
    """SHiRA with the rank whose r (in + out) values, over all layers, are closest to `density` of the weights.

    PEFT gives all layers one rank, and layers of one shape the same mask.
    """
    sizes = {name: in_out_features(m) for name, m in targeted(model, target_modules)}
    r = max(1, round(density * sum(m * n for m, n in sizes.values()) / sum(m + n for m, n in sizes.values())))
    targets = exact_targets(model, list(sizes))
    config = ShiraConfig(**{"r": r, "random_seed": seed, "target_modules": targets, **overrides})
    return get_peft_model(model, config)  # pyright: ignore


def _supertuning(model: nn.Module, target_modules: Any, density: float, **overrides: Any) -> PeftModel:
    targets = exact_targets(model, [name for name, _ in targeted(model, target_modules)])
    config = SupertuningConfig(**{"sparsity": 1 - density, "target_modules": targets, **overrides})
    return get_peft_model(model, config)  # pyright: ignore


def _full(
    model: nn.Module, target_modules: Any, density: float, modules_to_save: Iterable[str] | None = None
) -> nn.Module:
    """The target weights themselves train, and `modules_to_save` with them; the rest is frozen."""
    model.requires_grad_(False)
    for _, module in targeted(model, target_modules):
        module.requires_grad_(True)
    for name in modules_to_save or ():
        model.get_submodule(name).requires_grad_(True)
    return model


def _graddrop(**settings: Any) -> Callable[..., nn.Module]:
    def attach(model: nn.Module, target_modules: Any, density: float, **overrides: Any) -> PeftModel:
        config = GradDropConfig(target_modules=target_modules, **{**settings, **overrides})
        return get_peft_model(model, config)  # pyright: ignore

    return attach


def lora_rank(in_features: int, out_features: int, density: float) -> int:
    """Rank at which LoRA has about as many values as `density` of the weight, at least 1."""
    return max(1, round(density * in_features * out_features / (in_features + out_features)))


def targeted(model: nn.Module, target_modules: Any) -> list[tuple[str, nn.Module]]:
    """The modules that SparseGrad would adapt, in the model's order."""
    config = SparseGradConfig(target_modules=target_modules)
    if target_modules is None:
        set_default_targets(config, model, getattr(getattr(model, "config", None), "model_type", None))
    found = list(targeted_modules(model, config, SparseGradModel._check_target_module_exists))
    if not found:
        raise ValueError(f"no module of the model matches target_modules={target_modules!r}")
    return found


def _observed() -> list[TrainerCallback]:
    return [SparseGradCallback(log_energy=False)]


def _announced() -> list[TrainerCallback]:
    return [GradDropCallback()]


def _optimizer_of(settings: Mapping[str, Any]) -> Callable[[nn.Module, float], Any] | None:
    return create_sparsegrad_optimizer if settings.get("support") == "dynamic" else None


_SPARSEGRAD_WORDS = {
    "sparsegrad": "SparseGrad, the default: a basis on the input side, a support that is renewed",
    "columns": "SparseGrad on columns of each weight in place of a basis, with a support that is renewed",
    "full-bases": "SparseGrad with two full bases and a support that is renewed",
    "sparsegrad-dynamic": "SparseGrad, a basis on the input side, the largest gradients of each step",
    "paper": "SparseGrad as published: two full bases, the whole core, the largest gradients of each step",
    "meprop": "MeProp with a support chosen once, in the weight's own basis",
    "meprop-paper": "MeProp as in the SparseGrad paper: the largest gradients of each step, in the weight's own basis",
}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(
            Method(name, _SPARSEGRAD_WORDS[name], _sparsegrad(name), _optimizer_of(settings), _observed)
            for name, settings in SparseGradConfig.variants.items()
        ),
        Method("lora", "LoRA with as many trained values", _lora),
        Method("shira", "SHiRA: entries of the weights drawn at random, as many as LoRA's", _shira, takes_seed=True),
        Method("supertuning", "Super-Tuning: the largest entries of the weights", _supertuning),
        Method("full", "the target weights themselves", _full),
        *(
            Method(name.lower(), f"GradDrop: {name}", _graddrop(**settings), None, _announced, takes_seed=True)
            for name, settings in {"GradDrop-Off": {"p": 0.0}, **VARIANTS}.items()
        ),
    )
}
