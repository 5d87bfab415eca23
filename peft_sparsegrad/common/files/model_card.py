"""The section of the model card that describes an adapter and how to load it.

`save_pretrained` first asks the tuner for its tensors, which gives access to the model, and then saves the
configuration on the main process alone, which is when the card is written. In between, the configuration holds the
facts about the model that the card needs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import ModelCardData
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .atomic import write_text
from .markdown import code, literal

# Classes that load a base model, by PEFT's task type.
TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# Left out of the card's settings: fields that every PEFT configuration has, that concern one run, or that have a row
# of their own.
NOT_SETTINGS = {
    *("auto_mapping", "base_model_name_or_path", "format_version", "inference_mode", "init_weights", "peft_type"),
    *("peft_version", "revision", "target_modules", "task_type", "transition_matrices"),
}
_BEGIN, END = "<!-- peft_sparsegrad: rewritten at every save -->", "<!-- peft_sparsegrad: end -->"
_OURS = re.compile(f"<!-- peft_sparsegrad: (?!end ).*?{re.escape(END)}", re.DOTALL)
_MOST_TARGETS = 8


@dataclass(frozen=True)
class CardFacts:
    """Facts for the card that only the model can tell.

    Attributes:
        trained: Number of values that the method trains.
        saved_in_full: Number of values in `modules_to_save` and trained tokens.
        nbytes: Bytes of all tensors in the adapter's file.
        base_import: Line of code that imports the base model's class; None if the class has no `from_pretrained`.
        base_class: Name of the base model's class.
        num_labels: Number of labels of a classifier; None for any other model.
    """

    trained: int
    saved_in_full: int
    nbytes: int
    base_import: str | None
    base_class: str
    num_labels: int | None


def collect_facts(
    model: Any,
    adapter_name: str,
    task_type: str | None,
    trained: int,
    tensors: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
) -> CardFacts:
    """Collect the facts for the card from a model that is being saved.

    Args:
        model: The model with the adapter.
        adapter_name: Name of the adapter.
        task_type: Task type in the adapter's configuration.
        trained: Number of values that the method trains.
        tensors: The method's tensors in their stored form.
        state_dict: All tensors of the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    others = _saved_in_full(model, adapter_name, state_dict)
    base_import, base_class = _import_of_base(type(base), task_type)
    classifies = task_type in ("SEQ_CLS", "TOKEN_CLS")
    labels = getattr(base.config, "num_labels", None) if classifies and hasattr(base, "config") else None
    return CardFacts(
        trained=trained,
        saved_in_full=sum(tensor.numel() for tensor in others),
        nbytes=sum(tensor.numel() * tensor.element_size() for tensor in [*tensors.values(), *others]),
        base_import=base_import,
        base_class=base_class,
        num_labels=labels if isinstance(labels, int) else None,
    )


def write_card(config: Any, directory: str | os.PathLike[str], facts: CardFacts) -> None:
    """Write the section into `README.md`, replacing an earlier one; other text stays as it is."""
    path = Path(directory, "README.md")
    text = path.read_text("utf-8") if path.exists() else _empty_card(config)
    write_text(path, with_section(text, card_section(config, directory, facts)))


def with_section(text: str, section: str) -> str:
    """Return a card with its section replaced or, if it has none, inserted before the first second-level heading."""
    marked = f"{_BEGIN}\n{section}\n{END}"
    replaced, count = re.subn(f"{re.escape(_BEGIN)}.*?{re.escape(END)}", lambda _: marked, text, flags=re.DOTALL)
    return replaced if count else _inserted(text, marked)


def with_sections_of(earlier: str, text: str) -> str:
    """Return a card with all sections that this package wrote into an earlier one, if it has none of its own."""
    sections = _OURS.findall(earlier)
    if not sections or _OURS.search(text):
        return text
    return _inserted(text, "\n\n".join(sections))


def _inserted(text: str, marked: str) -> str:
    lines = text.split("\n")
    fences = 0
    for number, line in enumerate(lines):
        fences += line.startswith("```")
        if line.startswith("## ") and fences % 2 == 0:
            return "\n".join([*lines[:number], marked, "", *lines[number:]])
    return f"{text.rstrip()}\n\n{marked}\n" if text.strip() else f"{marked}\n"


