"""The arithmetic of weighted merges: how the values of several adapters become those of one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune, task_arithmetic
from torch import nn

KINDS = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_NO_SVD = {"svd_rank": None, "svd_clamp": None, "svd_full_matrices": True, "svd_driver": None}
_ELECTING, _PRUNING = ("ties", "dare_ties"), ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class WeightedMerge:
    """A kind of merge, under the names of PEFT's arguments.

    Args:
        adapters: Names of the adapters.
        weights: Weight of each.
        combination_type: One of `KINDS`.
        density: Share of each adapter's values that pruning keeps, in (0, 1]; None for a kind that prunes nothing.
        majority_sign_method: Where signs are elected, `"total"` by the sum of the values or `"frequency"` by number.

    Raises:
        ValueError: If an argument is out of range or does not go with the kind. The message names it.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: Any = "total"

    def __post_init__(self) -> None:
        if self.combination_type not in KINDS:
            raise ValueError(f"`combination_type` must be one of {', '.join(KINDS)}, not {self.combination_type!r}")
        if not self.adapters or isinstance(self.adapters, str):
            raise ValueError(f"`adapters` must be a list with at least one name, not {self.adapters!r}")
        if isinstance(self.weights, str) or len(self.weights) != len(self.adapters):
            raise ValueError(f"`weights` must be {len(self.adapters)} numbers, one an adapter, not {self.weights!r}")
        if not all(_is_finite(weight) for weight in self.weights):
            raise ValueError(f"`weights` must be finite numbers, not {self.weights!r}")
        self._check_density()
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"`majority_sign_method` must be total or frequency, not {self.majority_sign_method!r}")

    def _check_density(self) -> None:
        kind, density = self.combination_type, self.density
        if kind not in _PRUNING and density is not None:
            raise ValueError(f"`density={density}` is for kinds that prune, {', '.join(_PRUNING)}, not for {kind!r}")
        if kind in _PRUNING and (not _is_finite(density) or not 0 < density <= 1):  # pyright: ignore
            raise ValueError(f"`density` must be in (0, 1] with combination_type={kind!r}, not {density!r}")

    def pruned(self, values: torch.Tensor) -> torch.Tensor:
        """Return an adapter's values, of any shape, with zeros where the kind drops some.

        DARE draws them from torch's generator, and divides the others by the density.
        """
        if self.density is None or self.density == 1:
            return values
        at_random = self.combination_type.startswith("dare")
        return prune(values, self.density, method="random" if at_random else "magnitude", rescale=at_random)

    def merged(self, values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Return the merge of pruned values of one shape, those of the adapters that a layer has, with their weights.

        With an election of signs, an entry is the mean of the weighted values of the sign that won.
        """
        factors = torch.tensor(weights, dtype=values[0].dtype, device=values[0].device)
        if self.combination_type not in _ELECTING:
            return task_arithmetic(list(values), factors)
        stacked = torch.stack(list(values))
        majority = calculate_majority_sign_mask(stacked, method=self.majority_sign_method)
        return disjoint_merge(stacked * factors.view(-1, *(1,) * values[0].ndim), majority)


def _is_finite(number: Any) -> bool:
    try:
        return not isinstance(number, (bool, str)) and math.isfinite(number)
    except TypeError:
        return False


def check_new_name(names: Collection[str], adapter_name: str) -> None:
    """Raise a ValueError if an adapter cannot have this name, because of the other `names` or of its form."""
    if adapter_name in names:
        raise ValueError(
            f"`adapter_name={adapter_name!r}` is the name of an adapter of this model: choose another, or call "
            "`delete_adapter` first"
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"`adapter_name` must be a name without dots, not {adapter_name!r}")
    if hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(f"`adapter_name={adapter_name!r}` is an attribute of torch's modules: choose another name")


def check_no_svd(combination_type: str, **settings: Any) -> None:
    """Raise a ValueError if a merge by SVD is asked for, by its kind or by one of PEFT's settings for it."""
    given = [f"{name}={value!r}" for name, value in settings.items() if value != _NO_SVD[name]]
    if str(combination_type).endswith("svd"):
        given.insert(0, f"combination_type={combination_type!r}")
    if given:
        raise ValueError(
            f"`{given[0]}` is for merges by SVD, which approximate LoRA's factors: take a `combination_type` of "
            f"{', '.join(KINDS)}; linear and cat are exact"
        )


def check_adapters(configs: Mapping[str, Any], adapters: Sequence[str]) -> None:
    """Raise a ValueError if there is no such adapter, or one trains modules of which there is no weighted sum."""
    for name in adapters:
        if name not in configs:
            raise ValueError(f"`adapters`: the model has no adapter {name!r}, only {', '.join(configs)}")
        for setting in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            if value := getattr(configs[name], setting):
                raise ValueError(
                    f"`adapters`: {name!r} has `{setting}={value!r}`, of which there is no weighted sum, with LoRA "
                    "neither: train the adapters without it, or merge them into the weights"
                )
