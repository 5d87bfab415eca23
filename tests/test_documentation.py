"""README, method cards and site: commands exist, links lead somewhere, messages are the package's."""

import re
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("peft_sparsegrad/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
TEXT = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in PAGES}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


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
        assert re.match(r"(pip|python3? -m venv|accelerate|export|cd|HF_|jupyter)", command), (
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
            "does not require grad", "'Stream' object", "FSDP expects uniform", "'NoneType' object",
            "LOAD REPORT", "slots | MISSING")  # fmt: skip


@pytest.mark.parametrize("message", [m for m in MESSAGES if not m.startswith(NOT_OURS)])
def test_message_under_troubleshooting_is_one_that_the_package_gives(message):
    assert message in package_strings(), message


@cache
def package_strings() -> str:
    """All source text, with string literals that are broken over lines joined again."""
    source = "".join(path.read_text("utf-8") for path in (ROOT / "peft_sparsegrad").rglob("*.py"))
    return re.sub(r"\"\n\s*f?\"", "", source)


@pytest.mark.parametrize("page", [page for page in TEXT if page.startswith("docs/")])
def test_no_word_of_a_heading_is_glued_to_code(page):
    """A quoted message with code in it needs double backticks, or its own quotation ends at the code."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE), re.M)
    code = [span for heading in headings for span in re.findall(r"`([^`]*)`", re.sub(r"``.+?``", "", heading))]
    assert not [span for span in code if span != span.strip()]
