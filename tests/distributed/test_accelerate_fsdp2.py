"""accelerate's FSDP2 on two ranks against one process on the same global batches."""

import pytest
import torch
from peft import PeftModel
from ranks import Failure
from tiny import llama, logits
from versions import needs_fsdp2_on_a_cpu

SCRIPT = "accelerate_fsdp2"
METHODS = [pytest.param("LoRA", marks=pytest.mark.slow), "default", "GradDrop held"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@needs_fsdp2_on_a_cpu
@pytest.mark.parametrize("efficient", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_and_save_what_one_process_does(ranks, base, tmp_path, method, efficient):
    settings = {"method": method, "base": str(base), "efficient": efficient}
    first, second = ranks("train", folder=str(tmp_path / "two"), **settings)
    (one,) = ranks("train", world=1, folder=str(tmp_path / "one"), **settings)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), f"the ranks disagree on {name}"
        assert torch.allclose(tensor.double(), one["state"][name].double(), atol=1e-5), name
    from_one, from_two = (logits(PeftModel.from_pretrained(llama(), tmp_path / each)) for each in ("one", "two"))
    assert torch.allclose(from_two, from_one, atol=1e-5)
    assert not torch.allclose(from_one, logits(llama()), atol=1e-3)


@pytest.mark.parametrize(("basis", "reader"), [("svd", "`basis='svd'`"), ("hosvd", "the warm-up")])
def test_what_needs_weights_that_rank_0_alone_has_is_refused_on_every_rank(ranks, base, basis, reader):
    with pytest.raises(Failure) as failure:
        ranks("refused", base=str(base), basis=basis)
    for error in failure.value.errors:
        assert error.startswith(f"ValueError: {reader} needs the weights, which `cpu_ram_efficient_loading` reads")
