"""Deep models: a line for each role, and with `--all` one for each layer."""

import pytest
from tiny import adapted, llama

from peft_sparsegrad.cli.folding import folded

BLOCKS = 9  # with two layers each


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    base = llama(num_hidden_layers=BLOCKS, hidden_size=16, intermediate_size=32)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    adapted(base, init_weights=False).save_pretrained(folder / "adapter")
    return folder


def test_rows_of_a_role_become_one_with_ranges():
    rows = [("layers.0.up", "1,000", "5.0%", None), ("head", "7", "1%", 3), ("layers.1.up", "900", "5.0%", 2)]
    assert folded(rows) == [("layers.*.up (2)", "900 to 1,000", "5.0%", None), ("head", "7", "1%", 3)]


@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_a_deep_model_has_a_line_for_each_role(command, deep, verb, tmp_path):
    words = [verb, deep / "adapter"]
    words += ["--to", "dense", "--out", tmp_path / "delta.safetensors", "--overwrite"] * (verb == "convert")
    short, long = command(*words).out, command(*words, "--all").out
    for role in ("up_proj", "down_proj"):
        assert short.count(f"model.layers.*.mlp.{role} ({BLOCKS})") == 1
        assert f"model.layers.5.mlp.{role}" not in short
        assert all(f"model.layers.{block}.mlp.{role}" in long for block in range(BLOCKS))
    assert "--all" in short


def test_inspect_says_what_loading_needs(command, deep):
    assert "import peft_sparsegrad" in command("inspect", deep / "adapter").out
