"""LoRA adapters as they are saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..errors import InputError
from .adapter import SavedAdapter, grouped_by_module
from .method import SavedMethod, WeightLayout


class SavedLora(SavedMethod):
    """Plain LoRA of linear layers: `lora_A` (r, in) and `lora_B` (out, r)."""

    peft_type = "LORA"

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__(adapter)
        try:
            config = LoraConfig.from_pretrained(str(adapter.folder))
        except (TypeError, ValueError) as error:
            raise InputError(f"the settings in {adapter.folder} cannot be used: {error}") from error
        assert isinstance(config, LoraConfig)
        self.config, self._parts = config, grouped_by_module(list(adapter.tensors), "lora_")
        for module, parts in self._parts.items():
            self._check(module, parts)
        if not self._parts:
            raise InputError(f"{adapter.weights_path} holds no tensor of LoRA")

    def _check(self, module: str, parts: Mapping[str, str]) -> None:
        """Raise an InputError unless these are the two factors of a linear layer."""
        if parts.keys() != {"A.weight", "B.weight"}:
            raise InputError(
                f"{self.adapter.folder}: {module!r} has the tensors {', '.join(f'lora_{part}' for part in parts)}; "
                "only plain LoRA of linear layers can be read, lora_A and lora_B"
            )
        a, b = (self.adapter.tensors[parts[f"{factor}.weight"]].shape for factor in "AB")
        if len(a) != 2 or len(b) != 2:
            raise InputError(
                f"{self.adapter.folder}: {module!r} has lora_A of shape {a} and lora_B of shape {b}; only plain LoRA "
                "of linear layers can be read, whose factors are matrices"
            )
        if a[0] != b[1] or a[0] < 1:
            raise InputError(
                f"{self.adapter.weights_path} is damaged: {module!r} has lora_A of shape {a} and lora_B of shape {b}, "
                "which should be (r, in) and (out, r) with one rank r of 1 or more; save the adapter again"
            )

    @property
    def modules(self) -> dict[str, tuple[int, int] | None]:
        tensors = self.adapter.tensors
        return {
            module: (tensors[parts["B.weight"]].shape[0], tensors[parts["A.weight"]].shape[1])
            for module, parts in self._parts.items()
        }

    def delta(self, module: str, layout: WeightLayout) -> torch.Tensor:
        if self.modules[module] != layout.shape:
            raise InputError(f"{self.adapter.folder}: {module!r} is not for a weight of shape {layout.shape}")
        parts = self._parts[module]
        b, a = (self.adapter.tensor(parts[f"{factor}.weight"]).float() for factor in "BA")
        return b @ a * self._scale(module, a.shape[0])

    def _scale(self, module: str, rank: int) -> float:
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config.lora_alpha)
        return alpha / rank**0.5 if self.config.use_rslora else alpha / rank
