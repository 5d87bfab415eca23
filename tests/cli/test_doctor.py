"""`peft-sparsegrad doctor`: real runs, and a fault that it must find."""

import importlib.util
import logging
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING


def test_everything_works_here(command):
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "peft_sparsegrad")}
    result = command("doctor", "--json")
    assert levels == {name: logging.getLogger(name).level for name in levels}, "restored for a Python program"
    assert result.code == 0
    assert result.json["versions"]["peft"] == version("peft")
    checks = {check["name"]: check for check in result.json["checks"]}
    assert {check["status"] for check in checks.values() if check["essential"]} == {"pass"}
    assert checks["registered in PEFT"]["detail"] == "SPARSEGRAD, GRADDROP, by `import peft_sparsegrad`"
    assert checks["step on the GPU"]["status"] == ("pass" if torch.cuda.is_available() else "skip")
    if importlib.util.find_spec("bitsandbytes") is None:
        assert checks["4-bit base"]["status"] == "skip"


def test_fault_is_found_and_ends_in_1(command, monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType["GRADDROP"])
    result = command("doctor")
    assert result.code == 1
    lines = {line[:40].strip(): line for line in result.out.splitlines()}
    assert "missing: GRADDROP" in next(line for line in lines.values() if "registered in PEFT" in line)
    assert "fail" in next(line for line in lines.values() if line.startswith("GradDrop:"))
    assert "pass" in next(line for line in lines.values() if line.startswith("SparseGrad:"))
    assert "reinstall peft" in result.out


def test_missing_package_is_named_with_its_extra(command, monkeypatch):
    from peft_sparsegrad.cli import doctor

    monkeypatch.setattr(doctor, "_RUNS", ())
    monkeypatch.setitem(doctor._PACKAGES, "no-such-package", "train")
    assert "not installed: pip install 'peft-sparsegrad[train]'" in command("doctor").out


def test_run_that_computes_something_else_is_told(monkeypatch):
    """The comparison behind every run."""
    from peft_sparsegrad.cli.doctor_runs import _check_same

    _check_same(torch.ones(2), torch.ones(2), 0.0)
    for found in (torch.zeros(2), torch.full((2,), float("nan"))):
        with pytest.raises(RuntimeError, match="computes something else"):
            _check_same(found, torch.ones(2), 1e-3)


def test_transformers_that_refuses_this_peft_is_told_with_the_way_out(command, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    result = command("doctor")
    assert result.code == 0, "PEFT's own functions work"
    line = next(line for line in result.out.splitlines() if line.startswith("transformers' own"))
    assert "fail" in line
    assert "use `get_peft_model` and `PeftModel.from_pretrained`" in " ".join(result.out.split())


def test_versions_that_do_not_go_together_are_told(command, monkeypatch):
    from peft_sparsegrad.cli import doctor, doctor_versions

    asked = {"trl": ["transformers>=99", "accelerate", "torch>=99; extra == 'other'", "vllm>=99"]}
    monkeypatch.setattr(doctor_versions, "requires", asked.get)
    monkeypatch.setattr(doctor, "_RUNS", ())
    result = command("doctor")
    assert result.code == 1
    words = " ".join(result.out.split())
    assert f"asks for transformers>=99, installed is {version('transformers')}" in words
    assert "vllm" not in words
    assert ">=99;" not in words


def test_versions_installed_here_go_together():
    from peft_sparsegrad.cli.doctor_versions import conflicts

    assert conflicts(["peft-sparsegrad", "peft", "transformers", "trl", "accelerate", "no-such-package"]) == []


def test_what_needs_newer_versions_is_told_and_is_no_fault(command, monkeypatch):
    from peft_sparsegrad.cli import doctor, doctor_versions

    monkeypatch.setattr(doctor, "_RUNS", ())
    assert "FSDP2" not in command("doctor").out or Version(version("torch")) < Version("2.8")
    monkeypatch.setattr(doctor_versions, "_version", {"torch": "2.7.1+cpu", "transformers": "5.2.0"}.get)
    check = next(check for check in command("doctor", "--json").json["checks"] if "newer" in check["name"])
    assert (check["status"], check["essential"]) == ("skip", False)
    assert "FSDP2 with a base of another dtype than the adapter's (torch>=2.8)" in check["detail"]
    assert "FSDP2 on a CPU" not in check["detail"]
    assert "DeepSpeed" not in check["detail"]
    assert "bitsandbytes" not in check["detail"], "what is not installed is no news"
