"""Two processes under torchrun with gloo against one process on the same global batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import environment

sys.path.insert(0, str(Path(__file__).parent))
from ddp_script import RUNS

HERE = Path(__file__).parent


def on_two_ranks(*arguments: str) -> None:
    env = environment(PYTHONPATH=os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]))
    env["OMP_NUM_THREADS"] = "1"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(HERE / "ddp_script.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("loop", "explicit"),
        ("loop", "observed"),
        ("loop", "renewing"),
        ("trainer", "observed"),
        ("trainer", "callback"),
        ("trainer", "renewing"),
    ],
)
def test_two_ranks_train_the_same_adapter_as_one(tmp_path, kind, how):
    RUNS[kind](how, str(tmp_path / "1"))
    on_two_ranks(kind, how, str(tmp_path / "2"))
    one, first, second = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), f"the ranks disagree on {key}"
    if how == "renewing":
        counted = {int(value) for key, value in one["state"].items() if key.endswith(".steps")}
        assert counted == {6}, "both renewals lie within the run"
    for name, delta in one["deltas"].items():
        assert torch.equal(first["supports"][name], one["supports"][name])
        assert delta.abs().max() > 1e-3
        assert torch.allclose(first["deltas"][name], delta, atol=1e-5), (first["deltas"][name] - delta).abs().max()
