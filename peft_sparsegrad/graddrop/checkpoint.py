"""The stored form of GradDrop's deltas: the entries that are not zero, and their positions.

A tensor is stored in full, or as its non-zero values in the order of their positions together with a `_support` (a bit
mask or int32 positions) and its `_shape`, whichever takes the fewest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..common.files.adapter_file import ADVICE, check_finite, check_tensors
from ..functional import pack_support, packed_support_size, unpack_support
from .config import GradDropConfig
from .layer import GradDropLayer
from .step_count import check_step_counts, is_step_count

_SUPPORT, _SHAPE = "_support", "_shape"
_SHAPE_DTYPE = torch.int32
_PEFT_PREFIX = "base_model.model."


def compress(tensors: dict[str, torch.Tensor], config: GradDropConfig) -> dict[str, torch.Tensor]:
    """Return deltas in the form in which they are stored.

    Args:
        tensors: Deltas by their name in the model.
        config: Settings of the adapter. If entries are left out, its `saved_energy` is set to the share of the deltas'
            squared norm that is kept, for the model card.

    Returns:
        Stored tensors under the same names; if only some entries of a delta are stored, also their positions under
        its name with `_support` and the shape of the delta under its name with `_shape`.
    """
    stored: dict[str, torch.Tensor] = {}
    kept_energy = energy = 0.0
    for name, delta in tensors.items():
        kept = delta if config.save_density is None else _largest(delta, config.save_density)
        kept_energy += kept.double().square().sum().item()
        energy += delta.double().square().sum().item()
        support = _cheapest_support(kept)
        if support is None:
            stored[name] = kept
        else:
            stored[name] = kept.flatten()[support]
            stored[f"{name}{_SUPPORT}"] = pack_support(support, delta.numel())
            stored[f"{name}{_SHAPE}"] = torch.tensor(delta.shape, dtype=_SHAPE_DTYPE)
    config.saved_energy = kept_energy / energy if kept_energy < energy else None
    return stored


def decompress(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the deltas that `compress` stored, after checking that the file is not damaged and fits the model.

    Args:
        model: The model, with the adapter injected.
        adapter_name: Name of the adapter.
        tensors: Stored tensors by their name in the model; names of supports and shapes lack the adapter's name.

    Returns:
        Deltas by their name in the model; tensors that are not GradDrop's are returned unchanged.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape or dtype, or damaged. The message names it.
    """
    expected = {
        f"{name}.graddrop_adapter.{adapter_name}.{kind}": delta
        for name, module in model.named_modules()
        if isinstance(module, GradDropLayer) and module.has_adapter(adapter_name)
        for kind, delta in module.deltas(adapter_name).state_dict().items()
    }
    given = {name: tensor for name, tensor in tensors.items() if ".graddrop_" in name}
    for name, own in expected.items():
        support, shape = (_beside(name, part, adapter_name, given) for part in (_SUPPORT, _SHAPE))
        if name in given and (support or shape):
            _check_pair(support, shape)
            assert support is not None
            assert shape is not None
            _check_shape(shape, given.pop(shape), own)
            given[name] = _spread(name, given[name], given.pop(support), own)
    check_tensors(expected, given)
    return {**{name: tensor for name, tensor in tensors.items() if ".graddrop_" not in name}, **given}


