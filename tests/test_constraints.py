"""The lowest versions that `make test` installs are the lower bounds of pyproject.toml."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-lowest.txt").read_text("utf-8"), re.MULTILINE))
BOUNDS = {
    name: bound
    for line in re.findall(r"^(?:dependencies|quantization|train|deepspeed|plot|cli|examples|test) = \[(.*?)\]$",
                           (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for name, bound in re.findall(r'"([\w-]+)>=([\d.]+)', line)
}  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "peft", "transformers", "trl", "accelerate", "typer", "pytest"])
def test_bounds_are_read(name):
    assert name in BOUNDS


def test_lowest_versions_are_the_lower_bounds():
    assert {name: Version(PINS[name]) for name in BOUNDS} == {name: Version(bound) for name, bound in BOUNDS.items()}
    assert set(PINS) - set(BOUNDS) == {"pyarrow"}, "held back for the lowest NumPy"
