"""Models that are split over two ranks before the adapter is added."""

import re

import pytest
import split_models
from peft import get_peft_model
from tiny import llama
from versions import needs_splitting_on_loading

SCRIPT = "split_models"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the model and of an adapter of each method."""
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder / "base")
    adapters = {"SparseGrad": folder / "SparseGrad", "GradDrop": folder / "GradDrop"}
    for method, path in adapters.items():
        get_peft_model(llama(), split_models.CONFIGS[method]()).save_pretrained(path)
    return {"base": str(folder / "base"), "adapters": {method: str(path) for method, path in adapters.items()}}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("from_pretrained, tensors", marks=needs_splitting_on_loading),
        pytest.param("from_pretrained, FSDP", marks=needs_splitting_on_loading),
        pytest.param("from_pretrained, pipeline", marks=needs_splitting_on_loading),
        "FSDP2",
        "FSDP1",
        "FSDP1, original parameters",
    ],
)
def test_an_adapter_on_a_model_that_is_split_already(ranks, saved, kind):
    for messages in ranks("refusals", kind=kind, **saved):
        for message in messages:
            assert re.fullmatch(
                r"the (model|weight of the target module '.*_proj') is split over devices: load the model without "
                "`tp_plan` and `distributed_config`, add the adapter, and split the model afterwards, with FSDP",
                message,
            )


def test_merging_into_a_model_that_is_split(ranks):
    for messages in ranks("merged_afterwards"):
        assert len(messages) == len(split_models.CONFIGS)
        assert all("split over devices, where an adapter cannot be merged: save it" in each for each in messages)
