"""The command line of finetune.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.arguments import positive_float, positive_int, share
from experiments.methods import METHODS
from experiments.variant_options import add_variant_options

from .load_model import PRECISIONS, is_quantized


def parse_args(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data(parser)
    _add_method(parser)
    _add_training(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    if args.method == "full" and is_quantized(args.base):
        parser.error(f"--method full cannot train quantised weights: use --base bf16, not {args.base}")
    return args


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="chat model: a folder or a hub id (%(default)s)")
    add("--base", choices=PRECISIONS, default="bf16", help="precision of the frozen weights (%(default)s)")
    add("--data", default="OpenAssistant/oasst1", help="a .jsonl file of conversations or a hub id (%(default)s)")
    add("--language", default="en", help="of OpenAssistant's messages; `all` for every language (%(default)s)")
    add("--eval-share", type=share, default=0.05, help="share of the conversations for validation (%(default)s)")
    add("--max-length", type=positive_int, default=1024, help="tokens kept of a conversation (%(default)s)")
    add("--chat-template", type=Path, help="Jinja file (default: the tokenizer's own, else Llama 2's)")


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=list(METHODS), default="sparsegrad", help="way of fine-tuning (%(default)s)")
    add_variant_options(add)
    add(
        "--target-modules",
        nargs="+",
        default=["up_proj", "down_proj"],
        help="names of the linear layers to adapt (up_proj down_proj, as in the paper)",
    )
    add("--every", type=positive_int, default=3, help="adapt every so many blocks, from block 0 (%(default)s)")
    add("--num-values", type=positive_int, default=100_000, help="trained values in each layer (%(default)s)")
    add("--density", type=share, help="trained share of each layer, in place of --num-values (default: none)")
    add("--warmup-steps", type=positive_int, default=8, help="batches of SparseGrad's warm-up (%(default)s)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=positive_float, default=9e-4, help="learning rate, which falls as a cosine (%(default)s)")
    add("--epochs", type=positive_float, default=1.0, help="passes over the data (%(default)s)")
    add("--steps", type=positive_int, help="optimizer steps, in place of --epochs (default: none)")
    add("--batch-size", type=positive_int, default=4, help="conversations on a device at a time (%(default)s)")
    add("--accumulate", type=positive_int, default=1, help="batches in an optimizer step (%(default)s)")
    add("--gradient-checkpointing", action="store_true", help="less memory for slower steps (default: off)")
    add("--seed", type=int, default=0, help="of the split, the order and the adapter (%(default)s)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("outputs/llama2_chat"), help="folder of the run (%(default)s)")
    add("--save-steps", type=positive_int, default=100, help="steps between checkpoints (%(default)s)")
    add("--logging-steps", type=positive_int, default=10, help="steps between lines of the log (%(default)s)")
    add("--report-to", nargs="+", default=[], help="trackers, e.g. tensorboard wandb trackio (default: none)")
    add("--overwrite", action="store_true", help="delete the run in --out and start anew (default: resume it)")