def card_section(config: Any, directory: str | os.PathLike[str], facts: CardFacts) -> str:
    """Return the section as Markdown."""
    in_full = f", and {facts.saved_in_full:,} in other modules, saved in full" if facts.saved_in_full else ""
    rows = {
        "method": f"{config.title} ({config.source})",
        "base model": code(config.base_model_name_or_path) if config.base_model_name_or_path else "without a name",
        "adapted modules": _targets(config.target_modules),
        "settings": ", ".join(code(f"{key}={value!r}") for key, value in settings_of(config.to_dict()).items()),
        "trainable parameters": f"{facts.trained:,}{in_full}",
        "bytes of the tensors": f"{facts.nbytes:,}",
        "needed to load it": f"`import peft_sparsegrad`; without it PEFT says `KeyError: '{config.peft_type.value}'`",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    snippet = _snippet(config, directory, facts)
    return f"## {config.title} adapter\n\n| | |\n|---|---|\n{table}\n\nIn this folder:\n\n```python\n{snippet}\n```"


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that have a value and an effect, by name."""
    without = {"density"} if config.get("num_values") is not None else set()
    shown = sorted((key, value) for key, value in config.items() if key not in without)
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in shown}
    return {key: value for key, value in settings.items() if key not in NOT_SETTINGS and value not in (None, {}, [])}


def _snippet(config: Any, directory: str | os.PathLike[str], facts: CardFacts) -> str:
    lines = ["import peft_sparsegrad  # of the package peft-sparsegrad", "from peft import PeftModel"]
    if facts.base_import is None:
        lines += ["", f"base = ...  # the {facts.base_class} that was adapted, with its weights"]
    else:
        path = _seen_from(config.base_model_name_or_path or "path/to/the/base/model", directory)
        arguments = [literal(path)]
        arguments += [f"revision={literal(config.revision)}"] if config.revision else []
        arguments += [f"num_labels={facts.num_labels}"] if facts.num_labels is not None else []
        lines += [facts.base_import, "", f"base = {facts.base_class}.from_pretrained({', '.join(arguments)})"]
    lines.append('model = PeftModel.from_pretrained(base, ".")  # or the name of this repository on the hub')
    return "\n".join(lines)


def _seen_from(base: str, directory: str | os.PathLike[str]) -> str:
    """Return the path of a base model as seen by a process that runs in `directory`."""
    if os.path.isabs(base) or not os.path.isdir(base):
        return base
    return Path(os.path.relpath(base, directory)).as_posix()


def _targets(target_modules: Any) -> str:
    if isinstance(target_modules, str):
        return code(target_modules)
    names = sorted(target_modules or ())
    shown = ", ".join(map(code, names[:_MOST_TARGETS]))
    return shown if len(names) <= _MOST_TARGETS else f"{shown} and {len(names) - _MOST_TARGETS} more"


def _import_of_base(base_class: type[nn.Module], task_type: str | None) -> tuple[str | None, str]:
    if task_type in TASK_CLASSES and issubclass(base_class, transformers.PreTrainedModel):
        return f"from transformers import {TASK_CLASSES[task_type]}", TASK_CLASSES[task_type]
    name = re.sub(r"\W+", "_", base_class.__name__)
    module = "transformers" if getattr(transformers, name, None) is base_class else base_class.__module__
    importable = name == base_class.__name__ and all(map(str.isidentifier, module.split(".")))
    if not hasattr(base_class, "from_pretrained") or not importable:
        return None, name
    return f"from {module} import {name}", name


def _saved_in_full(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of other modules that PEFT saves with the adapter."""
    found: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")  # names in the state dict lack this prefix
            own = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            saved = cast(Any, module).adapter_state_dict(adapter_name, own)
            found += [tensor for tensor in saved.values() if isinstance(tensor, torch.Tensor)]
    return found


def _empty_card(config: Any) -> str:
    """Return the front matter of a new card, which PEFT writes only for an adapter named `default`."""
    data = ModelCardData(base_model=config.base_model_name_or_path or None, library_name="peft")
    return f"---\n{data.to_yaml()}\n---\n"
