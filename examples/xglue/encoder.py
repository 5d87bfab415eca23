"""The encoder with a task's head, a rate of dropout, and with the trainable parameters of a method."""

from __future__ import annotations

from numbers import Real
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from experiments.attachment import attach_method
from experiments.loading import DEVICE, load_pretrained
from peft_sparsegrad.cli.errors import InputError

from .kinds import KINDS
from .runs import Run
from .tasks import TASKS


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer, which has to say which characters and words its tokens come from.

    Raises:
        InputError: If it cannot be loaded, or is one that does not say.
    """
    tokenizer = load_pretrained(AutoTokenizer, path)
    if not tokenizer.is_fast:
        raise InputError(f"{path} has no fast tokenizer, which is needed to find the words and spans of its tokens")
    return tokenizer


def build_model(run: Run) -> Any:
    """The run's model, ready to train, on the device; its new head is drawn with the run's seed.

    Raises:
        InputError: If it cannot be loaded, or the method cannot be put onto it.
    """
    set_seed(run.seed)
    kind = KINDS[TASKS[run.task].kind]
    model = load_pretrained(kind.auto_class, run.model, config=load_config(run), dtype="float32").to(DEVICE)
    return attach(run, model)


def load_config(run: Run) -> Any:
    """The encoder's configuration with the task's labels and the run's dropout."""
    config = load_pretrained(AutoConfig, run.model)
    set_dropout(config, run.dropout)
    if labels := TASKS[run.task].labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    return config


def attach(run: Run, model: Any) -> Any:
    """Give the model the method's trainable parameters, and train its head in full, and its embeddings if they are to.

    Raises:
        InputError: If the method cannot be put onto it, or its embeddings are not found.
    """
    return attach_method(
        run.method,
        model,
        list(run.target_modules) or None,
        run.density,
        run.seed,
        task_type=KINDS[TASKS[run.task].kind].task_type,
        modules_to_save=head_modules(model) + (embedding_layers(model) if run.embeddings == "trained" else []),
        **({"blocks_per_epoch": run.blocks_per_epoch} if run.blocks_per_epoch else {}),
    )


def set_dropout(config: Any, rate: float) -> None:
    """Give every kind of dropout in a model's configuration that rate."""
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, Real) and not isinstance(value, bool):
            setattr(config, name, rate)


def head_modules(model: Any) -> list[str]:
    """Names of the modules that are trained for the task alone: all outside of the encoder, and its pooler."""
    outside = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]
    return outside + [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]


def embedding_layers(model: Any) -> list[str]:
    """Names of the layers of the encoder's input embeddings: tables and LayerNorm.

    Raises:
        InputError: If the encoder has no part of the name `embeddings`.
    """
    prefix = f"{model.base_model_prefix}.embeddings"
    embeddings = dict(model.named_modules()).get(prefix)
    if embeddings is None:
        raise InputError(f"the encoder has no {prefix!r} to train: use --embeddings frozen")
    layers = embeddings.named_modules(prefix=prefix)
    return [name for name, layer in layers if next(layer.parameters(recurse=False), None) is not None]
