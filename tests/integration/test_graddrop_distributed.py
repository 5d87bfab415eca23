"""GradDrop in two processes under torchrun with gloo against one process on the same global batches.

One start of torchrun serves all cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import environment

sys.path.insert(0, str(Path(__file__).parent))
import graddrop_ddp_script

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # `tests/distributed/test_engines.py` has GradDrop under DDP in every run
CASES = graddrop_ddp_script.CASES
STEPS = graddrop_ddp_script.EPOCHS * graddrop_ddp_script.STEPS_IN_EPOCH


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ranks") / "out")
    env = environment(PYTHONPATH=os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]))
    env["OMP_NUM_THREADS"] = "1"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(HERE / "graddrop_ddp_script.py"), out]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_does(ranks, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = graddrop_ddp_script.run(case)
    first, second = (rank[case] for rank in ranks)
    for name, value in first["trained"].items():
        assert torch.equal(value, second["trained"][name]), f"the ranks disagree on {name}"
    far = {n: (p - one["trained"][n]).abs().max().item() for n, p in first["trained"].items()}
    assert max(far.values()) < 1e-5, max(far.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_is_masked_and_counts_the_steps(ranks, case):
    _, variant, overrides, *_ = CASES[case]
    for rank in ranks:
        result = rank[case]
        assert result["steps"] == list(range(STEPS))
        if overrides.get("frozen") == "gradient" or (variant == "GradDrop" and "frozen" not in overrides):
            continue  # momentum and weight decay move what is masked
        assert result["escaped"] == 0
        for moved, kept in result["shares"]:
            assert 0.9 * kept <= moved <= kept


def test_layers_are_masked_in_some_steps_all_together(ranks):
    """Else the cases would not show what DDP makes of a step without any gradient."""
    for case, (_, variant, *_) in CASES.items():
        if variant == "Layer-GradDrop":
            assert ranks[0][case]["masked_layers"] >= 1
            assert len({kept for _, kept in ranks[0][case]["shares"]}) > 2
