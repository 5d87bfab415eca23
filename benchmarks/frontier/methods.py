"""The table of methods: what each attaches to which layers, and the learning rates at which its search begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import C3AConfig, HiraConfig, LoraConfig, MissConfig, ShiraConfig, get_peft_model
from torch import nn

from benchmarks.compare.head import head_modules, in_head
from experiments.methods import METHODS as TRAINED_METHODS
from experiments.methods import targeted
from peft_sparsegrad import GradDropConfig, SparseGradConfig, create_sparsegrad_optimizer
from peft_sparsegrad.common.targets.modules import exact_targets

Place = Literal["mlp", "all-linear"]
FACTOR = 2.5  # between two learning rates of a grid
SMALL = 5e-5  # middle of the first three rates where the weights themselves train
LARGE = 1e-3  # where few values do
PUBLISHED = "SparseGrad as published"
SEED = "seed"  # a setting with this value gets the run's seed


@dataclass(frozen=True)
class Method:
    """A way of training the linear layers of a place.

    Attributes:
        name: Key in the table, and the method's label.
        family: Methods of one family are joined by a line in the figures, by their trained values.
        config: Class of the PEFT configuration; None trains the weights themselves, or the task head alone.
        settings: The configuration's fields.
        place: `"mlp"`, the layers that SparseGrad adapts by default, or `"all-linear"`, all of every block.
        middle: Middle of the first three learning rates, in steps of `FACTOR`; None where there is none to search.
        warmup: For SparseGrad: True runs the explicit warm-up, with the configuration's number of passes; False calls
            nothing, so that the first training steps are observed.
    """

    name: str
    family: str
    config: Callable[..., Any] | None
    settings: dict[str, Any] = field(default_factory=dict)
    place: Place = "mlp"
    middle: float | None = LARGE
    warmup: bool = True

    @property
    def rates(self) -> list[float]:
        """The learning rates at which the search begins, ascending; 0 alone for a method that has none."""
        if self.middle is None:
            return [0.0]
        return [rounded(self.middle / FACTOR), self.middle, rounded(self.middle * FACTOR)]

    @property
    def needs_warmup(self) -> bool:
        """Return whether an explicit warm-up is to be run."""
        if self.config is not SparseGradConfig or not self.warmup:
            return False
        config = SparseGradConfig(**self.settings)
        return config.warmup_steps > 0 and not (config.basis in ("svd", "identity") and config.support == "dynamic")

    def attach(self, model: Any, seed: int) -> Any:
        """Return the model with what the method trains, in float32, and its task head if it has one."""
        head = head_modules(model)
        names = target_names(model, self.place)
        if self.config is None:
            attached = TRAINED_METHODS["full"].attach(model, names, 0, modules_to_save=head)
            if self.family == "frozen":
                attached = _freeze_all_but_head(model)
        else:
            settings = {name: seed if value == SEED else value for name, value in self.settings.items()}
            config = self.config(target_modules=exact_targets(model, names), modules_to_save=head or None, **settings)
            attached = get_peft_model(model, config)
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return attached

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Return AdamW over what trains, or the optimizer that a dynamic support needs."""
        if self.settings.get("support") == "dynamic":
            return create_sparsegrad_optimizer(model, lr)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=trained[0].is_cuda)


def rounded(rate: float) -> float:
    """Return a learning rate with two digits, so that it is the same however it was reached."""
    return float(f"{rate:.1e}")


def target_names(model: nn.Module, place: Place) -> list[str]:
    """Return the full names of the linear layers of a place, without the head's and the output layer."""
    if place == "mlp":
        return [name for name, _ in targeted(model, None)]
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if not in_head(name) and name != "lm_head"]


def _freeze_all_but_head(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name))
    return model


def _named(family: str, label: str, config: Any, place: Place = "mlp", **settings: Any) -> Method:
    """Return a method named by its family, what is special about it, and its place."""
    ending = "" if place == "mlp" else f", {place}"
    return Method(f"{family} {label}{ending}", family + ending, config, settings, place)


def _lora(rank: int, place: Place = "mlp", **settings: Any) -> Method:
    family = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    return _named(family, f"r={rank}", LoraConfig, place, r=rank, lora_alpha=2 * rank, **settings)


def _sparsegrad(family: str, label: str, place: Place = "mlp", **settings: Any) -> Method:
    """Return SparseGrad with settings, and with a warm-up of 8, the default when most runs were made, if not told."""
    return _named(family, label, SparseGradConfig, place, **{"warmup_steps": 8, **settings})


def _density(density: float, place: Place = "mlp") -> Method:
    return _sparsegrad("SparseGrad", f"{100 * density:g}%", place, density=density)


def _narrow_sides(label: str, **settings: Any) -> Method:
    """An earlier default: the basis on the narrower side of each weight, with a core of 12 entries a value."""
    return _sparsegrad("SparseGrad narrow sides", label, rank="narrower", slack=12.0, **settings)


def _columns(label: str, place: Place = "mlp", **settings: Any) -> Method:
    return _sparsegrad("SparseGrad columns", label, place, basis="columns", **settings)


# The most valuable come first: runs are started in this order.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("frozen", "frozen", None, middle=None),
        _lora(8),
        _sparsegrad("SparseGrad", "1%, warm-up of 6", warmup_steps=6),  # the default
        _density(0.01),
        _columns("1%"),
        _sparsegrad("SparseGrad", "1%, slack 12", slack=12.0),
        _columns("1%, slack 12", slack=12.0),
        _narrow_sides("1%"),
        _lora(2),
        _lora(32),
        Method("full", "full", None, middle=SMALL),
        _lora(16),
        _lora(4),
        _lora(64),
        _density(0.0025),
        _density(0.005),
        _density(0.02),
        _density(0.05),
        _columns("0.25%", density=0.0025),
        _columns("5%", density=0.05),
        _columns("1%, slack 1", slack=1.0),
        _narrow_sides("0.25%", density=0.0025),
        _lora(8, "all-linear"),
        _columns("1%", "all-linear"),
        _columns("1%, slack 12", "all-linear", slack=12.0),
        _density(0.01, "all-linear"),
        _lora(2, "all-linear"),
        _lora(32, "all-linear"),
        Method("full, all-linear", "full, all-linear", None, place="all-linear", middle=SMALL),
        _lora(16, use_dora=True),
        _lora(16, use_rslora=True),
        _named("MiSS", "r=32", MissConfig, r=32),
        _named("SHiRA", "r=16", ShiraConfig, r=16, random_seed=SEED),
        replace(_named("HiRA", "r=16", HiraConfig, r=16), middle=2.5e-3),
        replace(_named("C3A", "block 64", C3AConfig, block_size=64), middle=6.3e-3),
        Method("SparseGrad, nothing called", "SparseGrad", SparseGradConfig, warmup=False),
        _narrow_sides("1%, warm-up of 4", warmup_steps=4),
        Method(PUBLISHED, PUBLISHED, SparseGradConfig, {**SparseGradConfig.variants["paper"], "warmup_steps": 8}),
        Method("MeProp", "MeProp", SparseGradConfig, SparseGradConfig.variants["meprop"]),
        Method("GradDrop", "GradDrop", GradDropConfig, {"seed": SEED}, middle=SMALL),
        _lora(4, "all-linear"),
        _lora(16, "all-linear"),
        _lora(64, "all-linear"),
        _density(0.0025, "all-linear"),
    )
}
