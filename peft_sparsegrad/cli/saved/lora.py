"""LoRA adapters as they are saved."""

from __future__ import annotations

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
            sizes = [adapter.tensors[name].shape for name in parts.values()]
            if parts.keys() != {"A.weight", "B.weight"} or any(len(size) != 2 for size in sizes):
                raise InputError(
                    f"{adapter.folder}: {module!r} has the tensors {', '.join(f'lora_{part}' for part in parts)}; "
                    "only plain LoRA of linear layers can be read, lora_A and lora_B"
                )
        if not self._parts:
            raise InputError(f"{adapter.weights_path} holds no tensor of LoRA")

    @property
    def modules(self) -> dict[str, tuple[int, int] | None]:
        tensors = self.adapter.tensors
        return {
            module: (tensors[parts["B.weight"]].shape[0], tensors[parts["A.weight"]].shape[1])
            for module, parts in self._parts.items()
        }

    def delta(self, module: str, layout: WeightLayout) -> torch.Tensor:
        parts = self._parts[module]
        b, a = (self.adapter.tensor(parts[f"{factor}.weight"]).float() for factor in "BA")
        return b @ a * self._scale(module, a.shape[0])

    def _scale(self, module: str, rank: int) -> float:
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config.lora_alpha)
        return alpha / rank**0.5 if self.config.use_rslora else alpha / rank
