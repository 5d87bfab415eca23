"""Two ranks under each engine of torch against one process on the same global batches."""

import engines
import pytest
import torch
from ranks import Failure
from versions import needs_fsdp2_on_a_cpu

SCRIPT = "engines"
IN_EVERY_RUN = {
    "DDP": ["default", "dynamic", "GradDrop held"],
    "FSDP2": [
        "LoRA",
        "default",
        "default, warmed up in training",
        "dynamic",
        "GradDrop held",
        "Layer-GradDrop",
        "GradDrop on LoRA, put on afterwards",
        "experts, warmed up in training",
        "GradDrop held, experts",
    ],
    "FSDP2, accumulation": ["default"],
    "FSDP2, accumulation, reduced each time": ["default"],
}
ENGINES = [*IN_EVERY_RUN, "FSDP2, offload", "DDP, accumulation", "ZeRO redundancy"]
CASES = [
    pytest.param(
        engine,
        method,
        marks=[
            *([needs_fsdp2_on_a_cpu] if engine.startswith("FSDP2") else []),
            *([] if method in IN_EVERY_RUN.get(engine, ()) else [pytest.mark.slow]),
        ],
    )
    for engine in ENGINES
    for method in engines.METHODS
]


def assert_equal(ranks, one):
    for name, tensor in ranks[0]["state"].items():
        for rank in ranks[1:]:
            assert torch.equal(tensor, rank["state"][name]), f"the ranks disagree on {name}"
        # Columns whose singular values are near to each other, or to nothing, are turned by rounding.
        atol = 5e-4 if "sparsegrad_basis" in name else 1e-5
        assert torch.allclose(tensor.double(), one["state"][name].double(), atol=atol), name
    assert ranks[0]["state"].keys() == one["state"].keys()


def assert_close(ranks, one, relative):
    """The ranks are equal, and their values near those of one process, and at nearly the same entries."""
    assert all(torch.equal(tensor, ranks[1]["state"][name]) for name, tensor in ranks[0]["state"].items())
    for name, expected in one["state"].items():
        if name.endswith(("values", "weight_delta", "lora_B.default.weight")):
            distance = (ranks[0]["state"][name].double() - expected.double()).norm()
            assert distance < relative * expected.double().norm(), name
    for name, expected in one["supports"].items():
        if expected is not None:
            assert torch.isin(ranks[0]["supports"][name], expected).double().mean() > 0.95, name


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_two_ranks_train_what_one_process_does(ranks, one_process, engine, method):
    found = ranks("train_by_torch", engine=engine, method=method)
    assert_equal(found, one_process(method, "accumulation" in engine))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", engines.METHODS)
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2, accumulation"])
def test_two_gpus_train_what_one_process_does(ranks, one_process, engine, method):
    """To the precision of two devices, on which AdamW's first steps amplify rounding."""
    found = ranks("train_by_torch", engine=engine, method=method, backend="nccl")
    assert_close(found, one_process(method, "accumulation" in engine), relative=0.02)


@needs_fsdp2_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["default", "dynamic", "GradDrop held", "GradDrop on LoRA"])
@pytest.mark.parametrize("engine", ["FSDP2, bf16", "FSDP2, bf16, accumulation, reduced each time"])
def test_bf16_comes_close_to_one_process_in_float32(ranks, one_process, engine, method):
    assert_close(ranks("train_by_torch", engine=engine, method=method), one_process(method, "accum" in engine), 0.3)


@needs_fsdp2_on_a_cpu
def test_four_ranks_of_which_some_have_no_part_of_a_layer(ranks, one_process):
    """The adapter has fewer values than FSDP2 needs for a piece for each rank."""
    found = ranks("train_by_torch", world=4, engine="FSDP2", method="few values")
    assert_equal(found, one_process("few values", False))


def test_both_renewals_are_within_the_run(one_process):
    steps = {int(value) for name, value in one_process("default", False)["state"].items() if name.endswith(".steps")}
    assert steps == {engines.STEPS}
    assert engines.STEPS >= 2 * engines.RENEWAL_STEPS


@pytest.mark.parametrize(("method", "way_out"), [
    ("default", "set `renewal_steps=0`"),
    ("dynamic", "support='static'"),
    ("experts", "set `renewal_steps=0`"),
    ("GradDrop", "another method"),
    ("GradDrop on LoRA", "train without GradDrop"),
])  # fmt: skip
def test_fsdp1_is_refused_on_every_rank_before_a_step(ranks, method, way_out):
    with pytest.raises(Failure) as failure:
        ranks("train_by_torch", engine="FSDP1", method=method)
    for error in failure.value.errors:
        assert error.startswith("RuntimeError: FSDP1 gives the layers views")
        assert "use FSDP2 (`fully_shard`, in accelerate `fsdp_version: 2`)" in error
        assert way_out in error


@pytest.mark.parametrize("method", ["LoRA", "not renewed"])
def test_fsdp1_trains_what_needs_no_more_than_gradients(ranks, one_process, method):
    found = ranks("train_by_torch", engine="FSDP1", method=method)
    one = one_process(method, False)["state"]
    trained = [name for name in one if "lora_" in name or name.endswith(".values")]
    assert trained
    for name in trained:
        assert torch.allclose(found[0]["state"][name].double(), one[name].double(), atol=1e-5), name
