"""Two ranks that talk through gloo against one process on the same global batches."""

import ddp_script
import pytest
import torch
from versions import RESUMES_ON_CPU_RANKS, needs_resuming_on_cpu_ranks

SCRIPT, RESUMED = "ddp_script", "trainer resumed"


@pytest.fixture(scope="module")
def of_ranks(ranks, tmp_path_factory):
    names = [name for name in ddp_script.RUNS if name != RESUMED or RESUMES_ON_CPU_RANKS]
    return ranks("run_all", folder=str(tmp_path_factory.mktemp("ranks")), names=names)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_resuming_on_cpu_ranks if n == RESUMED else ()) for n in ddp_script.RUNS]
)
def test_two_ranks_train_the_same_adapter_as_one(of_ranks, name, tmp_path):
    one = ddp_script.run(name, tmp_path)
    first, second = (rank[name] for rank in of_ranks)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), f"the ranks disagree on {key}"
    if "renewing" in name:
        counted = {int(value) for key, value in one["state"].items() if key.endswith(".steps")}
        assert counted == {8}, "both renewals lie within the run, after a quarter of its ten steps for the warm-up"
    for layer, delta in one["deltas"].items():
        assert torch.equal(first["supports"][layer], one["supports"][layer])
        assert delta.abs().max() > 1e-3
        assert torch.allclose(first["deltas"][layer], delta, atol=1e-5), (first["deltas"][layer] - delta).abs().max()


@needs_resuming_on_cpu_ranks
def test_resumed_run_of_two_ranks_is_the_uninterrupted_one(of_ranks):
    """Bit for bit, from the files that rank 0 has written, which hold the gradient sums of both."""
    for rank in of_ranks:
        result = rank["trainer resumed"]
        assert all(torch.equal(result["state"][key], value) for key, value in result["through"].items())
