"""How far the gradients of a real model's MLPs compress, and in which basis: the case for SparseGrad's bases.

Each row is the share of a fresh gradient's energy that r of the n dimensions of one side of a weight hold. The
dimensions are found from the gradients of some batches, in three ways, and scored on others; the share is the median
over blocks. By chance it is r / n.

    python -m benchmarks.energy --task cola --model FOLDER --data FOLDER --out docs/results/energy.jsonl
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.frontier.task import FrontierTask
from benchmarks.frontier.tasks import DEFAULTS, TASKS
from experiments.arguments import positive_int
from experiments.results import append_json_line, read_json_lines
from experiments.terminal import run_and_exit

MLP = re.compile(r"(\.|^)(up_proj|down_proj|intermediate\.dense|(?<!attention\.)output\.dense)$")
SIDES = {"output": 0, "input": 1}
WAYS = ("one HOSVD for all blocks", "HOSVD per block", "own coordinates per block")


class Grams(NamedTuple):
    """Sums of G Gᵀ and Gᵀ G over the gradients G (out, in) of several batches, float64."""

    output: torch.Tensor
    input: torch.Tensor


def observed_grams(task: FrontierTask, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, Grams]:
    """Return the sums of the MLP weights' gradients over batches, by module name."""
    model = task.base.eval()
    layers = {name: module for name, module in model.named_modules() if MLP.search(name)}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    grams: dict[str, Grams] = {}
    for batch in batches:
        task.loss(model, batch).backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad.double()
            output, given = gradient @ gradient.T, gradient.T @ gradient
            earlier = grams.get(name)
            grams[name] = Grams(output, given) if earlier is None else Grams(earlier[0] + output, earlier[1] + given)
            layer.weight.grad = None
    return grams


def held_shares(found: Sequence[torch.Tensor], fresh: Sequence[torch.Tensor], rank: int) -> dict[str, list[float]]:
    """Return the share of each block's fresh energy in the dimensions that each way finds.

    Args:
        found: Gram matrix (n, n) of each block, of the batches that the dimensions are found from.
        fresh: Gram matrix (n, n) of each block, of other batches.
        rank: Number of dimensions.
    """
    shared = _largest(torch.stack([gram / gram.trace() for gram in found]).sum(0), rank)
    bases = {
        WAYS[0]: [shared for _ in found],
        WAYS[1]: [_largest(gram, rank) for gram in found],
        WAYS[2]: [_coordinates(gram, rank) for gram in found],
    }
    return {
        way: [float((basis.T @ gram @ basis).trace() / gram.trace()) for basis, gram in zip(each, fresh, strict=True)]
        for way, each in bases.items()
    }


def _largest(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the eigenvectors (n, rank) of the largest eigenvalues."""
    return torch.linalg.eigh(gram.float()).eigenvectors[:, -rank:].to(gram)


def _coordinates(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the columns (n, rank) of the identity where the diagonal is largest."""
    return torch.eye(len(gram), dtype=gram.dtype)[:, gram.diagonal().topk(rank).indices]


def rows(found: dict[str, Grams], fresh: dict[str, Grams], rank_of: int) -> list[dict[str, Any]]:
    """Return a row for each layer of a block and each side, with r a `rank_of`-th of the side's dimensions."""
    roles: dict[str, list[str]] = {}
    for name in found:
        roles.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    result = []
    for role, names in roles.items():
        for side, number in SIDES.items():
            size = len(found[names[0]][number])
            rank = max(1, size // rank_of)
            shares = held_shares(
                [found[name][number] for name in names], [fresh[name][number] for name in names], rank
            )
            medians = {way: round(statistics.median(each), 4) for way, each in shares.items()}
            result.append({"layer": role, "side": side, "r": rank, "n": size, "blocks": len(names), **medians})
    return result


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ["model", "task", "layer", "side", "r of n", "chance", *WAYS]
    text = [f"| {' | '.join(head)} |", f"|{' --- |' * 4}{' ---: |' * (len(head) - 4)}"]
    for line in lines:
        layer = line["layer"].rpartition("*.")[2]
        shares = [line["r"] / line["n"], *(line[way] for way in WAYS)]
        cells = [line["model"], line["task"], f"`{layer}`", line["side"], f"{line['r']} of {line['n']}"]
        text.append(f"| {' | '.join([*cells, *(f'{share:.2f}' for share in shares)])} |")
    return "\n".join(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description="How far gradients compress.")
    add = parser.add_argument
    add("--task", choices=TASKS, help="whose loss is taken")
    add("--model", type=Path, help="folder of the checkpoint and its tokenizer")
    add("--data", type=Path, help="folder with cola/, stsb/, oasst/ and ud/")
    add("--out", type=Path, required=True, metavar="FILE", help="file to which lines are added, and that is printed")
    add("--find", type=positive_int, default=8, help="batches to find the dimensions from (default: %(default)s)")
    add("--score", type=positive_int, default=2, help="other batches to score them on (default: %(default)s)")
    add("--batch-size", type=positive_int, help="default: the task's")
    add("--rank-of", type=positive_int, default=8, help="r is this part of a side's n (default: an eighth)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure if a task is given, and print the table of the file."""
    given = parse_arguments(arguments)
    if given.task is not None:
        task = TASKS[given.task](given.model, given.data)
        task.settle(task.base, seed=0)
        size, count = given.batch_size or DEFAULTS[given.task][0], given.find + given.score
        batches = task.batches(size, count, seed=0)
        found, fresh = (observed_grams(task, each) for each in (batches[: given.find], batches[given.find :]))
        setting = {"model": given.model.resolve().name, "task": given.task, "find": given.find, "score": given.score}
        for row in rows(found, fresh, given.rank_of):
            append_json_line(given.out, {**setting, "batch_size": size, **row})
    print(table(read_json_lines(given.out)))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
