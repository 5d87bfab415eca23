"""compare.py: the runs of Table 6 and their table, on a tiny model."""

from __future__ import annotations

import pytest
from llama2_chat_runs import read_metrics

from examples.llama2_chat.compare import HEADER, PAPER_METHODS, main
from peft_sparsegrad.cli.errors import InputError

SMALL = ("--base", "float32", "--max-length", "128", "--num-values", "80", "--warmup-steps", "2", "--batch-size", "4")


def command(base, data, out, *further: str) -> list[str]:
    return ["--model", str(base), "--data", str(data), "--out", str(out), "--steps", "2", *SMALL, *further]


def test_the_rows_of_table_6(base, data, tmp_path, capsys):
    """The published methods hold whole cores, of which a step moves 80 values a layer."""
    line = command(base, data, tmp_path, "--lora-rank", "3", "--every", "2")
    assert main(line) == 0
    table = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in (tmp_path / "table.md").open()]
    assert table[0] == list(HEADER)
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in table[2:]}
    assert list(rows) == PAPER_METHODS
    layers = read_metrics(tmp_path / "full-0")["trainable_parameters"] // (64 * 128)
    assert rows["lora"]["trained"] == f"{layers * 3 * (64 + 128):,}"
    assert rows["paper"]["trained"] == rows["meprop-paper"]["trained"] == rows["full"]["trained"]
    for method, row in rows.items():
        found = read_metrics(tmp_path / f"{method}-0")
        assert row["valid loss"] == f"{found['validation_loss_after']:.3f}"
        assert found["peak_step_bytes"] > 4 * found["model_parameters"]
        moments = 2 * 4 * found["trainable_parameters"]
        assert moments <= found["optimizer_bytes"] < 1.1 * moments
    capsys.readouterr()
    assert main(line) == 0
    assert capsys.readouterr().out.count("finished already") == 4


def test_options_that_every_run_sets_itself_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--method", "lora"])
    assert "use --methods" in capsys.readouterr().err


def test_settings_that_concern_another_method_are_refused(base, data, tmp_path):
    with pytest.raises(InputError, match=r"`rank` is a setting of sparsegrad, .* none runs"):
        main(command(base, data, tmp_path, "--methods", "paper", "lora", "--rank", "full"))
    assert not list(tmp_path.iterdir()), "before the first run"


def test_several_processes_are_refused(base, data, tmp_path, monkeypatch):
    """A run ends the processes' group, and the next could not join it again."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"launch finetune.py on several"):
        main(command(base, data, tmp_path))
    assert not list(tmp_path.iterdir())
