"""The code of README, method cards and site runs as it stands, with tiny models in the place of the public ones.

A public model is a folder of its name, `HuggingFaceTB/SmolLM2-135M-Instruct`, in the working directory, which
`from_pretrained` prefers to the hub. Each block runs in a namespace of its own, unless its page says that `IN_ORDER`.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from mixtures import qwen3_moe
from test_documentation import TEXT
from tiny import adapted, llama, tokenizer_of_characters
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_sparsegrad.cli.app import app

CHAT_MODEL, MIXTURE = "HuggingFaceTB/SmolLM2-135M-Instruct", "allenai/OLMoE-1B-7B-0924"
IN_ORDER = "The blocks of this page run one after the other"
PAGES = [page for page, text in TEXT.items() if "```python" in text]
WIDTH = 88  # what a page of the site shows in a window of 1280 pixels


def code_blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the models that the pages name, two adapters and a text for the command line."""
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(CHAT_MODEL)
    tokenizer_of_characters().save_pretrained(CHAT_MODEL)
    qwen3_moe().save_pretrained(MIXTURE)
    texts = [f"{a} plus {b} is {a + b}" for a in range(40) for b in range(40)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_as_it_stands(page, workplace):
    """Python, and the lines of shell that start the command line; a long training run is cut short."""
    if page == "docs/command-line.md":  # it begins with adapters at hand
        save_adapters()
    in_order = IN_ORDER in " ".join(TEXT[page].split())
    namespace = {}
    for number, (language, block) in enumerate(code_blocks(page), start=1):
        namespace = namespace if in_order else {"__name__": "__main__"}
        code = block.replace("max_steps=100", "max_steps=3")
        if language == "python":
            exec(compile(code, f"<{page}, block {number}>", "exec"), namespace)
        else:
            run_command_lines(code)


def save_adapters() -> None:
    for name, seed in {"adapter": 0, "other-adapter": 1}.items():
        torch.manual_seed(seed)
        model = adapted(AutoModelForCausalLM.from_pretrained(CHAT_MODEL))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(name)


def run_command_lines(block: str) -> None:
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        if line.startswith("peft-sparsegrad "):
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            different = line.startswith("peft-sparsegrad diff") and result.exit_code == 1
            assert result.exit_code == 0 or different, f"{line}: {result.exception!r} {result.output}"


def test_pages_with_python_are_found():
    assert "README.md" in PAGES
    assert len([page for page in PAGES if page.startswith("docs/")]) >= 10


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_lines_of_python_fit_the_page(page):
    lines = [line for language, block in code_blocks(page) for line in block.splitlines() if language == "python"]
    assert not [line for line in lines if len(line) > WIDTH]
