"""`--help` of each program says of every option what it is and what it is without it."""

from __future__ import annotations

import re

import pytest

from examples.llama2_chat import chat, finetune, generate, judge


@pytest.mark.parametrize("program", [finetune, generate, judge, chat], ids=lambda program: program.__name__)
def test_every_option_states_its_default(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # an option and its help in one line
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    text = re.sub(r"\n {6,}", "  ", capsys.readouterr().out)  # the help of a long option begins in the next line
    options = re.findall(r"^  (--[a-z-]+)(.*)$", text, re.MULTILINE)
    assert len(options) >= 7
    assert [name for name, text in options if not re.search(r"\(.+\)$", text)] == []