def check_stored(config: GradDropConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the tensors of an adapter file by themselves, before there is a model.

    Args:
        config: Settings of the adapter, which say nothing about its tensors.
        tensors: Tensors of the file by name, those of other modules among them.

    Raises:
        ValueError: If a tensor is missing, of another shape or dtype, or damaged. The message names it.
    """
    check_step_counts(tensors)
    names = [name for name in tensors if ".graddrop_" in name and not is_step_count(name)]
    deltas = [name for name in names if not name.endswith((_SUPPORT, _SHAPE))]
    if not deltas:
        raise ValueError(f"no tensor is one of GradDrop. {ADVICE}")
    beside = {f"{name}{part}" for name in deltas for part in (_SUPPORT, _SHAPE)}
    if alone := sorted(set(names) - set(deltas) - beside):
        raise ValueError(f"{alone[0]!r} has no values beside it. {ADVICE}")
    for name in deltas:
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name!r} has dtype {tensors[name].dtype}, not one of floats. {ADVICE}")
        check_finite(name, tensors[name])
        support, shape = f"{name}{_SUPPORT}", f"{name}{_SHAPE}"
        if (support in tensors) or (shape in tensors):
            _check_pair(support if support in tensors else None, shape if shape in tensors else None)
            _check_vector(shape, tensors[shape])
            _positions(name, tensors[name], tensors[support], math.prod(tensors[shape].tolist()))


def _check_pair(support: str | None, shape: str | None) -> None:
    """Raise a ValueError if only one of the two tensors beside a delta's values is there."""
    if support is None or shape is None:
        raise ValueError(f"{support or shape!r} needs a {_SHAPE if support else _SUPPORT!r} beside it. {ADVICE}")


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Return the delta with all but its largest entries, at least one, set to zero."""
    count = max(1, round(density * delta.numel()))
    flat = delta.flatten()
    positions = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, positions, flat[positions]).view(delta.shape)


def _cheapest_support(delta: torch.Tensor) -> torch.Tensor | None:
    """Return the positions of the entries that are not zero, or None if the full tensor takes no more bytes."""
    count = int(torch.count_nonzero(delta))
    support = packed_support_size(delta.numel(), count)
    nbytes = count * delta.itemsize + support + delta.ndim * _SHAPE_DTYPE.itemsize
    return None if nbytes >= delta.numel() * delta.itemsize else delta.flatten().nonzero().flatten()


def _beside(name: str, part: str, adapter_name: str, given: dict[str, torch.Tensor]) -> str | None:
    """Return the name under which a support or shape of the delta `name` is stored, or None if it is not.

    PEFT puts the adapter's name into the names of the model's own tensors only, and removes its prefix from no other.

    Args:
        name: Name of the delta in the model.
        part: `_support` or `_shape`.
        adapter_name: Name of the adapter.
        given: Stored tensors by name.
    """
    module, _, kind = name.rpartition(f".{adapter_name}.")
    plain = f"{module}.{kind}{part}".removeprefix(_PEFT_PREFIX)
    return next((each for each in (f"{name}{part}", plain, f"{_PEFT_PREFIX}{plain}") if each in given), None)


def _check_vector(name: str, shape: torch.Tensor) -> None:
    if shape.dtype != _SHAPE_DTYPE or shape.ndim != 1:
        raise ValueError(
            f"{name!r} must be a vector of {_SHAPE_DTYPE}, not {shape.dtype} {tuple(shape.shape)}. {ADVICE}"
        )
    if bool((shape < 0).any()):
        raise ValueError(f"{name!r} is {tuple(shape.tolist())}, which is no shape. {ADVICE}")


def _check_shape(name: str, shape: torch.Tensor, own: torch.Tensor) -> None:
    _check_vector(name, shape)
    if tuple(shape.tolist()) != tuple(own.shape):
        raise ValueError(f"{name!r} is {tuple(shape.tolist())}, and the shape here {tuple(own.shape)}. {ADVICE}")


def _spread(name: str, values: torch.Tensor, packed: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    positions = _positions(name, values, packed, own.numel())
    return values.new_zeros(own.numel()).index_copy_(0, positions, values).view(own.shape)


def _positions(name: str, values: torch.Tensor, packed: torch.Tensor, num_entries: int) -> torch.Tensor:
    """Return the positions of a delta's values among its entries."""
    if values.ndim != 1 or values.numel() > num_entries:
        raise ValueError(f"{name!r} holds values of shape {tuple(values.shape)} for {num_entries} entries. {ADVICE}")
    try:
        return unpack_support(packed, num_entries, values.numel())
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}. {ADVICE}") from error
