"""SparseGrad adapters as they are saved."""

from __future__ import annotations

from typing import Any

import torch

from ...functional import stacked_delta
from ..errors import InputError
from .adapter import SavedAdapter
from .method import SavedMethod, SavedSupport, Table, WeightLayout
from .sparsegrad_facts import group_facts, group_table, layer_facts, layer_table
from .sparsegrad_layers import read_layers


class SavedSparseGrad(SavedMethod):
    """Values, supports and weight shapes of each layer, and the basis of each group with its first layer.

    Attributes:
        layers: The layers by module, in natural order.
    """

    peft_type = "SPARSEGRAD"
    converts_to_lora = True
    plots = ("support", "gradient", "magnitudes", "rows")

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__(adapter)
        self.layers = read_layers(adapter)

    @property
    def modules(self) -> dict[str, tuple[int, int] | None]:
        return {module: layer.plan.unfolded_shape for module, layer in self.layers.items()}

    def delta(self, module: str, layout: WeightLayout) -> torch.Tensor:
        layer = self.layers[module]
        if layer.plan.unfolded_shape != layout.shape:
            raise InputError(f"{self.adapter.folder}: {module!r} is not for a weight of shape {layout.shape}")
        return stacked_delta(layer.core(), layer.plan.num_experts, torch.float32).view(layout.shape)

    def support(self, module: str) -> SavedSupport:
        layer = self.layers[module]
        return SavedSupport(layer.indices(), (layer.matrix("U"), layer.matrix("V")))

    def facts(self) -> dict[str, list[Any]]:
        layers = list(self.layers.values())
        return {"groups": group_facts(layers), "layers": [layer_facts(layer) for layer in layers]}

    @classmethod
    def tables(cls, facts: dict[str, Any]) -> list[Table]:
        return [group_table(facts["groups"]), layer_table(facts["layers"])]
