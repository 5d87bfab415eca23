"""Saves that are killed, or that several processes make into one folder: the folder holds a whole adapter."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, llama, logits, train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_sparsegrad import GradDropConfig, save_transition_matrices, warmup
from peft_sparsegrad.common.files.checksum import CHECKSUM

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def sparsegrad():
    model = adapted(warmup_steps=4, renewal_steps=0)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    return model


def graddrop():
    targets = {"target_modules": ["up_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    return get_peft_model(llama(), GradDropConfig(task_type="CAUSAL_LM", save_density=0.5, **targets))


METHODS = {"sparsegrad": sparsegrad, "graddrop": graddrop}


def fill(model, number: float) -> None:
    """Give all trained values of a model one number."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(number)


def save_without_end(model, folder: Path, first: int) -> None:
    """Save again and again, with another number in every save."""
    for number in itertools.count(first):
        fill(model, number)
        model.save_pretrained(folder)


def in_child(work) -> int:
    """Run `work` in a process of its own; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return process


def loaded_number(folder: Path) -> float:
    """Load the adapter, and return the number that all of its trained values have."""
    model = PeftModel.from_pretrained(llama(), folder)
    numbers = {
        float(number)
        for name, parameter in model.named_parameters()
        if "sparsegrad_" in name or "graddrop_" in name or "modules_to_save" in name
        for number in parameter.unique()
    }
    assert len(numbers - {0.0}) == 1  # zeros where `save_density` left entries out
    return max(numbers)


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_folder_is_whole_after_every_kill(tmp_path, name, kills):
    model, random, numbers = METHODS[name](), Random(0), set()
    model.save_pretrained(tmp_path)
    for kill in range(kills):
        before = (tmp_path / FILE).stat().st_mtime_ns
        process = in_child(lambda: save_without_end(model, tmp_path, first=1 + 1000 * kill))  # noqa: B023
        while (tmp_path / FILE).stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        json.loads((tmp_path / CONFIG).read_text())
        numbers.add(loaded_number(tmp_path))
    assert len(numbers) == kills


@pytest.mark.parametrize("name", METHODS)
def test_tensors_of_a_save_that_was_killed_before_its_configuration_load(tmp_path, name):
    """New tensors, without a checksum yet, beside the configuration of the save before."""
    model = METHODS[name]()
    train(model)
    model.save_pretrained(tmp_path)
    train(model)
    save_file(get_peft_model_state_dict(model), tmp_path / FILE, {"format": "pt"})
    expected = load_file(tmp_path / FILE)
    again = get_peft_model_state_dict(PeftModel.from_pretrained(llama(), tmp_path))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", METHODS)
def test_processes_that_save_into_one_folder_do_not_collide(tmp_path, name):
    model = METHODS[name]()

    def save_for_a_while():
        end = time.monotonic() + 2
        fill(model, os.getpid() % 97 + 2)
        while time.monotonic() < end:
            model.save_pretrained(tmp_path)

    processes = [in_child(save_for_a_while) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0, 0]
    assert loaded_number(tmp_path) in {process % 97 + 2 for process in processes}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, FILE]


def test_transition_matrices_are_whole_after_each_of_ten_kills(tmp_path):
    model, random, path = sparsegrad(), Random(0), tmp_path / "matrices.safetensors"
    save_transition_matrices(model, path)

    def save():
        while True:
            save_transition_matrices(model, path)

    for _ in range(10):
        process = in_child(save)
        time.sleep(random.uniform(0.005, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        adapted(warmup_steps=4, transition_matrices=str(path))


@pytest.mark.parametrize("name", METHODS)
def test_a_flipped_bit_is_found_that_only_the_checksum_can_tell(tmp_path, name):
    model = METHODS[name]()
    train(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert file.metadata().keys() == {"format", CHECKSUM}
    data = bytearray((tmp_path / FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / FILE).write_bytes(data)
    base = llama()
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' is damaged: the checksum of its tensors is"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == before


@pytest.mark.parametrize("how", ["state dict", "another tool", "another dtype", "another folder"])
def test_tensors_that_were_changed_on_purpose_raise_no_alarm(tmp_path, how):
    model = sparsegrad()
    train(model)
    model.save_pretrained(tmp_path)
    tensors = {key: t / 2 if key.endswith("values") else t for key, t in load_file(tmp_path / FILE).items()}
    if how == "another dtype":
        tensors = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
    if how == "state dict":
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        set_peft_model_state_dict(loaded, tensors)
    elif how == "another folder":
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        train(model)
        model.save_pretrained(tmp_path / "later")
        loaded.load_adapter(tmp_path / "later", "default")
        assert torch.equal(logits(loaded), logits(model))
        return
    else:
        save_file(tensors, tmp_path / FILE, {"format": "pt"})
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    values = {key: t for key, t in get_peft_model_state_dict(loaded).items() if key.endswith("values")}
    assert all(torch.equal(values[key], tensors[key].float()) for key in values)


@pytest.mark.parametrize("name", METHODS)
def test_a_wrapper_whose_names_peft_does_not_know_is_an_error_and_no_file_without_its_tensors(tmp_path, name):
    model = METHODS[name]()
    layers: Any = model.get_submodule("base_model.model.model.layers")
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(ValueError, match=r"PEFT would leave 'base_model.*layers\.0.* out of the file.* use FSDP2"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
