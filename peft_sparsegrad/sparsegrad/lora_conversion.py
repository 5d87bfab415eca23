"""The conversion of SparseGrad adapters to LoRA adapters, for servers that only support LoRA."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from .adapter import LayerAdapter
from .checkpoint import check_settled
from .layer import SparseGradLayer, layer_adapters


@dataclass
class LoraConversion:
    """A LoRA adapter made of a SparseGrad adapter.

    Attributes:
        config: Configuration of the LoRA adapter, with the rank of every module.
        state_dict: Tensors of the LoRA adapter, under the names that PEFT saves.
        errors: ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm, by module name.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    errors: dict[str, float]

    @property
    def largest_error(self) -> float:
        return max(self.errors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` to a directory."""
        os.makedirs(path, exist_ok=True)
        save_file(self.state_dict, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        self.config.save_pretrained(os.fspath(path))


@torch.no_grad()
def convert_to_lora(model: nn.Module, rank: int | None = None, adapter_name: str = "default") -> LoraConversion:
    """Convert a SparseGrad adapter to a LoRA adapter that gives the same outputs.

    ΔW = V S Uᵀ has at most as many independent rows as S has rows, or columns, that hold a value. Without a `rank`,
    the LoRA adapter has that rank and the conversion is exact.

    Args:
        model: A model with a trained SparseGrad adapter, not merged. It is not changed.
        rank: Rank of every module, by truncated SVD; None for an exact conversion.
        adapter_name: Name of the SparseGrad adapter.

    Returns:
        The LoRA adapter and, for each module, the relative error of its ΔW.

    Raises:
        ValueError: If there is no such adapter, it is still in its warm-up, it trains other modules, or rank < 1.
    """
    adapters = layer_adapters(model, adapter_name)
    if not adapters:
        raise ValueError(f"the model has no SparseGrad adapter named {adapter_name!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, not {rank}")
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError(
            "the adapter also trains `modules_to_save` or tokens, which the LoRA adapter would not have: use "
            "`model.merge_and_unload()` for a model with everything in it"
        )
    check_settled(adapters, adapter_name)
    tensors, ranks, errors = {}, {}, {}
    for adapter in adapters:
        name = adapter.plan.name
        a, b = _exact_factors(adapter)
        delta = b @ a
        if rank is not None and rank < a.shape[0]:
            a, b = _truncate(a, b, rank)
        norm = delta.norm().item()
        errors[name] = (delta - b @ a).norm().item() / norm if norm else 0.0
        ranks[name] = a.shape[0]
        dtype = torch.promote_types(adapter.values.dtype, torch.float32)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to("cpu", dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
    return LoraConversion(_lora_config(model, adapter_name, ranks), tensors, errors)


def lora_settings(model: nn.Module, ranks: dict[str, int]) -> dict[str, Any]:
    """Return `LoraConfig` fields that give each module in `ranks` its rank and a scale of 1, and target no other."""
    r = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    # a regular expression, because PEFT compares a list with the ends of names, which could match other modules
    suffixes = tuple(f".{name}" for name in ranks)
    ambiguous = any(name.endswith(suffixes) and name not in ranks for name, _ in model.named_modules())
    targets = "|".join(map(re.escape, ranks)) if ambiguous else list(ranks)
    return {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
    }


def _lora_config(model: nn.Module, adapter_name: str, ranks: dict[str, int]) -> LoraConfig:
    ours = cast("dict[str, PeftConfig]", model.peft_config)[adapter_name]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = (module for module in model.modules() if isinstance(module, SparseGradLayer))
    return LoraConfig(
        **lora_settings(base, ranks),
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
        fan_in_fan_out=next(layer.fan_in_fan_out for layer in layers if layer.has_adapter(adapter_name)),
    )


def _exact_factors(adapter: LayerAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) with B A = V S Uᵀ; r is the smaller number of rows or columns of S in use."""
    core = adapter.core.matrix(torch.float64).detach()
    U, V = adapter.basis.U, adapter.basis.V
    U = torch.eye(core.shape[1]) if U is None else U
    V = torch.eye(core.shape[0]) if V is None else V
    U, V = U.to(core), V.to(core)
    rows, columns = (core != 0).any(1), (core != 0).any(0)
    if not core.any():
        rows[0] = columns[0] = True  # LoRA has no rank 0
    if rows.sum() <= columns.sum():
        return core[rows] @ U.T, V[:, rows]
    return U[:, columns].T, V @ core[:, columns]


def _truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors of `rank` for b @ a, from the SVD of a small matrix between two orthogonal ones."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, singular_values, right = torch.linalg.svd(r_b @ r_a.T)
    root = singular_values[:rank].sqrt()
    return (q_a @ right[:rank].T * root).T, q_b @ left[:, :rank] * root
