"""The workflow runs the Makefile's targets on the Pythons that the package names; the security note is true."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def test_workflow_runs_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = [target for step in STEPS for target in re.findall(r"^make (\w+)", step.get("run", ""))]
    assert set(targets) == {"quality", "docs", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)


def test_workflow_tests_every_python_that_the_package_names():
    matrix = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert f'requires-python = ">={matrix["python"][0]}"' in PROJECT
    files = [*matrix["constraints"], *(row["constraints"] for row in matrix["include"])]
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_template_has_fields_with_names_of_their_own(path):
    template = yaml.safe_load(path.read_text("utf-8"))
    fields = [field["id"] for field in template.get("body", ()) if field["type"] != "markdown"]
    assert len(fields) == len(set(fields))
    assert path.name == "config.yml" or (template["name"] and template["description"] and fields)


def test_one_version_is_named_everywhere():
    version = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)
    assert version is not None
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"git tag -a v{version[1]} " in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_the_package_unpickles_nothing_and_trusts_no_remote_code():
    for path in (ROOT / "peft_sparsegrad").rglob("*.py"):
        found = re.search(r"\bpickle\.|import pickle|torch\.load\(|trust_remote_code", path.read_text("utf-8"))
        assert found is None, path
