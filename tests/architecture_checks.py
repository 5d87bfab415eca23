"""What an adapter must do on a tiny model of any architecture: train, merge, save and load."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from architectures import model_types, tiny_inputs, tiny_model
from peft import PeftConfig, PeftModel, get_peft_model


def output(model: Any) -> torch.Tensor:
    """Return the first floating-point tensor of a tiny model's output."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    values = base(**tiny_inputs(base)).values()
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def adapted(model: Any) -> set[str]:
    """Return the names of the modules that have an adapter."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "base_layer")}


def train_one_step(model: Any) -> set[str]:
    """Take one step, and return the names of the adapted modules of which no parameter received a gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output(model).float().sin().mean().backward()  # the mean square of what is normalised is constant
    torch.optim.SGD(trained.values(), lr=0.05).step()
    got = [name for name, parameter in trained.items() if parameter.grad is not None]
    return {each for each in adapted(model) if not any(name.startswith(f"base_model.model.{each}.") for name in got)}


def check(model_type: str, make_config: Callable[[], PeftConfig]) -> tuple[set[str], set[str]]:
    """Train, merge, save and load an adapter on a tiny model; return the adapted modules, and those without gradient.

    Raises:
        AssertionError: If training changes nothing, or a merged or loaded model computes something else.
    """
    model: Any = get_peft_model(tiny_model(model_type), make_config())
    names = adapted(model)
    with torch.no_grad():
        before = output(model)
    idle = train_one_step(model)
    with torch.no_grad():
        trained = output(model)
        assert not torch.equal(before, trained), "training changes nothing"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(tiny_model(model_type), folder)
        scale = trained.abs().max()
        assert (output(loaded) - trained).abs().max() <= 1e-6 * scale, "loaded"
        assert (output(model.merge_and_unload()) - trained).abs().max() <= 1e-3 * scale, "merged"
    return names, idle


def number_with_default_targets(make_config: Callable[[], PeftConfig]) -> int:
    """Return on how many model types a configuration attaches that names no target."""
    attached = 0
    for model_type in model_types():
        model = tiny_model(model_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                get_peft_model(model, make_config())
                attached += 1
            except ValueError:  # which asks for targets
                pass
    return attached
