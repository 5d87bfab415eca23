"""The GPU benchmark, `python -m benchmarks.gpu`, on the CPU with tiny models."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import fork_server

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import measure
from benchmarks.gpu.settings import CONTENDERS, SMALL_SETTINGS
from peft_sparsegrad.cli.errors import InputError

FEW = ["frozen", "sparsegrad", "lora r=16"]
MLP = 2 * 2 * 64 * 256


def bench(out: Path, *options: str, contenders: list[str] = FEW) -> int:
    fork_server()  # before the benchmark starts its own: a process has only one, and the tests' lacks the package
    small = ["--device", "cpu", "--small", "--rounds", "2", "--json", str(out)]
    return program.main([*small, "--contenders", *contenders, *options])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The file of a run on the LLaMA shape."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert bench(out, "--shapes", "llama") == 0
    return out


def copied(measured: Path, folder: Path, **parts) -> Path:
    out = folder / "gpu.json"
    out.write_text(json.dumps({**json.loads(measured.read_text()), **parts}))
    return out


def test_every_row_has_times_bytes_and_values(measured):
    result = json.loads(measured.read_text())
    rows = {(row["contender"], row["tokens"]): row for row in result["rows"]}
    assert set(rows) == {(name, tokens) for name in FEW for tokens in SMALL_SETTINGS["llama"].tokens}
    assert {"date", "device", "torch", "peft", "transformers"} <= set(result["environment"])
    for (name, tokens), row in rows.items():
        assert row["weights"] == "torch.bfloat16"
        assert len(row["ms"]) == 2
        assert min(row["ms"]) <= row["median_ms"] <= max(row["ms"])
        assert 0 < row["kept_bytes"] < row["peak_bytes"]
        assert row["resident_bytes"] < row["peak_bytes"]
        assert (row["warmup_in_steps"] is not None) == (name == "sparsegrad"), "the only one that has a warm-up here"
        lora = rows["lora r=16", tokens]
        assert rows["frozen", tokens]["kept_bytes"] < row["kept_bytes"] or name == "frozen"
        assert row["trained"] <= lora["trained"] == 2 * 2 * 16 * (64 + 256)
    assert rows["frozen", 32]["file_bytes"] == 0
    assert rows["sparsegrad", 32]["trained"] == pytest.approx(0.01 * MLP, rel=0.01)
    assert rows["lora r=16", 32]["file_bytes"] > 4 * rows["lora r=16", 32]["trained"]


def test_a_second_run_measures_only_what_is_missing(measured, tmp_path, capsys):
    rows = json.loads(measured.read_text())["rows"]
    out = copied(measured, tmp_path, rows=rows[:-1])
    assert bench(out, "--shapes", "llama") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" ms")]
    last = rows[-1]["contender"]
    assert [line.split(",")[1].strip() for line in printed] == [last, last]
    again = json.loads(out.read_text())["rows"]
    assert again[: len(rows) - 2] == rows[:-2]
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]


class Deadly:
    """What ends the process that a setting with it is sent to."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokens": (32, 0)}, "[A-Z][A-Za-z]+Error: .+"),
        ({"weights": Deadly()}, "its process ended with exit code 3"),
    ],
)
def test_a_contender_that_fails_or_dies_leaves_the_others_their_turn(tmp_path, monkeypatch, capsys, settings, reason):
    out, llama = tmp_path / "gpu.json", SMALL_SETTINGS["llama"]
    monkeypatch.setitem(SMALL_SETTINGS, "llama", replace(llama, **settings))
    assert bench(out, "--shapes", "llama", "bert", contenders=["frozen"]) == 1
    result = json.loads(out.read_text())
    before = [("llama", 32)] if "tokens" in settings else []
    assert [(row["shape"], row["tokens"]) for row in result["rows"]] == [*before, ("bert", 32), ("bert", 64)]
    assert list(result["failed"]) == ["llama, frozen"]
    assert re.fullmatch(reason, result["failed"]["llama, frozen"], re.DOTALL)
    assert f"llama, frozen: failed: {result['failed']['llama, frozen']}" in capsys.readouterr().out
    monkeypatch.setitem(SMALL_SETTINGS, "llama", llama)
    assert bench(out, "--shapes", "llama", "bert", contenders=["frozen"]) == 0
    assert json.loads(out.read_text())["failed"] == {}


def test_nothing_begins_that_would_end_too_late(tmp_path, capsys):
    assert bench(tmp_path / "gpu.json", "--minutes", "0") == 0
    assert capsys.readouterr().out.count("left out") == 2 * len(FEW)


def test_rows_of_other_versions_are_not_mixed_in(measured, tmp_path):
    environment = {**json.loads(measured.read_text())["environment"], "torch": "1.0"}
    out = copied(measured, tmp_path, environment=environment)
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"torch '1\.0'.*another file"):
        bench(out, "--shapes", "llama")
    assert out.read_bytes() == before


def test_the_table_has_ratios_to_lora(measured, capsys):
    assert program.main(["--table", str(measured)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(measured.read_text())
    assert f"{result['environment']['date'][:10]}, cpu, torch " in printed
    of = {row["contender"]: row for row in result["rows"] if row["tokens"] == 64}
    row, lora = of["sparsegrad"], of["lora r=16"]
    line = next(row for row in printed.splitlines()[::-1] if row.startswith("| sparsegrad"))
    cells = [f"{row['trained']:,}", f"{row['median_ms']:.1f} ms", f"{row['median_ms'] / lora['median_ms']:.2f}"]
    assert f"| {' | '.join(cells)} |" in line
    least, most = sorted(row["ms"])
    quartiles = f"{(3 * least + most) / 4:.1f} to {(least + 3 * most) / 4:.1f} ms"
    assert f"| {quartiles} | {least:.1f} ms | {least / min(lora['ms']):.2f} |" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that no CUDA device is here")
def test_without_the_device_or_the_file_a_sentence_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="--device cuda:0: try `--device cpu --small`"):
        program.main(["--device", "cuda:0", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(InputError, match="--table takes one"):
        program.main(["--table", str(tmp_path / "missing.json")])


@pytest.mark.slow
def test_every_contender_runs_on_both_shapes(tmp_path):
    out = tmp_path / "gpu.json"
    assert bench(out, contenders=list(CONTENDERS)) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(CONTENDERS)
    dense = {row["contender"] for row in rows if row["shape"] == "llama" and row["trained"] == MLP}
    assert dense == {"full", "graddrop", "paper"}
    assert all(row["file_bytes"] is not None for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_on_a_gpu_are_those_of_its_work():
    """Ten times the work takes longer, which the time of launching it does not tell."""
    a = torch.randn(8192, 8192, device="cuda:0")
    times = [measure.step_milliseconds(lambda n=n: [a @ a for _ in range(n)], a.device, 3) for n in (1, 10)]
    assert min(times[1]) > 5 * max(times[0])
