"""Pictures that `plot` draws of an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig
from torch import nn

from ..graddrop import GradDropConfig
from ..graddrop.blocks import block_of
from ..sparsegrad.layer import SparseGradLayer
from .base_models import load_adapted, load_tokenizer, module_names
from .data import Batch, is_labelled, labelled_batches, language_batches, read_labelled, read_texts
from .errors import InputError
from .saved.adapter import SavedAdapter
from .saved.graddrop import SavedGradDrop
from .saved.sparsegrad import SavedSparseGrad

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class GradientSettings:
    """The gradient to draw, under the names of the command's options."""

    data: Path | None = None
    module: str | None = None
    batch_size: int = 8
    max_length: int = 128


def draw_support(adapter: SavedAdapter) -> Figure:
    """The supports of a SparseGrad adapter.

    Raises:
        InputError: If the whole core trains.
    """
    from ..plots import support_maps
    from ..plots.supports import LayerSupport

    layers = SavedSparseGrad(adapter).layers.values()
    supports = [
        LayerSupport(layer.plan.name, layer.plan.role, indices, layer.plan.core_shape)
        for layer in layers
        if (indices := layer.indices()) is not None
    ]
    if not supports:
        raise InputError(f"{adapter.folder} has no support to draw: its support is dynamic, and the whole core trains")
    return support_maps(supports)


def draw_active(adapter: SavedAdapter, base: str | None, epochs: int | None) -> Figure:
    """The entries of a GradDrop adapter that train in each layer and epoch."""
    from ..plots import active_entries

    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings in {adapter.folder} cannot be used: {error}") from error
    assert isinstance(config, GradDropConfig)
    if config.num_epochs is None and epochs is None:
        raise InputError(f"{adapter.folder} does not say how many epochs the run had: give --epochs")
    return active_entries(config, graddrop_layers(adapter, config, base), epochs)


def graddrop_layers(adapter: SavedAdapter, config: GradDropConfig, base: str | None) -> list[str]:
    """The layers that an adapter's masks govern, from the input on.

    Where the masks go by that order, and the names do not tell it, it is the base model's.
    """
    modules = [parameter.rpartition(".")[0] for parameter in SavedGradDrop(adapter).parameters]
    numbered = {module: re.match(r"(.*?\.\d+)(?=\.|$)", module) for module in modules}
    layers = dict.fromkeys(found.group(1) if found else module for module, found in numbered.items())
    lists = {found.group(1).rpartition(".")[0] if found else module for module, found in numbered.items()}
    if not config.uses_sets or config.granularity == "element" or len(lists) == 1:
        return list(layers)
    ordered = dict.fromkeys(block_of(name, layers) for name in module_names(adapter, base))
    return [layer for layer in ordered if layer is not None]


Draw = Callable[[Any, SparseGradLayer, Batch, str], "Figure"]  # of a model, its layer, a batch and a title


def draw_gradient(adapter: SavedAdapter, draw: Draw, base: str | None, settings: GradientSettings) -> Figure:
    """A gradient of one layer of a SparseGrad adapter, by `heat_map`, `magnitudes` or `output_rows`.

    Raises:
        InputError: If there are no data, or no such layer.
    """
    if settings.data is None:
        raise InputError("a gradient needs text or labelled sentences: give --data")
    if is_labelled(settings.data) != (adapter.config.get("task_type") == "SEQ_CLS"):
        wanted = "text" if is_labelled(settings.data) else "labelled sentences"
        raise InputError(
            f"{adapter.folder} is for the task {adapter.config.get('task_type')}: give {wanted} as --data"
        )
    names = list(SavedSparseGrad(adapter).modules)
    name = settings.module or names[len(names) // 2]
    if name not in names:
        raise InputError(f"{adapter.folder} has no layer {name!r}; it has {', '.join(names)}")
    model: Any = load_adapted(adapter, base)
    tokenizer = load_tokenizer(adapter, base)
    if tokenizer is None:
        raise InputError("there is no tokenizer beside the adapter or the base model")
    layer = cast(SparseGradLayer, model.get_base_model().get_submodule(name))
    batch = _batch(settings, tokenizer, model.config.label2id)
    return draw(model, layer, batch, f"{name}, {settings.batch_size} sequences")


def heat_map(model: Any, layer: SparseGradLayer, batch: Batch, title: str) -> Figure:
    """The gradient of the weight before and after the change of basis."""
    from ..plots import gradient_heat_map

    basis = layer.adapter("default").basis
    return gradient_heat_map(weight_gradient(model, layer, batch), basis.U, basis.V, title)


def magnitudes(model: Any, layer: SparseGradLayer, batch: Batch, title: str) -> Figure:
    """The sorted magnitudes of the weight's gradient before and after the change of basis."""
    from ..plots import gradient_magnitudes

    basis = layer.adapter("default").basis
    return gradient_magnitudes(weight_gradient(model, layer, batch), basis.U, basis.V, title)


def output_rows(model: Any, layer: SparseGradLayer, batch: Batch, title: str) -> Figure:
    """The gradient of the output, token by token."""
    from ..plots import output_gradient_rows

    return output_gradient_rows(output_gradient(model, layer, batch), layer.adapter("default").basis.V, title)


def weight_gradient(model: Any, layer: SparseGradLayer, batch: Batch) -> torch.Tensor:
    """∂L/∂W (out, in) of a layer's frozen weight for a batch with labels, at the adapted model without dropout."""
    weight = cast(torch.Tensor, layer.get_base_layer().weight).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.eval()(**batch).loss, weight)
    weight.requires_grad_(False)
    return gradient.T if layer.fan_in_fan_out else gradient


def output_gradient(model: Any, layer: SparseGradLayer, batch: Batch) -> torch.Tensor:
    """∂L/∂Y (tokens, out) of a layer for a batch with labels, at the adapted model without dropout."""
    from ..plots.nonzero_shares import observed_output_gradients

    found: list[torch.Tensor] = []
    with observed_output_gradients({"": cast(nn.Module, layer)}, lambda _, gradient: found.append(gradient)):
        weight_gradient(model, layer, batch)
    return torch.cat(found)


def _batch(settings: GradientSettings, tokenizer: Any, label2id: dict[str, int]) -> Batch:
    data = settings.data
    assert data is not None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sizes = (1, settings.batch_size, settings.max_length, 0)
    if not is_labelled(data):
        return language_batches(read_texts(data, tokenizer), tokenizer, *sizes)[0]
    sentences = read_labelled(data)
    numbered = sentences.numbered_as(label2id)
    if numbered is None:
        raise InputError(
            f"{data} has the labels {', '.join(sentences.names)}, and the model tells {', '.join(label2id)} apart: "
            f"write the numbers that they had in training, 0 to {len(label2id) - 1}"
        )
    return labelled_batches(numbered, tokenizer, *sizes)[0]
