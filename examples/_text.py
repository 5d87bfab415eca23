"""Text for the quickstart: the standard library's own, or a user's file."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from peft_sparsegrad.cli.errors import InputError

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library_docstrings() -> list[str]:
    """Every docstring of the standard library: English prose."""
    documented = (node for tree in _modules() for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [docstring for node in documented if (docstring := ast.get_docstring(node))]


def standard_library_code(characters: int = 800_000) -> list[str]:
    """Modules of the standard library without their comments and docstrings, until there are so many characters."""
    sources, size = [], 0
    for tree in _modules():
        sources.append(ast.unparse(_without_docstrings(tree)))
        size += len(sources[-1])
        if size >= characters:
            break
    return sources


def _modules() -> Iterator[ast.Module]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if not NOT_THE_LIBRARY.intersection(p.relative_to(root).parts)]
    if not paths:
        raise InputError(f"there are no source files of the standard library in {root}: give --model and --data")
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some distributions keep files of other Python versions there
            continue


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def split_into_blocks(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int, most_held_out: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of tokens (n, length), of shuffled documents: the ones to train on, and a tenth that is held out."""
    documents = random.Random(seed).sample(documents, len(documents))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in [*document, *end]])
    count = len(tokens) // length
    if count < 2:
        raise InputError(f"the data holds {len(tokens)} tokens, too few for two blocks of {length}")
    blocks = tokens[: count * length].view(count, length)
    held_out = min(max(1, count // 10), most_held_out)
    return blocks[:-held_out], blocks[-held_out:]


def draw_batches(blocks: torch.Tensor, count: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches for `model(**batch).loss`; every block is used once before any is used again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = 1 + count * batch_size // len(blocks)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
    chosen = [blocks[rows] for rows in order[: count * batch_size].split(batch_size)]
    return [{"input_ids": batch, "labels": batch} for batch in chosen]
