"""Ten questions that a chat model of this size can answer, and how many it still does."""

from __future__ import annotations

from typing import Any

import torch

from examples.llama2_chat.chat_template import prompt_ids

NEW_TOKENS = 32
QUESTIONS = {
    "What is the capital of France?": ("paris",),
    "What is the capital of Germany?": ("berlin",),
    "What is the capital of Italy?": ("rome",),
    "What is the capital of Japan?": ("tokyo",),
    "What is the largest planet in our solar system?": ("jupiter",),
    "How many days are in a week?": ("seven", "7"),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "What is the chemical symbol of water?": ("h2o", "h₂o"),
    "What is the opposite of hot?": ("cold",),
    "On which continent is Egypt?": ("africa",),
}


def question_tokens(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the questions' prompts, padded on the left, and the attention mask: both (questions, length)."""
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


def answers(model: Any, tokenizer: Any, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Return the model's greedy answers."""
    device = next(model.parameters()).device
    written = model.generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)


def count_right(texts: list[str]) -> int:
    """Return how many of the answers hold a key word of their question."""
    return sum(
        any(word in text.lower() for word in words) for text, words in zip(texts, QUESTIONS.values(), strict=True)
    )
