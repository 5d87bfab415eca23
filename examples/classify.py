"""Fine-tune a sentence classifier on the Trainer with SparseGrad, GradDrop, LoRA or another method.

    python -m examples.classify --model PATH_OR_ID --train train.tsv --dev dev.tsv --method sparsegrad

Files are .tsv or .csv with the columns `sentence` and `label`, or tab-separated in CoLA's format. The adapter carries
the task head. At the end a new process loads the adapter and must predict the same. To use it later:

    python -m examples.classify --predict outputs/classify --dev new.tsv
"""

from __future__ import annotations

import argparse
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.arguments import positive_float, positive_int, share
from experiments.attachment import attach_method, check_epochs, make_callbacks, make_optimizer, masks_gradients
from experiments.json_files import read_json, write_json
from experiments.loading import DEVICE, load_pretrained, quantization
from experiments.methods import METHODS
from experiments.metrics import accuracy, matthews_correlation
from experiments.terminal import heading, run_and_exit, show, show_lines
from experiments.training import training_arguments
from peft_sparsegrad import GradDropCallback, GradDropConfig, SparseGradCallback, SparseGradConfig
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.graddrop import VARIANTS

from ._labelled import read_logits, read_sentences, write_predictions

Row = dict[str, Any]
SETTINGS = "classify.json"
# New in most checkpoints, or trained for something else.
HEADS = {"classifier", "pre_classifier", "score", "pooler"}


def main() -> int:
    args = parse_args()
    return predict(args) if args.predict is not None else train(args)


def train(args: argparse.Namespace) -> int:
    """Fine-tune, save, score. Returns the exit status: 1 if the saved model predicts something else."""
    set_seed(args.seed)
    training, dev = read_sentences(args.train), read_sentences(args.dev)
    epochs = args.steps * args.batch_size / len(training.texts) if args.steps else args.epochs
    check_epochs(args.graddrop or args.method, math.ceil(epochs))
    names = sorted(set(training.labels or []))
    training_ids, dev_ids = training.label_ids(names), dev.label_ids(names)
    settings = {"model": args.model, "quantize": args.quantize, "labels": names, "max_length": args.max_length}

    heading(f"{METHODS[args.method].description}, on {args.model}")
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    model = attach(load_base(args.model, settings), args)
    rows = tokenize(tokenizer, training.texts, args.max_length)
    run_trainer(model, tokenizer, [{**row, "labels": i} for row, i in zip(rows, training_ids, strict=True)], args)

    logits = compute_logits(model, tokenizer, tokenize(tokenizer, dev.texts, args.max_length), args.batch_size)
    show_scores(logits, dev_ids)
    save(model, tokenizer, settings, args.out)
    return 0 if check_in_fresh_process(args, logits) else 1


def predict(args: argparse.Namespace) -> int:
    """Write `predictions.tsv` for the sentences of `--dev` with the model saved in `--predict`."""
    settings = read_json(args.predict / SETTINGS)
    if settings is None:
        raise InputError(f"{args.predict} holds no model of this script: it has no {SETTINGS}")
    sentences = read_sentences(args.dev)
    tokenizer = load_pretrained(AutoTokenizer, args.predict)
    if (args.predict / "adapter_config.json").exists():
        model: Any = PeftModel.from_pretrained(load_base(settings["model"], settings), args.predict)
    else:
        model = load_base(args.predict, settings)
    rows = tokenize(tokenizer, sentences.texts, settings["max_length"])
    logits = compute_logits(model, tokenizer, rows, args.batch_size)
    write_predictions(args.predict / "predictions.tsv", sentences.texts, settings["labels"], logits.tolist())
    show("predictions", str(args.predict / "predictions.tsv"))
    return 0


def load_base(path: str | Path, settings: dict[str, Any]) -> Any:
    """The model with a head for the labels, quantised but for the head if asked."""
    extra: dict[str, Any] = {}
    if settings["quantize"] != "none":
        extra["quantization_config"] = quantize(settings["quantize"])
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = load_pretrained(
        AutoModelForSequenceClassification, path, num_labels=len(settings["labels"]), dtype="float32", **extra
    )
    return model if extra else model.to(DEVICE)


def quantize(bits: str) -> BitsAndBytesConfig:
    """Return the settings for everything but the head."""
    # transformers looks for these at the beginning and the end of a module's name: some heads have parts.
    skipped = [*HEADS, *(rf".*\.{head}" for head in HEADS)]
    return quantization(bits, torch.bfloat16 if DEVICE == "cuda" else torch.float32, llm_int8_skip_modules=skipped)


def attach(model: Any, args: argparse.Namespace) -> Any:
    """Give the model the method's trainable parameters, and train its head in full."""
    heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
    model = attach_method(
        args.method, model, args.target_modules, args.density, args.seed, task_type="SEQ_CLS", modules_to_save=heads
    )
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[not HEADS.isdisjoint(name.split("."))] += parameter.numel() * parameter.requires_grad
    show("trainable parameters", f"{counts[False]:,} and {counts[True]:,} of the head")
    return model


