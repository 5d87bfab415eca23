"""SparseGrad and LoRA side by side on a causal language model, with the same number of trainable parameters.

    python -m examples.quickstart

needs no network and less than three minutes on two CPU cores. It trains a small LLaMA on the docstrings of the
standard library, adapts it to the standard library's source code, loads the adapter in a fresh process and merges it.
With a checkpoint and a text of your own:

    python -m examples.quickstart --model PATH_OR_ID --data FILE

The small LLaMA, of a few million parameters, takes a learning rate of 4e-2. From a hundred million on begin with 1e-3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

import peft_sparsegrad
from experiments.arguments import positive_float, positive_int, share
from experiments.attachment import density_of_lora
from experiments.loading import DEVICE, load_pretrained
from experiments.methods import METHODS
from experiments.terminal import heading, run_and_exit, show, show_lines, show_table
from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.cli.data import read_texts
from peft_sparsegrad.cli.errors import InputError

from ._small_llama import new_small_llama, train_tokenizer
from ._text import draw_batches, split_into_blocks, standard_library_code, standard_library_docstrings

Batch = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """Result of adapting the model with one method."""

    trainable: int
    lr: float
    before: float
    after: float
    seconds_per_step: float
    adapter_bytes: int


def main() -> int:
    args = parse_args()
    if args.evaluate is not None:
        print(json.dumps(evaluate_saved(args.evaluate, args.dtype)))
        return 0
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        read_texts(args.data)  # a file that cannot be read is better known before a model is trained
    args.model = args.model or train_base_model(args)
    batches, held_out = prepare_data(args)
    sparsegrad, lora = adapt_with_both(args, batches, held_out)
    print_comparison(sparsegrad, lora)
    correct = check_in_fresh_process(args, sparsegrad.after)
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s; the adapters are in {args.out}")
    return 0 if correct else 1


def train_base_model(args: argparse.Namespace) -> str:
    """Train a small LLaMA on English prose. Returns the folder that it is in."""
    heading("A base model: a small LLaMA learns the docstrings of the standard library")
    documents = standard_library_docstrings()
    tokenizer = train_tokenizer(documents)
    training, held_out = split_into_blocks(documents, tokenizer, args.block_length, args.seed)
    torch.manual_seed(args.seed)
    model: Any = new_small_llama(tokenizer)
    model.to(DEVICE)
    show("parameters", f"{model.num_parameters():,}")
    show("training text", f"{training.numel():,} tokens in {len(documents):,} docstrings")
    untrained = evaluate(model, held_out)
    seconds = train(model, draw_batches(training, args.base_steps, 8, args.seed), lr=2e-3)
    show("held-out loss", f"{untrained:.3f} -> {evaluate(model, held_out):.3f}")
    show("training", f"{args.base_steps} steps, {seconds:.3f} seconds per step")
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    return str(args.out / "base")


def prepare_data(args: argparse.Namespace) -> tuple[list[Batch], torch.Tensor]:
    """The batches to train on, and the held-out blocks, which are left in a file for the fresh process."""
    heading(f"A new kind of text: {args.data or 'source code of the standard library'}")
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    documents = read_texts(args.data, tokenizer) if args.data else standard_library_code()
    training, held_out = split_into_blocks(documents, tokenizer, args.block_length, args.seed)
    show("training text", f"{training.numel():,} tokens in {len(documents):,} documents")
    show("held-out text", f"{held_out.numel():,} tokens")
    show("steps", f"{args.steps} of {args.batch_size} x {args.block_length} tokens, the same for both methods")
    torch.save(held_out, args.out / "held_out.pt")
    return draw_batches(training, args.steps, args.batch_size, args.seed), held_out


def adapt_with_both(args: argparse.Namespace, batches: list[Batch], held_out: torch.Tensor) -> tuple[Outcome, Outcome]:
    density = density_of_lora(load_model(args.model, args.dtype), args.target_modules, args.density)
    first = batches[: args.warmup_batches]

    def with_sparsegrad(model: Any) -> Any:
        config = SparseGradConfig(density=density, target_modules=args.target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        report = peft_sparsegrad.warmup(model, first, steps=len(first), progress=sys.stderr.isatty())
        show_lines(f"warm-up: {report}")
        return model

    def with_lora(model: Any) -> Any:
        return METHODS["lora"].attach(model, args.target_modules, density, task_type="CAUSAL_LM")

    heading("SparseGrad")
    sparsegrad = adapt(args, "sparsegrad", with_sparsegrad, args.lr, batches, held_out)
    heading("LoRA")
    return sparsegrad, adapt(args, "lora", with_lora, args.lora_lr, batches, held_out)


def adapt(
    args: argparse.Namespace,
    name: str,
    attach: Callable[[Any], Any],
    lr: float,
    batches: list[Batch],
    held_out: torch.Tensor,
) -> Outcome:
    """Adapt a fresh copy of the base model with one method, and save the adapter."""
    torch.manual_seed(args.seed)
    base = load_model(args.model, args.dtype)
    before = evaluate(base, held_out)
    model = attach(base)
    trainable, total = model.get_nb_trainable_parameters()
    show("trainable parameters", f"{trainable:,} of {total:,}")
    seconds = train(model, batches, lr)
    after = evaluate(model, held_out)
    show("held-out loss", f"{before:.3f} -> {after:.3f}")
    model.save_pretrained(args.out / name)
    adapter_bytes = (args.out / name / "adapter_model.safetensors").stat().st_size
    return Outcome(trainable, lr, before, after, seconds, adapter_bytes)


def train(model: Any, batches: list[Batch], lr: float) -> float:
    """Train whatever requires a gradient. Returns the median of the seconds per step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95))
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    seconds = []
    model.train()
    for batch in (bar := tqdm(batches, desc="training", leave=False, disable=None)):
        started = time.perf_counter()
        loss = model(**{key: tensor.to(DEVICE) for key, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.no_grad()
def evaluate(model: Any, blocks: torch.Tensor) -> float:
    """Mean loss over blocks of tokens."""
    model.eval()
    chunks = [chunk.to(DEVICE) for chunk in blocks.split(8)]
    return sum(model(input_ids=chunk, labels=chunk).loss.item() * len(chunk) for chunk in chunks) / len(blocks)


def print_comparison(*outcomes: Outcome) -> None:
    heading("Side by side")
    rows = [
        ("trainable parameters", [f"{outcome.trainable:,}" for outcome in outcomes]),
        ("learning rate", [f"{outcome.lr:g}" for outcome in outcomes]),
        ("held-out loss before", [f"{outcome.before:.3f}" for outcome in outcomes]),
        ("held-out loss after", [f"{outcome.after:.3f}" for outcome in outcomes]),
        ("seconds per step", [f"{outcome.seconds_per_step:.3f}" for outcome in outcomes]),
        ("adapter file, bytes", [f"{outcome.adapter_bytes:,}" for outcome in outcomes]),
    ]
    show_table([("", ["SparseGrad", "LoRA"]), *rows])
    print("  (SparseGrad's file also holds the transition matrices, once for all blocks)")


def check_in_fresh_process(args: argparse.Namespace, loss: float) -> bool:
    """Start this script anew with `--evaluate`, and compare the losses found there with the one found here."""
    heading("The SparseGrad adapter in a fresh process")
    show("held-out loss here", f"{loss:.6f}")
    program = [sys.executable, "-m", "examples.quickstart"]
    command = [*program, "--evaluate", str(args.out / "sparsegrad"), "--dtype", args.dtype]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    tolerances = {"loaded": 1e-5, "merged": 1e-4} if args.dtype == "float32" else {"loaded": 1e-2, "merged": 5e-2}
    correct = True
    for name, tolerance in tolerances.items():
        difference = abs(found[name] - loss)
        verdict = "the same" if difference <= tolerance else f"NOT THE SAME within {tolerance:g}"
        show(f"{name} there", f"{found[name]:.6f}   differs by {difference:.0e}: {verdict}")
        correct = correct and difference <= tolerance
    return correct


def evaluate_saved(adapter: Path, dtype: str) -> dict[str, float]:
    """Held-out loss of the base model with a saved adapter, and of the model that the two are merged into."""
    try:
        held_out = torch.load(adapter.parent / "held_out.pt")
    except OSError as error:
        raise InputError(f"{adapter} is no adapter of this script: {error}") from error
    config = load_pretrained(SparseGradConfig, adapter)
    model = PeftModel.from_pretrained(load_model(config.base_model_name_or_path, dtype), adapter)
    loaded = evaluate(model, held_out)
    return {"loaded": loaded, "merged": evaluate(model.merge_and_unload(), held_out)}


def load_model(path: str, dtype: str) -> Any:
    return load_pretrained(AutoModelForCausalLM, path, dtype=dtype).to(DEVICE)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint to adapt, a folder or a hub id (default: train a small LLaMA first)")
    add("--data", type=Path, help=".txt, or .jsonl with text, messages, or instruction and output")
    add("--steps", type=positive_int, default=120, help="training steps of each method (%(default)s)")
    add("--base-steps", type=positive_int, default=400, help="training steps of the small LLaMA (%(default)s)")
    add("--batch-size", type=positive_int, default=8, help="blocks in a batch (%(default)s)")
    add("--block-length", type=positive_int, default=128, help="tokens in a block (%(default)s)")
    add("--density", type=share, default=0.01, help="share of each weight that trains (%(default)s)")
    add("--lr", type=positive_float, help="SparseGrad's learning rate (0.001 with --model; 0.04 for the small LLaMA)")
    add("--lora-lr", type=positive_float, help="LoRA's learning rate (0.001 with --model; 0.04 for the small LLaMA)")
    add(
        "--warmup-batches",
        type=positive_int,
        default=SparseGradConfig.warmup_steps,
        help="batches for SparseGrad's warm-up (%(default)s)",
    )
    add("--target-modules", nargs="+", help="names of the linear layers to adapt (default: the MLP's)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--out", type=Path, default=Path("outputs/quickstart"), help="folder for the results (%(default)s)")
    add("--evaluate", type=Path, metavar="ADAPTER", help="print the held-out loss of an adapter saved before, as JSON")
    args = parser.parse_args()
    args.lr = args.lr or (1e-3 if args.model else 4e-2)
    args.lora_lr = args.lora_lr or (1e-3 if args.model else 4e-2)
    return args


if __name__ == "__main__":
    run_and_exit(main)
