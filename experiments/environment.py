"""Where a benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("torch", "peft", "transformers")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Date, versions and hardware."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _cpu_model() -> str:
    """The model's name, which `platform` does not know on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
