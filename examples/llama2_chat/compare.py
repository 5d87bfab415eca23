"""Table 6 of the SparseGrad paper: fine-tune by several methods and seeds, and print what each has cost and brought.

    python -m examples.llama2_chat.compare --model PATH_OR_ID --data trees.jsonl --out outputs/table6

All other options are finetune.py's, and the same for all runs but for `--lora-rank`. A run has the folder
OUT/METHOD-SEED, and the same command again goes on where it was killed. What the answers are worth, generate.py and
judge.py find out for each folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from itertools import product
from pathlib import Path

from experiments.arguments import positive_int
from experiments.json_files import Record, read_json
from experiments.methods import METHODS
from experiments.tables import markdown_table
from experiments.terminal import run_and_exit
from experiments.text_files import make_folder, write_whole
from experiments.variant_options import check_settings_have_effect
from peft_sparsegrad.cli.errors import InputError

from .finetune import main as finetune
from .finetune_options import parse_args as parse_finetune
from .run_folder import METRICS_FILE

PAPER_METHODS = ["full", "lora", "paper", "meprop-paper"]
HEADER = ("method", "seeds", "trained", "of the model", "valid loss", "before", "s a step", "peak MB", "saved MB")


def main(argv: list[str] | None = None) -> int:
    args, of_runs = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare.py runs in one process: launch finetune.py on several, once for each method")
    runs = [(method, command_of(method, seed, args, of_runs)) for seed, method in product(args.seeds, args.methods)]
    for method, command in runs:
        check_settings_have_effect(parse_finetune(None, command), [method])  # now, and not after the first run
    for _, command in runs:
        finetune(command)
    table = make_table(args.methods, args.seeds, args.out)
    make_folder(args.out)
    write_whole(args.out / "table.md", table.encode())
    sys.stdout.write(table)
    return 0


def command_of(method: str, seed: int, args: argparse.Namespace, of_runs: list[str]) -> list[str]:
    """The options of finetune.py for a run."""
    rank = ["--lora-rank", str(args.lora_rank)] if method == "lora" else []
    folder = str(folder_of(args.out, method, seed))
    return [*of_runs, "--method", method, "--seed", str(seed), "--out", folder, *rank]


def make_table(methods: list[str], seeds: list[int], out: Path) -> str:
    """The table in Markdown, from the runs' metrics. Losses are nats: mean ± sample standard deviation over seeds."""
    rows = []
    for method in methods:
        found = [read_json(folder_of(out, method, seed) / METRICS_FILE) or {} for seed in seeds]
        rows.append([method, str(len(found)), *_cells(found)])
    return markdown_table(HEADER, rows) + "\n"


def _cells(found: list[Record]) -> list[str]:
    first = found[0]
    losses, before = ([run[f"validation_loss_{when}"] for run in found] for when in ("after", "before"))
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    seconds, peaks = ([run[name] for run in found if run[name]] for name in ("seconds_per_step", "peak_step_bytes"))
    return [
        f"{first['trainable_parameters']:,}",
        f"{first['trainable_parameters'] / first['model_parameters']:.2%}",
        f"{statistics.fmean(losses):.3f}{spread}",
        f"{statistics.fmean(before):.3f}",
        f"{statistics.median(seconds):.2f}" if seconds else "–",
        f"{max(peaks) / 1e6:,.0f}" if peaks else "–",
        f"{first['saved_bytes'] / 1e6:,.1f}",
    ]


def folder_of(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-{seed}"


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and those that every run gets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=PAPER_METHODS, help="(default: those of the paper)")
    add("--seeds", type=int, nargs="+", default=[0], help="a run of each method for each (%(default)s)")
    add("--lora-rank", type=positive_int, default=32, help="rank of LoRA (%(default)s, as in the paper)")
    add("--out", type=Path, default=Path("outputs/table6"), help="folder of the runs and of table.md (%(default)s)")
    args, of_runs = parser.parse_known_args(argv)
    if own := sorted({"--method", "--seed"}.intersection(of_runs)):
        parser.error(f"{own[0]} is set for each run: use {own[0]}s")
    return args, of_runs


if __name__ == "__main__":
    run_and_exit(main)
