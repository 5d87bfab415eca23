"""A method of the registry on a model: its trainable parameters and what a Trainer needs for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from experiments.methods import METHODS
from peft_sparsegrad import GradDropCallback, GradDropConfig, SparseGradCallback, SparseGradModel
from peft_sparsegrad.graddrop import VARIANTS

from ._common import InputError


def attach_method(
    name: str, model: Any, target_modules: list[str] | None, density: float, seed: int, **overrides: Any
) -> Any:
    """The model with the method's trainable parameters.

    Args:
        overrides: Further settings of the method's configuration. Full fine-tuning has none and takes
            `modules_to_save` alone.

    Raises:
        InputError: The method cannot be put onto these modules, or does not take these settings.
    """
    method = METHODS[name]
    if method.takes_seed:
        overrides["seed"] = seed
    if name == "full":
        overrides.pop("task_type", None)
    try:
        return method.attach(model, target_modules, density, **overrides)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def make_callbacks(name: str, model: nn.Module, warmup_steps: int, head_steps: int = 0) -> list[TrainerCallback]:
    """The callbacks that the method needs in a Trainer; SparseGrad's and MeProp's is a `SparseGradCallback`."""
    if isinstance(getattr(model, "base_model", None), SparseGradModel):
        return [SparseGradCallback(warmup_steps, head_steps)]
    return _own_callbacks(name)


def masks_gradients(name: str) -> bool:
    """Whether the method is one of GradDrop's."""
    return any(isinstance(callback, GradDropCallback) for callback in _own_callbacks(name))


def _own_callbacks(name: str) -> list[TrainerCallback]:
    make = METHODS[name].make_callbacks
    return make() if make else []


def check_epochs(variant: str, epochs: int) -> None:
    """Raise an `InputError` if the GradDrop variant, a method or a paper's name, needs a longer run than that."""
    settings = {name.lower(): name for name in VARIANTS}
    if variant.lower() not in settings:
        return
    try:
        GradDropConfig.from_variant(settings[variant.lower()]).check_num_epochs(epochs)
    except ValueError as error:
        raise InputError(str(error)) from error


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
