"""The table of what works: it is in the documentation, and its cells are what the attempts give today."""

import json
from pathlib import Path

import pytest

from benchmarks.features.__main__ import METHODS, attempt, table
from benchmarks.features.attempts import FEATURES

ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "docs/results/features.json").read_text("utf-8"))["cells"]


def test_documentation_has_the_table():
    assert table(CELLS) in (ROOT / "docs/guides/from-lora.md").read_text("utf-8")


def test_every_feature_and_method_has_a_cell():
    assert {name: list(row) for name, row in CELLS.items()} == {key: list(METHODS) for key in FEATURES}


def test_an_attempt_that_gives_wrong_outputs_or_raises_is_no_yes():
    assert attempt(FEATURES["`adapter_names` in one batch"], METHODS["C3A"]) == "wrong outputs, no word"
    assert attempt(FEATURES["`hotswap_adapter`"], METHODS["SparseGrad"]) == "no: ValueError"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("feature", FEATURES)
def test_cells_are_what_the_attempts_give(feature, method):
    assert attempt(FEATURES[feature], METHODS[method]) == CELLS[feature][method]
