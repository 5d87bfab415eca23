"""The two new members of PEFT's enum of methods."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys

import pytest
from fresh import run_program
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_sparsegrad
from peft_sparsegrad import SparseGradConfig, SparseGradModel
from peft_sparsegrad.common import registration
from peft_sparsegrad.common.registration import add_peft_type, register

NAMES = pytest.mark.parametrize("name", ["SPARSEGRAD", "GRADDROP"])


@NAMES
def test_lookup_by_value_name_and_attribute(name):
    member = getattr(PeftType, name)
    assert PeftType(name) is PeftType[name] is member is PeftType.__members__[name]
    assert type(member) is PeftType
    assert member in list(PeftType)
    assert member in PeftType
    assert (member.name, member.value) == (name, name)


@NAMES
def test_behaves_as_a_string(name):
    member = PeftType[name]
    assert member == name
    assert hash(member) == hash(name)
    assert {member: 1}[name] == 1
    assert json.loads(json.dumps({"peft_type": member, member: 1})) == {"peft_type": name, name: 1}
    assert member != PeftType.LORA


@NAMES
def test_prints_like_peft_s_own_members(name):
    lora, ours = (f"{member}|{member!s}|{member!r}" for member in (PeftType.LORA, PeftType[name]))
    assert ours == lora.replace("LORA", name)


@NAMES
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_to_itself(name, protocol):
    member = PeftType[name]
    assert pickle.loads(pickle.dumps(member, protocol)) is member


@NAMES
def test_copies_are_the_member_itself(name):
    member = PeftType[name]
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert copy.deepcopy({"a": [member]})["a"][0] is member


def test_the_other_members_are_what_they_were():
    members = list(PeftType)
    assert len(members) == len(set(members)) == len(PeftType) == len(PeftType.__members__)
    assert members[-2:] == ["SPARSEGRAD", "GRADDROP"]
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")


def test_every_module_of_peft_sees_the_member():
    """They hold the class itself, so it must not have been replaced."""
    held = {
        module.PeftType
        for name, module in sys.modules.items()
        if name.startswith("peft") and "PeftType" in dir(module)
    }
    assert held == {PeftType}


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPARSEGRAD] is SparseGradConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SPARSEGRAD] is SparseGradModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SPARSEGRAD] == "sparsegrad_" == SparseGradModel.prefix


@pytest.mark.parametrize("module", [peft_sparsegrad, registration])
def test_reload_changes_nothing(module):
    before = [*PeftType, PeftType.SPARSEGRAD], dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    member = PeftType.SPARSEGRAD
    importlib.reload(module)
    after = [*PeftType, PeftType.SPARSEGRAD], dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    assert after == before
    assert PeftType.SPARSEGRAD is member


def test_adding_a_member_twice_returns_it():
    count = len(PeftType)
    assert add_peft_type("SPARSEGRAD") is PeftType.SPARSEGRAD
    assert add_peft_type("LORA") is PeftType.LORA
    assert len(PeftType) == count


def foreign(name: str) -> type:
    return type(name, (), {"__module__": "another_package.tuners"})


def test_name_that_another_package_has_taken():
    with pytest.raises(RuntimeError, match=r"'sparsegrad' is already registered by peft_sparsegrad\.sparsegrad"):
        register("sparsegrad", foreign("Config"), foreign("Model"))
    with pytest.raises(RuntimeError, match=r"'lora' is already registered by peft\.tuners\.lora"):
        register("lora", SparseGradConfig, SparseGradModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPARSEGRAD] is SparseGradConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA].__name__ == "LoraConfig"


@pytest.mark.parametrize("name", ["lora_x", "sparsegrad_two"])
def test_prefix_that_clashes_and_nothing_is_left_behind(name):
    before = list(PeftType)
    with pytest.raises(RuntimeError, match="clashes with"):
        register(name, foreign("Config"), foreign("Model"))
    assert name.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING
    assert list(PeftType) == before


# What a process of its own makes of it, before it imports the plug-in and afterwards.

READ = """
import importlib, json, pickle, sys
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

directory = sys.argv[1]
answer = {"imported_by_peft": "peft_sparsegrad" in sys.modules, "members_before": [m.name for m in PeftType]}
try:
    PeftConfig.from_pretrained(directory)
except Exception as error:
    answer["error"] = [type(error).__name__, str(error)]

import peft_sparsegrad

config = PeftConfig.from_pretrained(directory)
answer["config"] = [type(config).__name__, config.peft_type, config.rank, config.density]
answer["members"] = [m.name for m in PeftType]
with open(directory + "/member.pickle", "rb") as file:
    answer["same"] = pickle.load(file) is PeftType.SPARSEGRAD
for module in (sys.modules["peft_sparsegrad.sparsegrad.config"], peft_sparsegrad.sparsegrad, peft_sparsegrad):
    importlib.reload(module)
answer["reloaded"] = [
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPARSEGRAD] is peft_sparsegrad.SparseGradConfig is not type(config),
    type(PeftConfig.from_pretrained(directory)) is peft_sparsegrad.SparseGradConfig,
]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh process says about a saved configuration."""
    directory = tmp_path_factory.mktemp("adapter")
    SparseGradConfig(rank=(3, 4), density=0.5, target_modules=["up"]).save_pretrained(str(directory))
    (directory / "member.pickle").write_bytes(pickle.dumps(PeftType.SPARSEGRAD))
    done = run_program("-c", READ, directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_import_peft_s_own_error_names_the_method(fresh):
    assert not fresh["imported_by_peft"]
    assert fresh["error"] == ["KeyError", "'SPARSEGRAD'"]
    assert "SPARSEGRAD" not in fresh["members_before"]


def test_saved_configuration_in_a_fresh_process(fresh):
    assert fresh["config"] == ["SparseGradConfig", "SPARSEGRAD", [3, 4], 0.5]
    assert fresh["members"] == [*fresh["members_before"], "SPARSEGRAD", "GRADDROP"]
    assert fresh["same"]


def test_reload_of_the_classes_registers_the_new_ones(fresh):
    assert fresh["reloaded"] == [True, True]
