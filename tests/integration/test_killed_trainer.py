"""A Trainer run that is killed again and again ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh import environment
from killed_script import STEPS

SCRIPT = Path(__file__).with_name("killed_script.py")
TESTS = Path(__file__).parent.parent


def start(folder: Path, callback: bool) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *(["callback"] if callback else [])]
    env = environment(PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def run_and_kill(folder: Path, callback: bool, chance: random.Random) -> None:
    """Kill a run some steps after it has begun, and a moment later than that: in a step or in a save."""
    process = start(folder, callback)
    assert process.stdout is not None
    for _ in range(chance.randint(2, 7)):
        if not process.stdout.readline():
            break
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


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
