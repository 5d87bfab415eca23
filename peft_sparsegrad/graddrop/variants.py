"""The paper's variants and baselines as settings of `GradDropConfig` (arXiv 2307.10098, sections III and IV)."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "GradDrop": {"granularity": "element", "interval": "step", "p": 0.2},
    "Layer-GradDrop": {"granularity": "layer", "interval": "step", "p": 0.2},
    "Anneal-GradDrop": {"granularity": "element", "interval": "step", "p": 0.9, "schedule": "linear"},
    "Anneal-Layer-GradDrop": {"granularity": "layer", "interval": "step", "p": 0.9, "schedule": "linear"},
    "GradDrop-Epoch": {"granularity": "element", "interval": "epoch", "selection": "without-replacement"},
    "GradDrop-Epoch-Toggle": {
        "granularity": "element",
        "interval": "epoch",
        "selection": "without-replacement",
        "toggle": True,
    },
    "GradDrop-Epoch-Reset": {"granularity": "element", "interval": "epoch", "p": 0.2},
    "GradFreeze-TopDown": {"granularity": "layer", "interval": "epoch", "selection": "top-down"},
    "GradFreeze-BottomUp": {"granularity": "layer", "interval": "epoch", "selection": "bottom-up"},
    "GradFreeze-Toggle-TopDown": {
        "granularity": "layer",
        "interval": "epoch",
        "selection": "top-down",
        "toggle": True,
    },
}
"""Settings by the name of the variant in the paper's tables.

Only GradDrop-Epoch-Reset is named here, because section III.B describes it without a name.
"""
