"""OpenAssistant's conversations, split by tree, as tokens with labels on the answers alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llama2_chat.oasst import ROLES, Conversation, messages_of_trees
from experiments.json_files import read_records
from experiments.text_files import read_lines

FILE = "oasst/en_100_tree.jsonl"
OTHER_TEXT = "ud/en.dev.conllu"
SHARES = {"search": 0.1, "final": 0.15}  # of the trees; the others train
BLOCK, BLOCKS = 256, 64  # tokens in a block of the other text, and how many of them are read


@dataclass(frozen=True)
class Split:
    """Conversations of three disjoint sets of trees."""

    train: list[Conversation]
    search: list[Conversation]
    final: list[Conversation]


def split_by_tree(data: Path) -> Split:
    """Return every path from a tree's root to one of its last answers; the trees are divided at random, always alike.

    Raises:
        InputError: If the file cannot be read, or a tree in it.
    """
    trees: list[list[Conversation]] = [
        list(_paths([message for _, message in messages_of_trees([row])])) for row in read_records(data / FILE)
    ]
    random.Random(0).shuffle(trees)
    parts = {}
    for name, share in SHARES.items():
        count = max(1, round(share * 100) * len(trees) // 100)
        parts[name], trees = trees[:count], trees[count:]
    flat = {name: [path for tree in part for path in tree] for name, part in {**parts, "train": trees}.items()}
    return Split(**flat)


def _paths(messages: list[dict[str, Any]]) -> Iterator[Conversation]:
    """Yield each path that ends with an answer which no further answer follows."""
    replies: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for message in messages:
        replies[message["parent_id"]].append(message)
    waiting = [[root] for root in replies[None]]
    while waiting:
        path = waiting.pop(0)
        further = replies[path[-1]["message_id"]]
        waiting += [[*path, reply] for reply in further]
        answered_again = any(replies[reply["message_id"]] for reply in further)
        if path[-1]["role"] == "assistant" and not answered_again:
            yield [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]


def other_blocks(data: Path, tokenizer: Any) -> list[list[int]]:
    """Return blocks of tokens of text that is no conversation: the sentences of the English Web Treebank, in order.

    Raises:
        InputError: If the file cannot be read.
    """
    marks = "# text = "
    sentences = [line.removeprefix(marks) for line in read_lines(data / OTHER_TEXT) if line.startswith(marks)]
    tokens = tokenizer("\n".join(sentences), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokens[start : start + BLOCK] for start in range(0, len(tokens) - BLOCK + 1, BLOCK)][:BLOCKS]
