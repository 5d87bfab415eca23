"""Conversations to learn from: a JSON Lines file or a dataset of the hub, in the forms that are common."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from datasets import load_dataset

from experiments.json_files import Record, read_records, text_field
from peft_sparsegrad.cli.errors import InputError

from .oasst import Conversation, best_paths, messages_of_trees

FORMS = (
    "`messages` (with `role` and `content`: an optional system message, then user and assistant in turn), "
    "`instruction` with `output`, or `instruction` with `instances`"
)


def read_conversations(source: str, language: str | None) -> list[Conversation]:
    """The conversations of a .jsonl file, or of the train split of a hub dataset with that id.

    Args:
        source: Rows of `FORMS`, messages of OpenAssistant's trees, or whole trees as OpenAssistant released them.
        language: Language of the trees' messages; None for all. The other forms do not say theirs.

    Raises:
        InputError: There is no such file or dataset, a row is none of these, or nothing is left.
    """
    rows = read_records(Path(source)) if _is_file(source) else _hub_rows(source)
    if not rows:
        raise InputError(f"{source} is empty")
    if "message_tree_id" in rows[0][1] and "prompt" in rows[0][1]:
        rows = messages_of_trees(rows)
    if "message_id" in rows[0][1]:
        found = best_paths(rows, language)
    else:
        found = [_conversation(where, row) for where, row in rows]
    if not found:
        raise InputError(f"{source} holds no conversation with an answer" + f" in {language}" * (language is not None))
    return found


def split_conversations(
    conversations: list[Conversation], eval_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on and, at random, that share of them (at least one) to validate on."""
    if len(conversations) < 2:
        raise InputError("the data holds one conversation, and two are needed: one to train on and one to validate on")
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    held_out = min(max(1, round(eval_share * len(shuffled))), len(shuffled) - 1)
    return shuffled[held_out:], shuffled[:held_out]


def _is_file(source: str) -> bool:
    path = Path(source)
    if path.suffix == ".jsonl":
        return True
    if path.exists() or path.is_absolute() or path.suffix in (".json", ".txt", ".csv"):
        raise InputError(f"the data {source} must be a .jsonl file or the id of a dataset on the hub")
    return False


def _hub_rows(name: str) -> list[tuple[str, Record]]:
    try:
        dataset: Any = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load {name}, which is no .jsonl file, from the hub: {reason}") from error
    return [(f"{name}, row {number}", dict(row)) for number, row in enumerate(dataset)]


def _conversation(where: str, row: Record) -> Conversation:
    try:
        return _from_messages(row["messages"]) if "messages" in row else _from_instruction(row)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: a row needs {FORMS}") from error


def _from_messages(messages: list[Record]) -> Conversation:
    found = [{name: text_field(message, name) for name in ("role", "content")} for message in messages]
    turns = found[1:] if found[0]["role"] == "system" else found
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)) or len(turns) < 2:
        raise ValueError("user and assistant must take turns")
    # Nothing is learnt from a last question without an answer.
    return found[:-1] if found[-1]["role"] == "user" else found


def _from_instruction(row: Record) -> Conversation:
    answered = row["instances"][0] if "instances" in row else row
    context = text_field({"input": "", **answered}, "input")
    question = "\n\n".join(part for part in (text_field(row, "instruction"), context) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text_field(answered, "output")}]
