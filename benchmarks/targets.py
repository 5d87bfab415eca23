"""Targets of the measurements, and whether they are met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import contenders as c
from . import graddrop


@dataclass(frozen=True)
class Target:
    """A measurement and its limit.

    Attributes:
        subject: What was measured.
        measured: The value.
        limit: What it may at most be, or must at least be.
        at_least: Which of the two.
    """

    subject: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "met": self.met}


def targets_of(result: dict[str, Any]) -> list[Target]:
    """The targets that the parts of `result` which were run have something to say about."""
    found = []
    for family, batches in result.get("step", {}).items():
        if c.PAPER in batches["full batch"]:
            found += _step_targets(family, batches["full batch"])
    if "warmup" in result:
        found += _warmup_targets(result["warmup"]["methods"])
    for family, measured in result.get("graddrop", {}).items():
        found += _graddrop_targets(family, measured)
    return found


def _step_targets(family: str, measured: dict[str, dict[str, Any]]) -> list[Target]:
    ours, lora, paper = measured[c.STATIC], measured[c.LORA], measured[c.PAPER]
    time = ours["to_lora"]["median"]
    return [
        Target(f"{family}: step time / LoRA's", time, 1.0),
        Target(f"{family}: step time / LoRA's, the aim", time, 0.9),
        Target(f"{family}: step time of the paper's layer / ours", paper["to_sparsegrad"]["median"], 3.0, True),
        Target(f"{family}: bytes kept / LoRA's", ours["kept_bytes"] / lora["kept_bytes"], 0.85),
        Target(f"{family}: peak memory / LoRA's", ours["peak_bytes"] / lora["peak_bytes"], 1.0),
    ]


def _warmup_targets(methods: dict[str, dict[str, Any]]) -> list[Target]:
    found = []
    for name in ("exact", "sketch"):
        measured = methods[name]
        few, all_of_them = measured["held_bytes"].values()
        found += [
            Target(f"{name}: speed / stacked SVD's", measured["speed_ratio"], 15.0, True),
            Target(f"{name}: largest angle to its subspace", max(measured["angle_in"], measured["angle_out"]), 1e-3),
            Target(f"{name}: memory after all gradients / after few", all_of_them / few, 1.0),
        ]
    return found


def _graddrop_targets(family: str, measured: dict[str, dict[str, Any]]) -> list[Target]:
    found = []
    for name in graddrop.ELEMENTS:
        ratio = {other: measured[name][f"to_{other}"]["median"] for other in ("full", "off")}
        found.append(Target(f"{family}: step time of {name} / full fine-tuning's", ratio["full"], 1.05))
        found.append(Target(f"{family}: step time of {name} / that without masks", ratio["off"], 1.05))
    for name in graddrop.LAYERS:
        ratio = measured[name]["to_proportion"]["median"]
        found.append(Target(f"{family}: step time of {name} / what it skips in proportion", ratio, 1.05))
    return found
