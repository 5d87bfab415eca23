"""Figures of docs/results/comparison.md about the default settings."""

from __future__ import annotations

from statistics import fmean

from claims_comparison import by, claim
from documents import Given
from measured import STORIES, scores, seeds_ahead


def without(settings: str) -> float:
    """The dev loss by which the default is ahead of the same with other settings, on the seeds of both."""
    return by(STORIES, "sparsegrad", f"sparsegrad, {settings}", "ablation")


def on_shared_seeds() -> float:
    """The default's mean loss on seeds 0 to 2."""
    return fmean(loss for seed, loss in scores(STORIES, "sparsegrad", file="ablation").items() if seed < 3)


CLAIMS = [
    claim(
        "the default is at {:.4f}: renewing the support takes {:.3f} off the loss; 12 entries a value in place of 6 "
        "take off {:.3f}, of 3 {:.3f}; 24 would take off another {:.3f}",
        lambda: [
            on_shared_seeds(),
            *map(without, ("renewal_steps 0", "slack 6", "slack 3")),
            -without("slack 24"),
        ],
    ),
    claim("bases in place of one cost {:.3f}.", lambda: [without("rank 19")]),
    claim("in place of 8 take off {:.3f}", lambda: [without("warmup_steps 8")]),
    claim("as scores are level ({:.3f} apart)", lambda: [without("support_score energy")]),
    claim(
        "renewed) is ahead by {:.3f}, two full bases by {:.3f}, in {} seeds each.",
        lambda: [
            -without("basis identity"),
            -without("rank full"),
            *{
                seeds_ahead(STORIES, label, "sparsegrad", "ablation")
                for label in ("sparsegrad, basis identity", "sparsegrad, rank full")
            },
        ],
    ),
]
GIVEN: list[Given] = []
