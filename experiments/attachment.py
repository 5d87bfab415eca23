"""A method on a model: its trainable parameters, and what a Trainer needs for it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropConfig, SparseGradCallback, SparseGradModel
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.common.targets.modules import in_out_features
from peft_sparsegrad.graddrop import VARIANTS
from peft_sparsegrad.sparsegrad.plan import check_is_linear

from .methods import METHODS, lora_rank, targeted


def attach_method(
    name: str, model: Any, target_modules: list[str] | None, density: float, seed: int, **overrides: Any
) -> Any:
    """Return the model with the method's trainable parameters.

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
    """Return the callbacks that the method needs; SparseGrad's and MeProp's is a `SparseGradCallback`."""
    if isinstance(getattr(model, "base_model", None), SparseGradModel):
        return [SparseGradCallback(warmup_steps, head_steps)]
    return own_callbacks(name)


def masks_gradients(name: str) -> bool:
    """Return whether the method is one of GradDrop's."""
    return any(isinstance(callback, GradDropCallback) for callback in own_callbacks(name))


def own_callbacks(name: str) -> list[TrainerCallback]:
    """Return the callbacks that the table of methods has for the method, with their own defaults."""
    make = METHODS[name].make_callbacks
    return make() if make else []


def make_optimizer(name: str, model: nn.Module, lr: float) -> Any:
    """Return the method's own optimizer, None where the Trainer's will do."""
    make = METHODS[name].make_optimizer
    return make(model, lr) if make else None


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
    """Return how many values require a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_of_base(model: Any) -> int:
    """Return how many parameters the model has without what an adapter adds; packed 4-bit weights count unpacked."""
    if not isinstance(model, PeftModel):
        return sum(parameter.numel() for parameter in model.parameters())
    trained, all_of_them = model.get_nb_trainable_parameters()
    return all_of_them - trained


def density_of_lora(model: Any, target_modules: list[str] | None, density: float) -> float:
    """Return the share of the target weights that LoRA, whose ranks are whole numbers, trains for a `density`."""
    values, entries = 0, 0
    try:
        for name, module in targeted(model, target_modules):
            check_is_linear(name, module)
            in_features, out_features = in_out_features(module)
            values += lora_rank(in_features, out_features, density) * (in_features + out_features)
            entries += in_features * out_features
    except (TypeError, ValueError) as error:
        raise InputError(f"{str(error).rstrip('.')}; name linear layers with --target-modules") from error
    return values / entries
