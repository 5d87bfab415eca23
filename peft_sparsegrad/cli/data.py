"""Batches from a file: text for a causal language model, labelled sentences for a classifier."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .errors import InputError

TEXT_SUFFIXES, TABLE_SUFFIXES = (".txt", ".jsonl"), (".tsv", ".csv")
_RECORD = "`text`, `messages` (with `content`), or `instruction` with `output` or `instances`, all of them strings"
_COLA = ["source", "label", "star", "sentence"]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LabelledSentences:
    """Sentences with the positions of their labels in `names`."""

    texts: list[str]
    labels: list[int]
    names: list[str]

    def numbered_as(self, label2id: dict[str, int]) -> LabelledSentences | None:
        """Return the same sentences with a model's numbers as labels, or None if the model does not tell them.

        Args:
            label2id: The numbers of the model's labels by name. A label of the file may also be such a number.
        """
        numbers = {str(number): number for number in label2id.values()}
        known = next((ids for ids in (label2id, numbers) if ids.keys() >= set(self.names)), None)
        if known is None:
            return None
        by_number = sorted(label2id, key=label2id.__getitem__)
        return replace(self, labels=[known[self.names[label]] for label in self.labels], names=by_number)


def is_labelled(path: Path) -> bool:
    """Return whether a data file holds labelled sentences, by the end of its name.

    Raises:
        InputError: If it is neither those nor text.
    """
    if path.suffix in TABLE_SUFFIXES:
        return True
    if path.suffix in TEXT_SUFFIXES:
        return False
    known = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
    raise InputError(f"the data file {path} must end in one of {known}")


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents of a .txt file (separated by blank lines) or a .jsonl file (one a line).

    Raises:
        InputError: If the file has another ending, cannot be read, holds no text, or has a line that is no record.
    """
    if path.suffix not in TEXT_SUFFIXES:
        raise InputError(f"the data file {path} must end in {' or '.join(TEXT_SUFFIXES)}")
    content = _read(path)
    if path.suffix == ".txt":
        documents = content.split("\n\n")
    else:
        lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
        documents = [_document(f"{path}, line {number}", line, tokenizer) for number, line in lines]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"the data file {path} holds no text")
    return documents


def read_labelled(path: Path) -> LabelledSentences:
    """The columns `sentence` and `label` of a .tsv or .csv file; without a first line that names them, CoLA's four.

    Raises:
        InputError: If the file cannot be read, lacks a column, or has a row of another length.
    """
    quoted = path.suffix == ".csv"
    reader = csv.reader(
        io.StringIO(_read(path), newline=""),  # `str.splitlines` also splits at characters that are part of a text
        delimiter="," if quoted else "\t",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    numbered = [(reader.line_num, row) for row in reader if row]
    header = next((row for _, row in numbered), [])
    if "sentence" in header:
        numbered = numbered[1:]
    else:
        header = _COLA
    if "label" not in header:
        raise InputError(f"{path} has no column `label`")
    for number, row in numbered:
        if len(row) != len(header):
            columns = f"the {len(header)} of {', '.join(header)}"
            raise InputError(f"{path}, line {number}: {len(row)} columns, not {columns}")
    rows = [row for _, row in numbered]
    if not rows:
        raise InputError(f"the data file {path} holds no sentences")
    labels = [row[header.index("label")] for row in rows]
    names = sorted(set(labels))
    return LabelledSentences([row[header.index("sentence")] for row in rows], [*map(names.index, labels)], names)


def language_batches(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, steps: int, size: int, length: int, seed: int
) -> list[Batch]:
    """`steps` batches of `size` blocks of `length` tokens, for `model(**batch).loss`.

    The texts are joined, with the end-of-sequence token between them, and cut into blocks, in a random order.

    Raises:
        InputError: If there is less text than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in [*document, *end]])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(blocks):
        raise InputError(f"the data holds {len(tokens)} tokens, fewer than one block of {length}: see --max-length")
    chosen = [blocks[positions] for positions in _draw(len(blocks), steps, size, seed)]
    return [{"input_ids": batch, "labels": batch} for batch in chosen]


def labelled_batches(
    sentences: LabelledSentences,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    size: int,
    length: int,
    seed: int,
) -> list[Batch]:
    """`steps` batches of `size` sentences, cut after `length` tokens, for `model(**batch).loss`."""
    batches = []
    for positions in _draw(len(sentences.texts), steps, size, seed):
        texts = [sentences.texts[position] for position in positions]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        labels = torch.tensor([sentences.labels[position] for position in positions])
        batches.append({**encoded, "labels": labels})
    return batches


def _draw(rows: int, steps: int, size: int, seed: int) -> list[torch.Tensor]:
    """Positions for each batch; every row is used once before any is used again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = 1 + steps * size // rows
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])
    return list(order[: steps * size].split(size))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the data file {path}: {error}") from error


def _document(where: str, line: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    try:
        parts = _parts(json.loads(line), tokenizer)
        return "\n\n".join(part for part in parts if part != "")
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: this is not JSON: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{where}: a record needs {_RECORD}") from error


def _parts(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if "text" in record:
        return [record["text"]]
    if "messages" in record:
        if tokenizer is not None and tokenizer.chat_template:
            return [str(tokenizer.apply_chat_template(record["messages"], tokenize=False))]
        return [message["content"] for message in record["messages"]]
    answered = record["instances"][0] if "instances" in record else record
    return [record["instruction"], answered.get("input", ""), answered["output"]]
