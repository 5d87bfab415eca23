"""The chat template, and that the loss covers the answers and their end tokens and nothing else."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.llama2_chat.chat_template import IGNORED, encode, encode_all, load_tokenizer, prompt_ids
from peft_sparsegrad.cli.errors import InputError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the dog?"},
    {"role": "assistant", "content": "By the river."},
    {"role": "user", "content": "And the cat?"},
    {"role": "assistant", "content": "In the house.\n\nOr not."},
]
TEXTS = [message["content"] for message in TALK] + ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere [/INST]"]


def sentencepiece_like(path):
    """Words that carry the space before them, as in Llama 2's tokenizer, with both ends as special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(params=["bytes", "words"])
def tokenizer(request, base, tmp_path):
    return load_tokenizer(base if request.param == "bytes" else sentencepiece_like(tmp_path))


def spans(labels: list[int]) -> list[list[int]]:
    """The runs of labels that count."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_shipped_template_is_llama_2s_format(tokenizer):
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == (
        f"{bos}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is the dog? [/INST] By the river. {eos}"
        f"{bos}[INST] And the cat? [/INST] In the house.\n\nOr not. {eos}"
    )


def test_loss_covers_the_answers_and_their_end_tokens(tokenizer):
    row = encode(tokenizer, TALK, max_length=10_000)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    learnt = [tokenizer.decode(run).strip() for run in spans(row["labels"])]
    eos = tokenizer.eos_token
    assert learnt == [f"By the river. {eos}", f"In the house.\n\nOr not. {eos}"]


def test_each_answer_is_learnt_after_the_prompt_that_generation_will_give(tokenizer):
    row = encode(tokenizer, TALK, max_length=10_000)
    for i in (2, 4):
        prompt = prompt_ids(tokenizer, TALK[:i])
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt) - 1] == IGNORED
        assert row["labels"][len(prompt)] != IGNORED


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_follows_the_end_token_is_not_learnt(tmp_path):
    """ChatML ends a turn with a line break, which nobody writes after the end token."""
    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_like(tmp_path))
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    learnt = [tokenizer.decode(run) for run in spans(encode(tokenizer, TALK, 10_000)["labels"])]
    assert [text.replace(" ", "") for text in learnt] == ["Bytheriver.<|im_end|>", "Inthehouse.\n\nOrnot.<|im_end|>"]


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    last = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = last
    with pytest.raises(InputError, match="renders earlier turns differently"):
        encode(tokenizer, TALK, 10_000)


def test_template_that_fails_says_why(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(InputError, match="no system message here"):
        encode(tokenizer, TALK, 10_000)


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tokenizer):
    whole = encode(tokenizer, TALK, 10_000)
    answer = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    assert encode_all(tokenizer, [TALK, TALK], answer) == []
    cut = encode_all(tokenizer, [TALK], answer + 1)
    assert cut == [{"input_ids": whole["input_ids"][: answer + 1], "labels": whole["labels"][: answer + 1]}]


def test_template_used_in_place_of_a_missing_one_is_announced(base, capsys):
    load_tokenizer(base)
    assert "has none, so Llama 2's is used" in capsys.readouterr().out


def test_own_template_wins_over_the_shipped_one_and_the_given_one_over_both(base, tmp_path, capsys):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    assert load_tokenizer(tmp_path).chat_template == "own"
    (tmp_path / "given.jinja").write_text("given")
    assert load_tokenizer(tmp_path, tmp_path / "given.jinja").chat_template == "given"
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="cannot read the chat template"):
        load_tokenizer(tmp_path, tmp_path / "missing.jinja")
