"""Conversations as tokens: the chat template, and which tokens are answers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.loading import load_pretrained
from experiments.terminal import show
from peft_sparsegrad.cli.errors import InputError

from .oasst import Conversation

LLAMA2_TEMPLATE = Path(__file__).with_name("llama2.jinja")
IGNORED = -100  # the label of a token that the loss leaves out


def load_tokenizer(model: str | Path, template: Path | None = None) -> Any:
    """The model's tokenizer with a chat template: the one given, else its own, else Llama 2's, and it says so."""
    tokenizer = load_pretrained(AutoTokenizer, model)
    if template is None and not tokenizer.chat_template:
        template = LLAMA2_TEMPLATE
        show("chat template", f"{model} has none, so Llama 2's is used ({template.name})")
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the chat template {template}: {error}") from error
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    """The tokens after which the model writes its answer."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, messages: Conversation, max_length: int) -> dict[str, list[int]]:
    """The first `max_length` tokens of a conversation, with `labels` on the answers and their end tokens alone.

    An answer is what the template adds to the prompt of `prompt_ids`, up to its last end-of-sequence token, so that
    the model trains on the tokens that it will have to write after the prompt that it will be given.

    Raises:
        InputError: The template fails, or renders a turn differently when further turns follow.
    """
    tokens = _render(tokenizer, messages)
    labels = [IGNORED] * len(tokens)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        until = _render(tokenizer, messages[: i + 1])
        if tokens[: len(until)] != until:
            raise InputError(
                "the chat template renders earlier turns differently when others follow, so the answers cannot be "
                "told apart: give another one with --chat-template"
            )
        start, end = _answer_span(prompt_ids(tokenizer, messages[:i]), until, tokenizer.eos_token_id)
        labels[start:end] = tokens[start:end]
    return {"input_ids": tokens[:max_length], "labels": labels[:max_length]}


def encode_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation], max_length: int
) -> list[dict[str, list[int]]]:
    """`encode` of each conversation; those in which no answer begins within `max_length` tokens are left out."""
    progress = tqdm(list(conversations), desc="tokenizing", leave=False, disable=None)
    rows = (encode(tokenizer, conversation, max_length) for conversation in progress)
    # The first token is never predicted.
    return [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, **settings: Any) -> list[int]:
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    except TemplateError as error:
        raise InputError(f"the chat template does not take this conversation: {error}") from error
    return encoded["input_ids"]


def _answer_span(prompt: list[int], until: list[int], end_token: Any) -> tuple[int, int]:
    """Where the answer is in `until`. Where tokens merge across the prompt's end, it begins before that end."""
    pairs = zip(prompt, until, strict=False)
    start, end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), len(until)
    if end_token in until[start:]:
        end -= until[::-1].index(end_token)
    return start, end
