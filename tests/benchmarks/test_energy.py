"""The energy benchmark: its shares against plain definitions, and the program on a tiny model."""

from __future__ import annotations

import pytest
import torch
from frontier_files import write_files

from benchmarks.energy import SIDES, WAYS, held_shares, main, observed_grams, table
from benchmarks.frontier.tasks import TASKS
from experiments.results import read_json_lines


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("energy"))


def gradients(blocks: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, 6, dtype=torch.float64)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64) * scale for _ in range(blocks)]


def test_shares_are_those_of_the_projected_gradients():
    """Each way's dimensions, written out; the share is ‖G P‖² / ‖G‖² for the projection P on them."""
    found, fresh = gradients(3, 0), gradients(3, 1)
    shares = held_shares([g.T @ g for g in found], [g.T @ g for g in fresh], 2)
    pooled = torch.cat([g / g.norm() for g in found])
    for number, gradient in enumerate(fresh):
        own = torch.linalg.svd(found[number]).Vh[:2].T
        columns = found[number].square().sum(0).topk(2).indices
        expected = [torch.linalg.svd(pooled).Vh[:2].T, own, torch.eye(6, dtype=torch.float64)[:, columns]]
        for way, basis in zip(WAYS, expected, strict=True):
            share = (gradient @ basis).norm() ** 2 / gradient.norm() ** 2
            assert shares[way][number] == pytest.approx(share.item(), abs=1e-5)


def test_sums_are_those_of_the_weights_gradients(files):
    task = TASKS["cola"](files / "bert", files)
    batches = task.batches(4, 2, seed=0)
    grams = observed_grams(task, batches)
    assert len(grams) == 2 * 2, "both layers of the MLP in two blocks, and not the attention's output"
    name, found = next(iter(grams.items()))
    weight = task.base.get_submodule(name).weight.requires_grad_(True)
    each = [torch.autograd.grad(task.loss(task.base, batch), weight)[0].double() for batch in batches]
    torch.testing.assert_close(found.output, sum(g @ g.T for g in each))
    torch.testing.assert_close(found.input, sum(g.T @ g for g in each))


@pytest.mark.parametrize(("task", "model"), [("cola", "bert"), ("smollm2", "llama")])
def test_program_writes_a_row_for_each_layer_and_side(files, tmp_path, capsys, task, model):
    out = tmp_path / "energy.jsonl"
    options = ["--task", task, "--model", str(files / model), "--data", str(files), "--out", str(out)]
    assert main([*options, "--find", "3", "--score", "1", "--batch-size", "2", "--rank-of", "4"]) == 0
    lines = read_json_lines(out)
    assert len(lines) == 2 * len(SIDES)
    for line in lines:
        assert line["n"] == 4 * line["r"]
        assert all(0 < line[way] <= 1 for way in WAYS)
    printed = capsys.readouterr().out
    assert printed.strip() == table(lines)
    assert main(["--out", str(out)]) == 0
    assert capsys.readouterr().out == printed, "without a task it prints the file alone"
