"""The tables of docs/guides/rank-memory.md are what `python -m benchmarks.rank_memory` prints."""

import pytest
import torch
from documents import text
from peft import PeftModel, get_peft_model

from benchmarks.rank_memory import ENGINES, METHODS, WHOLE, count, llama_7b, table

PAGE = "docs/guides/rank-memory.md"
pytestmark = pytest.mark.slow


def model_with(method: str) -> PeftModel:
    """LLaMA-2 7B with an adapter, on the meta device."""
    with torch.device("meta"):
        return get_peft_model(llama_7b(), METHODS[method]())  # pyright: ignore


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_each_rank(method):
    assert f"## {method} {' '.join(table(model_with(method), ENGINES, [2, 8]).split())}" in text(PAGE)


def test_memory_that_no_engine_shares_out():
    held = count(model_with("SparseGrad"), WHOLE, 1).bytes()
    core = held["sums"] + held["pending"]
    whole = core + held["bases"] + held["supports"]
    assert f"{whole / 2**30:.1f} GiB for a 7B model, of which {core / 2**30:.1f} GiB are" in text(PAGE)
    assert f"keeps {whole / 2**30:.1f} GiB of a 7B model" in text("docs/guides/many-gpus.md")
