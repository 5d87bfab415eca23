"""Memory of a training step, counted in bytes of tensor storage."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from peft_sparsegrad.common.training.pieces import local_part
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter

# Parameters of mallopt in glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep the memory that tensors free, as PyTorch's allocator for GPUs does. Returns whether it will.

    By default it gives large blocks back to the kernel and takes them again, page by page. How often depends on what
    the other models in the process have allocated before: it changed the ratio of two methods by more than 10%.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0))


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and bytes of each storage behind `tensors`, which may share some; of a DTensor this rank's part."""
    found = (part.untyped_storage() for tensor in tensors for part in _dense_parts(local_part(tensor)))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def resident_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    """Parameters, buffers, plain attributes of modules, SparseGrad's gradient sums, and the optimizer's state."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))
        if isinstance(module, LayerAdapter) and module.gradient_sum is not None:
            yield module.gradient_sum
    for state in optimizer.state.values() if optimizer is not None else ():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]


def saved_storages(forward: Callable[[], torch.Tensor]) -> tuple[dict[int, int], dict[int, int]]:
    """Return the storages that the graph of one forward pass holds for its backward pass.

    Two passes are run, and both graphs held: what both save under one address (parameters, buffers, matrices made
    once, the batch) stands in memory anyway.

    Args:
        forward: Runs a forward pass and returns the loss.

    Returns:
        The storages that the pass adds, and those that stand there anyway.
    """
    first, second = _Saving(forward), _Saving(forward)
    kept = {address: size for address, size in first.saved.items() if address not in second.saved}
    standing = {address: size for address, size in first.saved.items() if address in second.saved}
    return kept, standing


class _Saving:
    """A forward pass, its graph, and the storages that the graph holds."""

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        self.saved: dict[int, int] = {}
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            self.loss = forward()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.update(storages([tensor]))
        return tensor.detach()


class Peak:
    """The block of a `with` statement, and the bytes that it has allocated at its worst moment, beyond those before.

    Args:
        device: Device whose memory counts.

    Attributes:
        bytes: The peak, once the block is over.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes, self._device, self._before = 0, device, 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._profile.__exit__(*error)
            self.bytes = _peak_of_trace(self._profile)


def peak_of(function: Callable[[], object], device: torch.device) -> int:
    """Return the `Peak` of a call of `function`."""
    with Peak(device) as peak:
        function()
    return peak.bytes


def _peak_of_trace(profiler: profile) -> int:
    """Highest running sum of a trace's allocations and releases, on the CPU."""
    assert profiler.profiler is not None
    trace: Any = profiler.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in trace.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak
