"""Tiny models and data that the tests, and the scripts they start, have in common."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_sparsegrad import SparseGradConfig, create_sparsegrad_optimizer

VOCAB, LENGTH = 64, 12


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **{**sizes, **special, **settings}))


def bert(**settings) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **{**sizes, **settings}))


def batch(seed: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    """Language modelling on noise with a pattern (every other token repeats), the last quarter padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
    ids[:, 1::2] = ids[:, 0::2]
    mask = torch.ones_like(ids)
    mask[size // 2 :, -LENGTH // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of a dataset for the Trainer, all of one length."""
    ids = batch(seed, size=count)["input_ids"].tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]


def adapted(model=None, **settings):
    """A PEFT model with a SparseGrad adapter, at 5% unless `num_values` are given, and ready to train by default."""
    size = {} if "num_values" in settings else {"density": 0.05}
    settings = {**size, "warmup_steps": 0, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(llama() if model is None else model, SparseGradConfig(**settings))


def train(model, steps: int = 5, lr: float = 0.05, optimizer=None) -> list[float]:
    """A plain loop; the losses. Dynamic supports need an optimizer of their own."""
    if optimizer is None and any(getattr(m, "plan", None) is not None and m.plan.dynamic for m in model.modules()):
        optimizer = create_sparsegrad_optimizer(model, lr, weight_decay=0.01)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = model(**batch(step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_with_an_optimizer_each(model, steps: int, inside: bool) -> list[float]:
    """A loop with one SGD for each parameter, which steps after the backward pass or inside it; the losses."""
    optimizers = {p: torch.optim.SGD([p], lr=0.5) for p in model.parameters() if p.requires_grad}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    losses = []
    for parameter in optimizers if inside else ():
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(steps):
        loss = model(**batch(step % 4)).loss
        loss.backward()
        for parameter in () if inside else optimizers:
            update(parameter)
        losses.append(loss.item())
    return losses


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `t0` to `t63`, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCAB)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    """A token for each character, without regard to case; a template of a chat."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?!'()+-*/=\n"
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{char: i for i, char in enumerate(characters, start=3)}}
    assert len(words) <= VOCAB
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer
