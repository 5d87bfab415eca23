"""generate.py: FastChat's format, adapter and merged, a run that is killed, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from llama2_chat_runs import kill_when, limited_files, questions, read_lines, run, write_lines
from transformers import GenerationConfig

from examples.llama2_chat.answering import write_answer
from examples.llama2_chat.chat_template import load_tokenizer, prompt_ids
from examples.llama2_chat.generate import main
from examples.llama2_chat.load_model import load_base, load_finetuned
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError


def command(model, questions, out, *further, tokens=8):
    return [
        "--model",
        str(model),
        "--questions",
        str(questions),
        "--out",
        str(out),
        "--max-new-tokens",
        str(tokens),
        *further,
    ]


def turns(path):
    return {record["question_id"]: record["choices"][0]["turns"] for record in read_lines(path)}


def test_answers_in_fastchats_format(adapter, question_file, tmp_path):
    main(command(adapter, question_file, tmp_path / "a.jsonl", "--model-id", "tuned"))
    records = read_lines(tmp_path / "a.jsonl")
    assert [record["question_id"] for record in records] == [81, 82, 83]
    for record in records:
        assert record.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert record["model_id"] == "tuned"
        assert record["choices"][0]["index"] == 0
        assert [type(turn) for turn in record["choices"][0]["turns"]] == [str, str]
    assert len({record["answer_id"] for record in records}) == 3


def test_a_model_id_that_would_lead_to_another_folder_is_refused(adapter, question_file):
    given = ["--model", str(adapter), "--questions", str(question_file), "--model-id", "../x"]
    with pytest.raises(InputError, match=r"'\.\./x' cannot be .* in outputs/answers: give --out or --model-id"):
        main(given)


def test_each_turn_is_greedy_after_the_models_own_earlier_answers(adapter, question_file, tmp_path):
    """Against a plain loop over the logits."""
    main(command(adapter, question_file, tmp_path / "a.jsonl"))
    model, tokenizer = load_finetuned(adapter, None, merge=False), load_tokenizer(adapter)
    question, answers = questions()[0], turns(tmp_path / "a.jsonl")[81]
    messages = []
    for turn, answer in zip(question["turns"], answers, strict=True):
        messages.append({"role": "user", "content": turn})
        tokens, start = prompt_ids(tokenizer, messages), len(prompt_ids(tokenizer, messages))
        while len(tokens) - start < 8 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert tokenizer.decode(tokens[start:], skip_special_tokens=True).strip() == answer
        messages.append({"role": "assistant", "content": answer})
    assert any(answers)


def test_merged_answers_the_same_and_the_base_something_else(base, adapter, question_file, tmp_path):
    main(command(adapter, question_file, tmp_path / "adapter.jsonl"))
    main(command(adapter, question_file, tmp_path / "merged.jsonl", "--merge"))
    main(command(base, question_file, tmp_path / "base.jsonl"))
    assert turns(tmp_path / "adapter.jsonl") == turns(tmp_path / "merged.jsonl")
    assert turns(tmp_path / "adapter.jsonl") != turns(tmp_path / "base.jsonl")


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_answers(adapter, tmp_path):
    """Sampled ones, so that the random state matters."""
    asked = write_lines(tmp_path / "questions.jsonl", questions(8))
    out = tmp_path / "killed.jsonl"
    sampled = command(adapter, asked, out, tokens=60)
    kill_when(out, lambda path: path.exists() and path.read_bytes().count(b"\n") >= 2, "generate", *sampled)
    kept = len(read_lines(out))
    assert kept < 8
    with out.open("a") as file:
        file.write('{"question_id": 88, "cho')
    assert run("generate", *sampled).returncode == 0
    main(command(adapter, asked, tmp_path / "through.jsonl", tokens=60))
    assert turns(out) == turns(tmp_path / "through.jsonl")
    assert len(read_lines(out)) == 8


def test_temperature_and_seed_matter_and_are_those_of_the_category(adapter, question_file, tmp_path):
    """In FastChat's table mathematics is answered with the likeliest token, writing is sampled."""
    found = {}
    for name, further in {
        "greedy": ["--temperature", "0"], "sampled": ["--temperature", "1.5"], "category": [],
        "other seed": ["--seed", "1"],
    }.items():  # fmt: skip
        main(command(adapter, question_file, tmp_path / f"{name}.jsonl", *further, tokens=16))
        found[name] = turns(tmp_path / f"{name}.jsonl")
    assert found["category"][81] == found["other seed"][81] == found["greedy"][81] != found["sampled"][81]
    assert found["category"] != found["other seed"]