def run_trainer(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], args: argparse.Namespace) -> None:
    callbacks = make_callbacks(args.method, model, args.warmup_steps, args.head_steps)
    if args.graddrop is not None:
        callbacks.append(GradDropCallback(GradDropConfig.from_variant(args.graddrop, seed=args.seed)))
    trainer = Trainer(
        model,
        training_arguments(
            TrainingArguments,
            args.out,
            lr=args.lr,
            batch_size=args.batch_size,
            epochs=args.epochs,
            seed=args.seed,
            max_steps=args.steps or -1,
            warmup_steps=args.lr_warmup_steps,
            logging_steps=args.logging_steps,
            save_strategy="no",
        ),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=callbacks,
        optimizers=(make_optimizer(args.method, model, args.lr), None),
    )
    result = trainer.train()
    for callback in callbacks:
        if isinstance(callback, SparseGradCallback):
            show_lines(f"warm-up: {callback.report}")
    show("training loss", f"{result.training_loss:.4f}")
    show("seconds", f"{result.metrics['train_runtime']:.1f} for {result.global_step} steps")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[Row]:
    columns = tokenizer(texts, truncation=True, max_length=max_length)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@torch.no_grad()
def compute_logits(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch_size: int) -> torch.Tensor:
    """(rows, labels), in float32."""
    model.eval()
    collate: Any = DataCollatorWithPadding(tokenizer)
    batches = (collate(rows[start : start + batch_size]).to(DEVICE) for start in range(0, len(rows), batch_size))
    return torch.cat([model(**batch).logits.float().cpu() for batch in batches])


def show_scores(logits: torch.Tensor, label_ids: list[int]) -> None:
    predicted = logits.argmax(1).tolist()
    show("dev loss", f"{torch.nn.functional.cross_entropy(logits, torch.tensor(label_ids)).item():.4f}")
    show("dev accuracy", f"{accuracy(predicted, label_ids):.4f}")
    show("dev Matthews correlation", f"{matthews_correlation(predicted, label_ids):.4f}")


def save(model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / SETTINGS, settings)
    weights = [folder / name for name in ("adapter_model.safetensors", "model.safetensors")]
    show("saved weights, bytes", f"{sum(path.stat().st_size for path in weights if path.exists()):,}")


def check_in_fresh_process(args: argparse.Namespace, logits: torch.Tensor) -> bool:
    """Predict again in a new process, from the files alone."""
    command = [sys.executable, "-m", "examples.classify", "--predict", str(args.out), "--dev", str(args.dev)]
    subprocess.run([*command, "--batch-size", str(args.batch_size)], check=True)
    difference = (torch.tensor(read_logits(args.out / "predictions.tsv")) - logits).abs().max().item()
    same = difference <= 1e-4
    show(
        "in a new process",
        f"the largest logit difference is {difference:.1e}: {'the same' if same else 'NOT THE SAME'}",
    )
    return same


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint with an encoder: a folder or a hub id")
    add("--train", type=Path, help="labelled sentences to train on")
    add("--dev", type=Path, required=True, help="labelled sentences to score; with --predict, sentences to label")
    add("--method", choices=list(METHODS), default="sparsegrad", help="way of fine-tuning (%(default)s)")
    add("--graddrop", choices=list(VARIANTS), help="mask the gradients of what --method trains, by this variant")
    add(
        "--lr",
        type=positive_float,
        default=2e-3,
        help="learning rate; less for full and GradDrop (%(default)s)",
    )
    add("--density", type=share, default=0.01, help="share of each adapted weight that trains (%(default)s)")
    add(
        "--target-modules",
        nargs="+",
        help="layers to adapt (default: the MLP's; GradDrop: the blocks')",
    )
    add("--epochs", type=positive_float, default=3.0, help="passes over the training file (%(default)s)")
    add("--steps", type=positive_int, help="training steps, in place of --epochs")
    add("--batch-size", type=positive_int, default=32, help="sentences in a batch (%(default)s)")
    add("--max-length", type=positive_int, default=128, help="tokens that are kept of a sentence (%(default)s)")
    add(
        "--warmup-steps",
        type=positive_int,
        default=SparseGradConfig.warmup_steps,
        help="batches of SparseGrad's warm-up (%(default)s)",
    )
    add("--head-steps", type=int, default=0, help="steps for the head alone before that warm-up (%(default)s)")
    add("--lr-warmup-steps", type=int, default=0, help="steps in which the learning rate rises (%(default)s)")
    add("--logging-steps", type=positive_int, default=100, help="steps between lines of the log (%(default)s)")
    add("--quantize", choices=["none", "4bit", "8bit"], default="none", help="of the frozen part (%(default)s)")
    add("--seed", type=int, default=0, help="of the head, the adapter and the order of the data (%(default)s)")
    add("--out", type=Path, default=Path("outputs/classify"), help="folder for the result (%(default)s)")
    add("--predict", type=Path, metavar="DIR", help="label the sentences of --dev with the model saved in DIR")
    args = parser.parse_args()
    if args.predict is None and not (args.model and args.train):
        parser.error("--model and --train are needed, unless --predict is given")
    if args.quantize != "none" and args.method == "full":
        parser.error("--method full cannot train quantised weights")
    if args.graddrop is not None and masks_gradients(args.method):
        parser.error(f"--graddrop is for methods that do not mask by themselves, and {args.method} does")
    return args


if __name__ == "__main__":
    run_and_exit(main)
