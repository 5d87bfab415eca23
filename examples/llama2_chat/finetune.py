"""Fine-tune a chat model on conversations with SparseGrad, LoRA or another method, on TRL's SFTTrainer.

    python -m examples.llama2_chat.finetune --model PATH_OR_ID --data conversations.jsonl --method sparsegrad

The defaults are those of the SparseGrad paper's section 5.2: up and down projections of every third block, 100,000
trained values in each, learning rate 9e-4, one epoch. The cosine by which the rate falls, the batch size and the
length are ours: the paper does not tell its own. `--method paper` is the published method, `sparsegrad` the default of
this package. Only answers count in the loss. The same command again goes on from the last checkpoint. `--out` receives
the adapter, or with `--method full` the model, the tokenizer with its chat template, and metrics.json.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from experiments.attachment import attach_method, check_epochs, count_of_base, count_trainable
from experiments.json_files import write_json
from experiments.methods import METHODS
from experiments.terminal import heading, run_and_exit, show, show_lines
from experiments.variant_options import check_settings_have_effect, method_settings
from peft_sparsegrad import SparseGradCallback
from peft_sparsegrad.cli.errors import InputError

from .chat_template import encode_all, load_tokenizer
from .conversations import read_conversations, split_conversations
from .finetune_options import parse_args
from .load_model import load_base
from .run_folder import METRICS_FILE, RUN_FILE, last_checkpoint, read_run, seconds_before
from .settings import fingerprint, settings_of
from .target_layers import LARGE_DENSITY, find_density, select_layers, trains_whole_layers
from .training import (
    Rows,
    costs_of_steps,
    first_validation_loss,
    make_sft_config,
    make_trainer,
    peak_memory,
    saved_bytes,
    validation_loss,
    versions,
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(__doc__, argv)
    config = make_sft_config(args)
    state: Any = config.distributed_state
    with contextlib.nullcontext() if state.is_main_process else contextlib.redirect_stdout(None):
        finetune(args, config)
    state.destroy_process_group()
    return 0


def finetune(args: argparse.Namespace, config: SFTConfig) -> None:
    """Read, check, train, save; or go on with, or leave alone, the run that is in `--out`."""
    check_settings_have_effect(args, [args.method])
    heading(f"{METHODS[args.method].description}, on {args.model}")
    tokenizer = load_tokenizer(args.model, args.chat_template)
    rows, validation = read_rows(args, tokenizer)
    check_num_epochs(args, len(rows), config)
    settings = settings_of(
        args, {"the data's hash": fingerprint([rows, validation]), "the number of processes": config.world_size}
    )
    run = read_run(args.out, settings, args.overwrite)
    if (args.out / METRICS_FILE).exists() and run is not None:
        show("finished already", f"see {args.out / METRICS_FILE}; --overwrite starts anew")
        return
    model = attach(args)
    begin(settings, args, config)
    trainer = make_trainer(model, tokenizer, rows, validation, config, args)
    save(trainer, args.out, {**train(trainer, args), "settings": settings})


def read_rows(args: argparse.Namespace, tokenizer: Any) -> tuple[Rows, Rows]:
    """Token rows to train and to validate on."""
    conversations = read_conversations(args.data, None if args.language == "all" else args.language)
    parts = split_conversations(conversations, args.eval_share, args.seed)
    rows, validation = (encode_all(tokenizer, part, args.max_length) for part in parts)
    kept = len(rows) + len(validation)
    show("conversations", f"{len(rows):,} to train on, {len(validation):,} for validation")
    show("left out", f"{len(conversations) - kept:,}, whose first {args.max_length:,} tokens hold no answer")
    if not rows or not validation:
        raise InputError("no answers are left to train or to validate on: give a larger --max-length or more data")
    return rows, validation


def check_num_epochs(args: argparse.Namespace, num_rows: int, config: SFTConfig) -> None:
    """Raise an InputError if the method needs more epochs than there will be."""
    in_step = args.batch_size * args.accumulate * config.world_size
    check_epochs(args.method, math.ceil(args.steps * in_step / num_rows if args.steps else args.epochs))


def attach(args: argparse.Namespace) -> Any:
    """The base model with what the method trains on the selected layers."""
    model = load_base(args.model, args.base)
    positions = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > positions:
        raise InputError(f"--max-length {args.max_length} is more than the {positions} positions of {args.model}")
    layers = select_layers(model, args.target_modules, args.every)
    density = find_density(args.method, layers, args.density, args.num_values)
    set_seed(args.seed)
    settings = method_settings(args, args.method)
    model = attach_method(args.method, model, list(layers), density, args.seed, task_type="CAUSAL_LM", **settings)
    trained = count_trainable(model)
    blocks = f"blocks 0, {args.every}, {2 * args.every}, ..."
    show("layers", f"{len(layers)}, the {' and '.join(args.target_modules)} of the {blocks}")
    asked = "" if trains_whole_layers(args.method) else f"; {density:.4%} of each layer was asked for"
    show("trainable parameters", f"{trained:,}, {trained / sum(layers.values()):.4%} of these layers{asked}")
    if not trains_whole_layers(args.method) and density > LARGE_DENSITY:
        show("a large share", f"{density:.0%} of each layer: on a small model give a --density, such as 0.01")
    return model


def begin(settings: dict[str, Any], args: argparse.Namespace, config: SFTConfig) -> None:
    """Everything given is usable: from here on files are written, and with `--overwrite` deleted."""
    state: Any = config.distributed_state
    state.wait_for_everyone()  # the others look at what was there before
    if state.is_main_process:
        if args.overwrite and args.out.exists():
            shutil.rmtree(args.out)
        write_json(args.out / RUN_FILE, settings)
    state.wait_for_everyone()


def train(trainer: SFTTrainer, args: argparse.Namespace) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one. Returns what was measured, of this process."""
    set_seed(args.seed)  # a run killed before its first checkpoint starts from the same random state
    before, start = seconds_before(last_checkpoint(args.out)), time.perf_counter()
    resumed_from = train_from_last_checkpoint(trainer, args.out)
    seconds = before + time.perf_counter() - start
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SparseGradCallback) and callback.report is not None:
            show_lines(f"warm-up: {callback.report}")
    return {
        "validation_loss_before": first_validation_loss(trainer),
        "validation_loss_after": validation_loss(trainer),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "model_parameters": count_of_base(trainer.model),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        **costs_of_steps(trainer),
        "resumed_from_step": resumed_from,
        **peak_memory(),
    }


def train_from_last_checkpoint(trainer: SFTTrainer, out: Path) -> int:
    """Take the steps that are missing. Returns how many there were already."""
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        trainer.train()
        return 0
    show("resuming from", checkpoint.name)
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        # Asked to train, the Trainer would take one step too many where the last is not an epoch's last.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    return state.global_step


def save(trainer: SFTTrainer, out: Path, metrics: dict[str, Any]) -> None:
    """Save the adapter or model and the tokenizer, then metrics.json, which says that the run is finished."""
    trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()  # the others, too, look at what the first has written
    if trainer.is_world_process_zero():
        metrics = {**metrics, "saved_bytes": saved_bytes(out), "versions": versions()}
        write_json(out / METRICS_FILE, metrics)
    show("validation loss", f"{metrics['validation_loss_before']:.4f} -> {metrics['validation_loss_after']:.4f}")
    show("seconds", f"{metrics['seconds']:.1f} for {metrics['steps']} steps")
    show("saved", f"{saved_bytes(out):,} bytes of weights in {out}")


if __name__ == "__main__":
    run_and_exit(main)
