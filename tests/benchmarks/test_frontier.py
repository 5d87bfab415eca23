"""The frontier's runner on tiny models: every method trains, and an interrupted run goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from frontier_files import write_files

from benchmarks.frontier.methods import METHODS, Method
from benchmarks.frontier.runs import Plan
from benchmarks.frontier.train import Workplace, attach, execute
from peft_sparsegrad import SparseGradConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("frontier"))


@pytest.fixture(scope="module")
def workplaces(folder) -> dict[str, Workplace]:
    models = {"smollm2": "llama", "cola": "bert"}
    return {task: Workplace(folder / model, folder, CPU, "float32") for task, model in models.items()}


def short(method: Method) -> Method:
    """A method whose warm-up and blocks suit models of 32 dimensions."""
    few = {"warmup_steps": 2} if method.config is SparseGradConfig else {}
    blocks = {"block_size": 16} if "block_size" in method.settings else {}
    return Method(**{**vars(method), "settings": {**method.settings, **few, **blocks}})


KINDS = {(method.family, tuple(method.settings)): name for name, method in METHODS.items()}.values()


@pytest.mark.parametrize(
    ("name", "task"), [(name, ("smollm2", "cola")[number % 2]) for number, name in enumerate(KINDS)]
)
def test_each_method_trains_its_own_values_and_the_head_alone(name, task, workplaces, monkeypatch):
    place = workplaces[task]
    monkeypatch.setitem(METHODS, name, short(METHODS[name]))
    run = Plan("m", (task,), (name,), (0,), steps=16, batch_size=2, precision="float32").run(task, name, 0, 1e-3)
    fresh, record = attach(place, run), execute(place, run)
    trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    assert record["trained_parameters"] + record["trained_head_parameters"] == trained
    assert (record["trained_head_parameters"] > 0) == (task == "cola")
    assert math.isfinite(record["score"])
    assert math.isfinite(record["search_score"])
    if name == "frozen":
        assert record["trained_parameters"] == 0
    else:
        assert record["after"]["search_loss"] != record["before"]["search_loss"]
    assert 0 <= record["warmup_passes"] < 16 == record["passes"]
