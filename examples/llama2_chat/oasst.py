"""OpenAssistant's message trees as conversations (Köpf et al., 2023, arXiv 2304.07327)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from peft_sparsegrad.cli.errors import InputError

Row = tuple[str, dict[str, Any]]
Conversation = list[dict[str, str]]
ROLES = {"prompter": "user", "assistant": "assistant"}
FIELDS = ("message_id", "parent_id", "text", "role", "lang")


def messages_of_trees(rows: Iterable[Row]) -> list[Row]:
    """The messages of whole trees, as the released files of trees have them: a row is a tree.

    Args:
        rows: Where each tree stands, and its fields, of which "prompt" is the first message. A message has the
            columns that `best_paths` names, and "replies", the messages that answer it.

    Raises:
        InputError: Something is no message.
    """
    found: list[Row] = []
    waiting = [(where, None, tree.get("prompt")) for where, tree in rows]
    while waiting:
        where, parent, message = waiting.pop(0)
        if not isinstance(message, dict) or not isinstance(message.get("replies", []), list):
            raise InputError(f"{where}: the tree has no message where its `prompt` or a reply should be")
        _check(where, {**message, "parent_id": parent})
        found.append((where, {**message, "parent_id": parent}))
        waiting += [(where, message["message_id"], reply) for reply in message.get("replies", [])]
    return found


def best_paths(rows: Iterable[Row], language: str | None) -> list[Conversation]:
    """For each tree the path from its root through the best-ranked replies, down to the last answer.

    Args:
        rows: Where each message stands, and its columns: message_id, parent_id (None for a root), text, role
            ("prompter" or "assistant"), lang, rank (0 is the best; None where nobody ranked the reply).
        language: Messages of other languages are left out; None keeps all.

    Raises:
        InputError: A message lacks a column, or its role is neither.
    """
    replies: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for where, message in rows:
        _check(where, message)
        if language is None or message["lang"] == language:
            replies[message["parent_id"]].append(message)
    paths = (_best_path(root, replies) for root in replies[None])
    return [path for path in paths if path]


def _best_path(root: dict[str, Any], replies: dict[str | None, list[dict[str, Any]]]) -> Conversation:
    path = [root]
    while children := replies.get(path[-1]["message_id"]):
        path.append(min(children, key=_rank))
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return math.inf if rank is None else rank


def _check(where: str, message: dict[str, Any]) -> None:
    missing = [name for name in FIELDS if name not in message]
    if missing:
        raise InputError(f"{where}: the message has no `{missing[0]}`")
    if message["role"] not in ROLES or not isinstance(message["text"], str):
        raise InputError(f"{where}: a message needs a `text` and the `role` prompter or assistant")
