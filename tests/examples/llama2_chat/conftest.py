"""A tiny chat model on the disk, an adapter for it, conversations to learn from, and questions to answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama2_chat_runs import conversations, options, questions, write_lines
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from examples._small_llama import train_tokenizer
from examples.llama2_chat.finetune import main as finetune


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the words, and nothing of questions and answers."""
    path = tmp_path_factory.mktemp("base")
    texts = [message["content"] for row in conversations() for message in row["messages"]]
    tokenizer = train_tokenizer([*texts, "[INST] [/INST] <<SYS>>"], vocabulary=400)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=192, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    tokens = torch.tensor(tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"])
    batch = tokens[: len(tokens) // 64 * 64].view(-1, 64)[:16]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "conversations.jsonl", conversations())


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "questions.jsonl", questions())


@pytest.fixture(scope="session")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "adapter"
    assert finetune(options(base, data, out, steps=30, save_steps=30)) == 0
    return out
