"""`python -m benchmarks`, on a batch too small to say anything of times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, to: Path) -> tuple[dict, str]:
    words = [sys.executable, "-m", "benchmarks", *arguments, "--rounds", "1", "--batch-size", "1", "--json", str(to)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(to.read_text()), done.stdout


@pytest.mark.slow
def test_both_ways_of_computing_a_layer_are_timed_side_by_side(tmp_path):
    result, printed = run("--contenders", "two-ways", "--shapes", "llama", to=tmp_path / "bench.json")
    measured = result["step"]["llama"]["full batch"]
    assert result["settings"]["shapes"]["llama"]["batch"] == 1
    assert measured["lora"]["to_lora"] == {"min": 1, "median": 1, "max": 1}
    for name in ("sparsegrad", "meprop"):
        ours, other = measured[name], measured[f"{name}, delta on the output"]
        assert ours["trained"] == other["trained"]
        assert ours["kept_bytes"] == other["kept_bytes"], "the written-out weight is not kept for the backward pass"
        assert ours["resident_bytes"] == other["resident_bytes"]
    rows = [line for line in printed.splitlines() if "delta on the output" in line]
    assert len(rows) == 2
    assert all("…" not in row for row in rows), "nothing is cut off where no terminal is"
