"""A process that loads an adapter computes what the one did that saved it."""

import re

import pytest
import torch
from fresh import run_program
from graddrop_tools import dropped
from tiny import llama, logits, train

from peft_sparsegrad import GradDrop
from peft_sparsegrad.graddrop.variants import VARIANTS


def fresh():
    return dropped()


def one_step(variant):
    model = dropped(variant=variant, num_epochs=3)
    GradDrop(model).set_epoch(1)
    train(model, steps=1)
    return model


def half_finished():
    model = dropped(variant="GradDrop-Epoch", num_epochs=4)
    graddrop = GradDrop(model)
    for epoch in range(2):
        graddrop.set_epoch(epoch)
        train(model, steps=3)
    return model


def bf16():
    model = dropped(llama().to(torch.bfloat16))
    train(model, steps=2)
    return model


def token_rows():
    model = dropped(trainable_token_indices=[3, 5])
    train(model, steps=2)
    return model


def two_layers():
    model = dropped(layers_to_transform=[0, 2])
    train(model, steps=1)
    return model


CASES = {
    "fresh": fresh,
    **{name: lambda name=name: one_step(name) for name in VARIANTS},
    "half-finished": half_finished,
    "bf16 base": bf16,
    "token rows": token_rows,
    "two layers only": two_layers,
}


@pytest.fixture(scope="module")
def seen_in_a_fresh_process(tmp_path_factory):
    """Case to whether another process, which loads the adapter, gets the same logits to the last bit."""
    root = tmp_path_factory.mktemp("adapters")
    for number, make in enumerate(CASES.values()):
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(root / str(number))
        torch.save(logits(model), root / f"{number}.pt")
    code = """
import sys, torch, peft_sparsegrad
torch.set_num_threads(1)
from pathlib import Path
from peft import PeftModel
from tiny import llama, logits
root = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    expected = torch.load(root / f"{number}.pt")
    loaded = PeftModel.from_pretrained(llama().to(expected.dtype), root / str(number))
    print("equal", number, torch.equal(logits(loaded), expected))
"""
    done = run_program("-c", code, root, len(CASES))
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, re.findall(r"equal \d+ (\w+)", done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_fresh_process_computes_the_same(seen_in_a_fresh_process, case):
    assert seen_in_a_fresh_process[case] == "True"
