"""Weights that are not in one piece on one device: the refusals of those that no adapter can be added to.

FSDP and tensor parallelism split the weights of a model, and accelerate's hooks offload them to the CPU or a disk.
DeepSpeed's ZeRO-3 may split them while the model is made, and puts them together whenever a module is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.fsdp import is_fsdp_enabled, is_fsdp_managed_module

from .training.distributed import world_size

_ADD_BEFORE = (
    "is split over devices: load the model without `tp_plan` and `distributed_config`, add the adapter, and split the "
    "model afterwards, with FSDP"
)


def check_model(model: nn.Module) -> None:
    """Refuse a model that transformers or FSDP1 has split; other splits show in the weights.

    Raises:
        ValueError: If it is.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False) or _is_wrapped_by_fsdp1(model):
        raise ValueError(f"the model {_ADD_BEFORE}")


def check_targets(targets: list[tuple[str, nn.Module]], trains: bool) -> None:
    """Refuse modules whose weights are split over devices and, if the adapter is to be trained, offloaded ones.

    Args:
        targets: Name and base layer of each module that is to have an adapter.
        trains: True if the adapter is to be trained.

    Raises:
        ValueError: For the first such module.
    """
    for name, module in targets:
        if _has_dtensors(module):
            raise ValueError(f"the weight of the target module {name!r} {_ADD_BEFORE}")
        if trains and _is_offloaded(module):
            raise ValueError(
                f"the weight of the target module {name!r} is offloaded, so that an adapter on it cannot be trained: "
                "load the model without offloading, quantised if it does not fit, or set `exclude_modules`"
            )


def check_merge(base_layer: nn.Module) -> None:
    """Refuse to merge into a layer whose weight FSDP2, tensor parallelism or ZeRO-3 has split.

    Raises:
        RuntimeError: If it is split.
    """
    if _has_dtensors(base_layer) or is_split_by_zero(base_layer):
        raise RuntimeError(
            "the weights are split over devices, where an adapter cannot be merged: save it, load it in one process "
            "onto a model in one piece, and merge it there"
        )


def _has_dtensors(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def _is_wrapped_by_fsdp1(model: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether a hook of accelerate loads the module's weights for each forward pass."""
    return hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters())


def check_data_parallel(adapters: nn.Module) -> None:
    """Refuse to copy a layer for `torch.nn.DataParallel` while its adapters train.

    The copies would lose their steps and the sums of their gradients.

    Args:
        adapters: The layer's adapters.

    Raises:
        RuntimeError: If some of their parameters train and gradients are enabled.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in adapters.parameters()):
        raise RuntimeError(
            "torch.nn.DataParallel, which the Trainer takes for several GPUs in one process, cannot train an adapter: "
            "start a process for each GPU with `torchrun` or `accelerate launch`, or show this one a single GPU with "
            "`CUDA_VISIBLE_DEVICES`"
        )


def is_split_by_zero(module: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has split some parameter of a module."""
    return any(hasattr(parameter, "ds_shape") for parameter in module.parameters())


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, also if ZeRO-3 has split it and left an empty one."""
    return getattr(tensor, "ds_shape", tensor.shape)


@contextlib.contextmanager
def in_one_piece(module: nn.Module) -> Iterator[None]:
    """Hold the parameters of a module together that ZeRO-3 has split, to be read; every rank has to come here."""
    if not is_split_by_zero(module):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def check_weights_are_on_all_ranks(model: nn.Module, reader: str, way_out: str) -> None:
    """Raise a ValueError on every rank if rank 0 alone may have a model's weights, as it has until they are sharded.

    Args:
        model: The model.
        reader: The setting or function that needs the weights.
        way_out: A way out beside `cpu_ram_efficient_loading=False`.
    """
    is_sharded = any(hasattr(each, "full_tensor") for each in model.parameters())
    is_sharded = is_sharded or any(is_fsdp_managed_module(each) for each in model.modules())
    if world_size() > 1 and is_fsdp_enabled() and not is_sharded:
        raise ValueError(
            f"{reader} needs the weights, which `cpu_ram_efficient_loading` reads on rank 0 alone: {way_out}, or set "
            "`cpu_ram_efficient_loading` to false"
        )
