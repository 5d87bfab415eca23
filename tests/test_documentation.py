"""README, method cards and site: code runs, commands exist, links lead somewhere, messages are the package's."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from mixtures import mixtral
from tiny import adapted, batch, llama, tokenizer, train
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("peft_sparsegrad/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
TEXT = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in PAGES}
RUNNABLE = [page for page, text in TEXT.items() if "```python" in text]
ADAPTERS = ("docs/command-line.md",)  # pages that begin with adapters at hand


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny checkpoint and the data that the blocks speak of."""
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=64, intermediate_size=128).save_pretrained("model")
    mixtral().save_pretrained("mixture")
    tokenizer().save_pretrained("model")
    texts = [" ".join(f"t{3 + (i * step) % 60}" for step in range(12)) for i in range(1, 33)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 40), "utf-8")
    return {
        "batches": [batch(seed) for seed in range(4)],
        "train": train,
        "dataset": Dataset.from_dict({"text": texts}),
    }


@pytest.mark.parametrize("page", RUNNABLE)
def test_code_runs_from_top_to_bottom(page, workplace):
    """Python, and the lines of shell that start the command line."""
    if page in ADAPTERS:
        save_adapters()
    for number, (language, block) in enumerate(code_blocks(page), start=1):
        code = re.sub(r"path/to/(model|mixture)", r"\1", block).replace("max_steps=100", "max_steps=3, use_cpu=True")
        if language == "python":
            exec(compile(code, f"<{page}, block {number}>", "exec"), workplace)
        else:
            run_command_lines(code)


def save_adapters() -> None:
    for name, seed in {"adapter": 0, "other-adapter": 1}.items():
        torch.manual_seed(seed)
        model = adapted(AutoModelForCausalLM.from_pretrained("model"))
        train(model, lr=0.05 * (1 + seed))
        model.save_pretrained(name)


def code_blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


def run_command_lines(block: str) -> None:
    from peft_sparsegrad.cli.app import app

    for line in block.splitlines():
        if line.startswith("peft-sparsegrad "):
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            different = line.startswith("peft-sparsegrad diff") and result.exit_code == 1
            assert result.exit_code == 0 or different, f"{line}: {result.exception!r} {result.output}"


def test_pages_with_python_are_found():
    assert "README.md" in RUNNABLE
    assert len([page for page in RUNNABLE if page.startswith("docs/")]) >= 10


LINKS = [(page, link) for page, text in TEXT.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]


@pytest.mark.parametrize(("page", "link"), [(p, l) for p, l in LINKS if not l.startswith(("http", "#", "pictures/"))])
def test_relative_link_leads_to_a_file_and_a_heading(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path
    assert target.exists(), f"{page} links to {path}"
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page} links to #{anchor} of {path}"


def indented_commands(page: str) -> list[str]:
    """Shell commands in blocks that are indented, with the lines that continue them."""
    start = r"(?:\w+=\S+ )*(?:make|accelerate|peft-sparsegrad|python -m) "
    return re.findall(rf"^ {{4}}({start}.*(?:\\\n.*)*)", TEXT[page], re.MULTILINE)


COMMANDS = [
    (page, command)
    for page in TEXT
    for block in [*blocks(page, "bash"), *indented_commands(page)]
    for command in re.sub(r"\\\n\s*", "", block).splitlines()
    if command.strip() and not command.startswith("#")
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_exists_with_all_of_its_options(page, command):
    """Programs that train are started by their own tests; here every option must be one that the program has."""
    command = command.partition("  #")[0]
    options = re.findall(r"(?<=\s)--[a-z][a-z-]*", command)
    if target := re.match(r"make (\w+)", command):
        assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text("utf-8")
    elif module := re.search(r"-m ((?:examples|benchmarks)[\w.]*)(?: (\w+))?", command):
        options = re.findall(r"(?<=\s)--[a-z][a-z-]*", command[module.end() :])
        unknown = [option for option in options if option not in source_of(module[1])]
        assert not unknown, f"{page}: {module[1]} has no {unknown}"
    elif verb := re.match(r"peft-sparsegrad (\w+)", command):
        unknown = [option for option in options if option not in cli_help(verb[1])]
        assert not unknown, f"{page}: `{verb[1]}` has no {unknown}"
    else:
        assert re.match(r"(pip|python3? -m venv|accelerate|export|cd|HF_)", command), (
            f"{page}: {command} is not checked"
        )


def source_of(module: str) -> str:
    """The text of a program, of the files beside it and of the settings of methods, where its options are declared."""
    path = ROOT / module.replace(".", "/")
    folder = path if path.is_dir() else path.parent
    text = "".join(file.read_text("utf-8") for file in folder.glob("*.py"))
    if "add_variant_options" in text:
        text += (ROOT / "experiments/variant_options.py").read_text("utf-8")
    return text


@cache
def cli_help(verb: str) -> str:
    from peft_sparsegrad.cli.app import app

    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"there is no verb {verb}"
    return result.output


MESSAGES = [
    piece.strip()
    for heading in re.findall(r"^### (.*)$", TEXT["docs/troubleshooting.md"], re.MULTILINE)
    for quoted in re.findall(r"``(.+?)``|`(.+?)`(?=$|,| )", heading)
    for piece in "".join(quoted).split("…")
    if len(piece.strip(" :'`")) > 8
]
NOT_OURS = ("KeyError", "Error while deserializing header", "Target modules", "not found in the base model.",
            "unexpected keyword argument", "The version of PEFT", "Muon only", "optimizer got an empty",
            "does not require grad")  # fmt: skip


@pytest.mark.parametrize("message", [m for m in MESSAGES if not m.startswith(NOT_OURS)])
def test_message_under_troubleshooting_is_one_that_the_package_gives(message):
    assert message in package_strings(), message


@cache
def package_strings() -> str:
    """All source text, with string literals that are broken over lines joined again."""
    source = "".join(path.read_text("utf-8") for path in (ROOT / "peft_sparsegrad").rglob("*.py"))
    return re.sub(r"\"\n\s*f?\"", "", source)
