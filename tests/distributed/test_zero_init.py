"""Models whose weights DeepSpeed's ZeRO-3 splits over two ranks while they are made."""

import importlib.util

import pytest
import torch
from tiny import llama

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")

SCRIPT = "zero_init"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(attention_bias=True, mlp_bias=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["LoRA", "SparseGrad", "a basis of the weights", "GradDrop"])
def test_an_adapter_on_weights_that_are_split_is_that_on_whole_ones(ranks, base, method):
    for found in ranks("adapted", base=base, method=method):
        whole, split = found["one piece"], found["split"]
        for name, tensor in whole["tensors"].items():
            assert torch.equal(tensor, split["tensors"][name]), name
        assert whole["tensors"].keys() == split["tensors"].keys()
        assert torch.allclose(whole["logits"], split["logits"], atol=1e-5)


def test_merging_into_weights_that_are_split(ranks, base):
    for messages in ranks("merged", base=base):
        assert len(messages) == 2
        assert all("split over devices, where an adapter cannot be merged: save it" in each for each in messages)
