"""A Trainer run that is killed again and again ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from fresh import Program
from killed_script import STEPS

SCRIPT = Path(__file__).with_name("killed_script.py")


def start(folder: Path, callback: bool) -> Program:
    return Program(SCRIPT, folder, *(["callback"] if callback else []))


def run_and_kill(folder: Path, callback: bool, chance: random.Random) -> None:
    """Kill a run some steps after it has begun, and a moment later than that: in a step or in a save."""
    program, steps = start(folder, callback), chance.randint(2, 7)
    while program.returncode is None and program.stdout.count("step ") < steps:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    program.kill()


@pytest.mark.parametrize(
    ("callback", "kills"),
    [(False, 1), pytest.param(False, 10, marks=pytest.mark.slow), pytest.param(True, 10, marks=pytest.mark.slow)],
)
def test_killed_run_is_the_uninterrupted_one(tmp_path, callback, kills):
    chance = random.Random(kills)
    assert start(tmp_path / "through", callback).wait() == 0
    for _ in range(kills):
        run_and_kill(tmp_path / "killed", callback, chance)
    assert start(tmp_path / "killed", callback).wait() == 0
    through, killed = (torch.load(tmp_path / name / "end.pt") for name in ("through", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in through.items())
    assert max(int(tensor) for name, tensor in through.items() if name.endswith(".steps")) > STEPS // 2
