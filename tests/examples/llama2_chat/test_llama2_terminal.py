"""chat.py through its command line, typed into a pipe."""

from __future__ import annotations

from argparse import Namespace

import pytest
from llama2_chat_runs import run
from rich.console import Console

from examples.llama2_chat.answering import write_answer
from examples.llama2_chat.chat import ConsoleStreamer, answer, main, talk
from examples.llama2_chat.chat_template import load_tokenizer
from examples.llama2_chat.load_model import load_finetuned
from peft_sparsegrad.cli.errors import InputError

TURN = "Where is the dog?"


@pytest.fixture(scope="module")
def model(adapter):
    return load_finetuned(adapter, None, merge=False)


@pytest.fixture(scope="module")
def tokenizer(adapter):
    return load_tokenizer(adapter)


def expected(model, tokenizer, *turns, system=None):
    """The answers that the model gives to `turns` in one conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": write_answer(model, tokenizer, messages, 12).text})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_conversation_through_the_command_line(adapter, model, tokenizer):
    typed = f"{TURN}\nAnd now?\n\n/reset\n/other\n{TURN}\n/quit\nnever read\n"
    ended = run("chat", "--model", adapter, "--max-new-tokens", 12, "--system", "Be brief.", typed=typed)
    assert ended.returncode == 0, ended.stderr
    first, second = expected(model, tokenizer, TURN, "And now?", system="Be brief.")
    said = [line.partition("model:")[2].strip() for line in ended.stdout.splitlines() if "model:" in line]
    assert said == [first, second, first]
    assert first
    assert "The conversation is forgotten." in ended.stdout
    assert "There is no command /other" in ended.stdout


def test_end_of_the_input_ends_it(model, tokenizer, monkeypatch, tmp_path, capsys):
    (tmp_path / "typed").write_text(f"{TURN}\n")
    with (tmp_path / "typed").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        talk(model, tokenizer, Console(), Namespace(system=None, max_new_tokens=12, temperature=0.0))
    assert expected(model, tokenizer, TURN)[0] in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_does_not_end_it(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "/quit"])

    def type_next(*_, **__):
        line = next(typed)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_next)
    talk(None, None, Console(), Namespace(system=None))
    assert "/quit or Ctrl-D ends it" in capsys.readouterr().out
    assert next(typed, None) is None


def test_an_empty_answer_is_explained_and_its_question_taken_back(model, tokenizer, capsys):
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    settings = Namespace(max_new_tokens=12, temperature=0.0)
    end = tokenizer.eos_token_id

    def only_the_end(module, given, output):
        output.logits[..., end] = 1e4
        return output

    hook = model.get_base_model().register_forward_hook(only_the_end)
    try:
        assert answer(model, tokenizer, Console(), [*earlier, {"role": "user", "content": TURN}], settings) == earlier
    finally:
        hook.remove()
    assert "ended its answer before the first word" in capsys.readouterr().out


def test_interrupted_answer_takes_the_question_back(model, tokenizer, capsys):
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = [*earlier, {"role": "user", "content": TURN}]
    hook = model.get_base_model().register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        settings = Namespace(max_new_tokens=12, temperature=0.0)
        assert answer(model, tokenizer, Console(), asked, settings) == earlier
    finally:
        hook.remove()
    assert "the question is taken back" in capsys.readouterr().out


def test_conversation_that_is_too_long_is_announced(model, tokenizer, capsys):
    asked = [{"role": "user", "content": TURN * 40}]
    settings = Namespace(max_new_tokens=12, temperature=0.0)
    after = answer(model, tokenizer, Console(), asked, settings)
    assert [message["role"] for message in after] == ["user", "assistant"]
    assert "did not fit into the model's positions" in " ".join(capsys.readouterr().out.split())


def test_markup_in_an_answer_is_text(model, tokenizer, capsys):
    ConsoleStreamer(tokenizer, Console()).on_finalized_text("[b]bold[/b] [/x]", stream_end=True)
    assert capsys.readouterr().out == "[b]bold[/b] [/x]\n"


def test_wrong_path():
    with pytest.raises(InputError, match="cannot load nowhere"):
        main(["--model", "nowhere"])
