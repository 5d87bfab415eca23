"""Versions in the documents: those of the files that `make test` installs."""

from __future__ import annotations

import re

from documents import ROOT, Claim, Given

PACKAGES = ("torch", "PEFT", "transformers", "accelerate", "TRL")


def pins(package: str) -> list[str]:
    """The oldest and the newest version of a package that the tests run with."""
    files = [(ROOT / name).read_text("utf-8") for name in ("constraints-lowest.txt", "constraints.txt")]
    return [re.search(rf"^{package.lower()}==(\S+)", text, re.MULTILINE)[1] for text in files]


CLAIMS = [
    Claim("docs/troubleshooting.md", f"| {name} | {{}} | {{}} |", lambda name=name: pins(name)) for name in PACKAGES
]
GIVEN = [Given("docs/guides/many-gpus.md", "With a transformers before 5.2", "tests/versions.py")]
