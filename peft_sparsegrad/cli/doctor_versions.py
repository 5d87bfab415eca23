"""Which of the installed packages ask for another version of one another, and what needs a newer one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# What the oldest versions that the package works with lack, most of it for LoRA too: the feature, and its requirement.
_NEWER = {
    "`torch.compile` of an adapted model in one graph": "torch>=2.7",
    "`torch.export` of an adapted model": "torch>=2.7",
    "FSDP2 on a CPU": "torch>=2.7",
    "FSDP2 with a base of another dtype than the adapter's": "torch>=2.8",
    "the experts' `grouped_mm`": "torch>=2.9",
    "DeepSpeed in the Trainer without a scheduler in its configuration": "transformers>=5.2",
    "resuming the Trainer on several CPU processes": "transformers>=5.20",
    "bitsandbytes' optimizers on a CPU": "bitsandbytes>=0.50",
}


def conflicts(names: Iterable[str]) -> list[str]:
    """Return what installed packages ask of each other and do not get, one sentence each.

    Args:
        names: Names of the packages to look at; those that are not installed are passed over.
    """
    installed = {name: found for name in names if (found := _version(name)) is not None}
    return [
        f"{name} {installed[name]} asks for {wanted.name}{wanted.specifier}, installed is {installed[wanted.name]}"
        for name in installed
        for wanted in _requirements(name)
        if wanted.name in installed and not wanted.specifier.contains(installed[wanted.name], prereleases=True)
    ]


def lacking() -> list[str]:
    """Return what needs newer versions than are installed, `"FSDP2 on a CPU (torch>=2.7)"`."""
    wanted = {feature: Requirement(line) for feature, line in _NEWER.items()}
    return [
        f"{feature} ({requirement})"
        for feature, requirement in wanted.items()
        if (found := _version(requirement.name)) is not None and not requirement.specifier.contains(found, True)
    ]


def _requirements(name: str) -> Iterator[Requirement]:
    """Yield what a package needs here, without what only its extras do."""
    for line in requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
