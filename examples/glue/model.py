"""The model of a run: the method on the MLP's layers, the rest trained or frozen, a new head that always trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, set_seed

from experiments.attachment import attach_method, count_trainable
from experiments.loading import DEVICE, load_pretrained
from experiments.methods import targeted
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.common.targets.modules import in_out_features
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter
from peft_sparsegrad.sparsegrad.plan import check_is_linear

from .runs import Run
from .tasks import Task


@dataclass
class TrainedModel:
    """A model that is ready to train.

    Attributes:
        model: The model.
        adapter: What the method itself trains in the target layers.
        rest: What trains besides: the head, and everything else where the rest of the model is trained.
        layer_sizes: Entries of the target layers' weights.
    """

    model: Any
    adapter: list[nn.Parameter]
    rest: list[nn.Parameter]
    layer_sizes: list[int]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of the model's trained parameters, and of a target layer, on average.

        "layer" are its trained values, "layer_in_step" those that a step moves (fewer with a dynamic support, the
        same else), "layer_entries" its weight's entries.
        """
        layers, values = len(self.layer_sizes), sum(parameter.numel() for parameter in self.adapter)
        chosen = [module.plan.k for module in self.model.modules() if isinstance(module, LayerAdapter)]
        return {
            "model": count_trainable(self.model),
            "layer": round(values / layers),
            "layer_in_step": round((sum(chosen) if chosen else values) / layers),
            "layer_entries": round(sum(self.layer_sizes) / layers),
        }


def build_model(run: Run, task: Task) -> TrainedModel:
    """The checkpoint with the run's method.

    Raises:
        InputError: If the checkpoint cannot be loaded, or the method cannot be put onto the target modules.
    """
    set_seed(run.seed)  # the next random numbers are those of the task head
    model = load_pretrained(
        AutoModelForSequenceClassification,
        run.model,
        num_labels=task.num_outputs,
        problem_type="regression" if task.is_regression else "single_label_classification",
        dtype="float32",
        ignore_mismatched_sizes=True,  # a head for other labels, as of a model fine-tuned on MNLI, becomes a new one
    )
    return attach_to_mlp(run, model.to(DEVICE))


def attach_to_mlp(run: Run, model: Any) -> TrainedModel:
    """Put the run's method onto the target layers, and train what is to train besides. Raises as `build_model`."""
    targets = target_layers(model, run.target_modules)
    besides = modules_besides(model, targets, run.rest == "trained")
    sizes = [math.prod(in_out_features(module)) for module in targets.values()]
    model = attach_method(
        run.method,
        model,
        None if run.target_modules is None else list(run.target_modules),
        run.density if run.num_values is None else density_of(run.num_values, sizes),
        run.seed,
        task_type="SEQ_CLS",
        modules_to_save=besides,
        **run.overrides,
    )
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    inside = tuple(f"{prefix}{name}." for name in targets)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapter = [parameter for name, parameter in trained if name.startswith(inside)]
    rest = [parameter for name, parameter in trained if not name.startswith(inside)]
    return TrainedModel(model, adapter, rest, sizes)


def target_layers(model: nn.Module, target_modules: tuple[str, ...] | None) -> dict[str, nn.Module]:
    """The linear layers that the method trains, by name. Raises an InputError if there are none, or other modules."""
    try:
        found = dict(targeted(model, None if target_modules is None else list(target_modules)))
        for name, module in found.items():
            check_is_linear(name, module)
    except (TypeError, ValueError) as error:
        raise InputError(f"{str(error).rstrip('.')}; name linear layers with --target-modules") from error
    return found


def density_of(num_values: int, sizes: list[int]) -> float:
    """The share of weights with so many entries that `num_values` for each are, on average."""
    if num_values * len(sizes) > sum(sizes):
        raise InputError(
            f"--num-values {num_values:,} is more than the {sum(sizes) // len(sizes):,} of a target layer"
        )
    return num_values * len(sizes) / sum(sizes)


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are new with the task: what is outside the encoder, and the pooler."""
    encoder = str(model.base_model_prefix)
    outside = [name for name, child in model.named_children() if name != encoder and _has_parameters(child)]
    pooler = getattr(getattr(model, encoder), "pooler", None)
    return [*outside, *([f"{encoder}.pooler"] if pooler is not None else [])]


def modules_besides(model: nn.Module, targets: dict[str, nn.Module], rest_trains: bool) -> list[str]:
    """Names for `modules_to_save`: the head, and with `rest_trains` all else that has parameters but the targets.

    Raises:
        InputError: If a module has parameters of its own and a target layer inside: they cannot be told apart.
    """
    chosen = head_modules(model)
    if not rest_trains:
        return chosen
    for name, module in model.named_modules():
        if not _has_parameters(module, recurse=False) or _is_within(name, [*chosen, *targets]):
            continue
        if any(_is_within(target, [name]) for target in targets):
            where = name or "the model"
            raise InputError(f"{where} has parameters besides its layers, which --rest trained cannot train alone")
        chosen.append(name)
    return chosen


def _has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse))


def _is_within(name: str, modules: Iterable[str]) -> bool:
    """Return whether the module is one of these or inside one. All are inside the root, whose name is empty."""
    return any(not other or name == other or name.startswith(f"{other}.") for other in modules)
