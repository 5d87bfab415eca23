"""Which of the installed packages ask for another version of one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


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