def test_greedy_wins_over_the_models_own_settings(base):
    model, tokenizer = load_base(base, "float32"), load_tokenizer(base)
    messages = [{"role": "user", "content": "Where is the dog?"}]
    expected = write_answer(model, tokenizer, messages, 16)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=5, eos_token_id=0)
    assert write_answer(model, tokenizer, messages, 16) == expected


def test_prompt_that_is_too_long_loses_its_beginning(base, tmp_path, capsys):
    model, tokenizer = load_base(base, "float32"), load_tokenizer(base)
    messages = [{"role": "user", "content": "Where is the dog? " * 60}]
    prompt = prompt_ids(tokenizer, messages)
    written = write_answer(model, tokenizer, messages, 8)
    assert written.cut == len(prompt) - (192 - 8) > 0
    expected = model.generate(torch.tensor([prompt[-184:]]), max_new_tokens=8, do_sample=False)[0, 184:]
    assert written.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    long = write_lines(tmp_path / "q.jsonl", [{**questions()[0], "turns": [messages[0]["content"]]}])
    main(command(base, long, tmp_path / "a.jsonl"))
    assert "prompts of 1 questions" in capsys.readouterr().out


def test_other_settings_do_not_mix_with_earlier_answers(adapter, question_file, tmp_path):
    out = tmp_path / "a.jsonl"
    main(command(adapter, question_file, out))
    before = out.read_bytes()
    main(command(adapter, question_file, out))
    assert out.read_bytes() == before
    with pytest.raises(InputError, match="begun with --merge False and now it is True"):
        main(command(adapter, question_file, out, "--merge"))
    main(command(adapter, question_file, out, "--merge", "--overwrite"))
    assert len(read_lines(out)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "category": "math"}, r"line 2: a record needs `question_id`, `category` and `turns`"),
        ({"question_id": 1, "category": "math", "turns": []}, "line 2"),
        ({"question_id": 1, "category": "math", "turns": [1]}, "line 2"),
        ({"question_id": None, "category": "math", "turns": ["a"]}, "line 2"),
    ],
)
def test_malformed_question_is_named(adapter, tmp_path, row, message):
    asked = write_lines(tmp_path / "q.jsonl", [questions()[0], row])
    with pytest.raises(InputError, match=message):
        main(command(adapter, asked, tmp_path / "a.jsonl"))


def test_unusable_input_is_refused_before_anything_is_written(base, adapter, question_file, tmp_path):
    out = tmp_path / "new" / "a.jsonl"
    refused = {
        "cannot read missing.jsonl": command(adapter, "missing.jsonl", out),
        "cannot load nowhere": command("nowhere", question_file, out),
        "--merge needs a folder with an adapter": command(base, question_file, out, "--merge"),
        "leaves no room for a prompt in 192 positions": command(base, question_file, out, tokens=192),
    }
    for message, given in refused.items():
        with pytest.raises(InputError, match=message):
            main(given)
    assert not out.parent.exists()
    with pytest.raises(InputError, match="was not written by this program"):
        main(command(base, question_file, question_file))


def test_full_disk_is_said_in_one_sentence(adapter, question_file, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    main(command(adapter, question_file, tmp_path / "whole.jsonl"))
    with limited_files(700), pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: main(command(adapter, question_file, out, "--model-id", "m" * 300)))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    main(command(adapter, question_file, out, "--model-id", "m" * 300))
    assert turns(out) == turns(tmp_path / "whole.jsonl")
