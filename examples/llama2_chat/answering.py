"""One answer of a chat model to a conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from peft_sparsegrad.cli.errors import InputError

from .chat_template import prompt_ids
from .oasst import Conversation


@dataclass(frozen=True)
class Answer:
    """The text that the model wrote, and how many tokens at the beginning of its prompt had to be cut off."""

    text: str
    cut: int


@torch.inference_mode()
def write_answer(
    model: Any,
    tokenizer: Any,
    messages: Conversation,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> Answer:
    """Write the assistant's next message.

    Args:
        messages: The conversation, a user's message last.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from the whole distribution.
        streamer: Receives the tokens as they come; one of transformers'.

    Raises:
        InputError: As for `room_for_prompt`.
    """
    prompt = prompt_ids(tokenizer, messages)
    # The oldest tokens are the least missed.
    kept = prompt[-room_for_prompt(model, max_new_tokens) :]
    tokens = torch.tensor([kept], device=model.device)
    # Given one by one, these win over the model's own generation settings, which may ask for sampling.
    written = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=streamer,
        **_sampling(temperature),
    )[0, len(kept) :]
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    return Answer(text, cut=len(prompt) - len(kept))


def room_for_prompt(model: Any, max_new_tokens: int) -> int:
    """Tokens that the model's positions leave for a prompt; an InputError if there are none."""
    positions = getattr(model.config, "max_position_embeddings", sys.maxsize)
    if max_new_tokens >= positions:
        raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {positions} positions")
    return positions - max_new_tokens


def _sampling(temperature: float) -> dict[str, Any]:
    if not temperature:
        return {"do_sample": False, "num_beams": 1}
    return {"do_sample": True, "num_beams": 1, "temperature": temperature, "top_k": 0, "top_p": 1.0}
