"""The table of what each rank holds for a 7B model; `tests/distributed` measures it on two ranks."""

import sys

import pytest

from benchmarks.rank_memory import main


@pytest.fixture
def printed(monkeypatch, capsys):
    """Rows of the table by engine and number of ranks, each by its header."""

    def of(method):
        monkeypatch.setattr(sys, "argv", ["rank_memory", "--ranks", "8", "--method", method])
        main()
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
        return {tuple(row[:2]): dict(zip(lines[0], row, strict=True)) for row in lines[2:]}

    return of


def test_the_weights_of_a_7b_model_are_shared_by_the_ranks(printed):
    rows = printed("LoRA")
    parameters, trained = 6_738_415_616, 32 * 2 * 16 * (4096 + 11008)
    whole = rows["one process, DDP", "any"]
    assert whole["base"] == f"{2 * parameters / 2**30:.2f} GiB"
    assert whole["values"] == whole["gradients"] == f"{4 * trained / 2**20:.1f} MiB"
    assert whole["state"] == f"{8 * trained / 2**20:.1f} MiB"
    assert rows["ZeRO-2", "8"]["base"] == whole["base"]
    for engine in ("FSDP2", "ZeRO-3"):
        assert rows[engine, "8"]["base"] == f"{2 * parameters / 8 / 2**30:.2f} GiB"
        assert rows[engine, "8"]["state"] == f"{trained / 2**20:.1f} MiB"


def test_sums_and_supports_are_whole_on_every_rank(printed):
    rows = printed("SparseGrad")
    assert len(rows) == 5
    for row in rows.values():
        assert row["sums"] == row["pending"] == f"{32 * (168 * 11008 + 448 * 4096) * 4 / 2**20:.1f} MiB"
        assert row["bases"] == f"{(168 * 4096 + 448 * 11008) * 4 / 2**20:.1f} MiB"
    assert rows["FSDP2", "8"]["supports"] == rows["one process, DDP", "any"]["supports"]
