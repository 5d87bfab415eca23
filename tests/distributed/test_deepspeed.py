"""Two ranks under DeepSpeed ZeRO against one process on the same global batches."""

import engines
import pytest
import torch
from peft import PeftModel
from ranks import Failure
from test_engines import assert_close, assert_equal
from tiny import llama, logits
from versions import needs_deepspeed_without_a_scheduler

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

SCRIPT = "deepspeed_engine"
HELD_LAYERS = "Layer-GradDrop"  # refused, see below
IN_FLOAT64 = "GradDrop on the default"  # which DeepSpeed rounds to float32, and near ties in a renewal turn
EXPERTS = ["experts", "GradDrop held, experts"]  # refused under ZeRO-3, where LoRA's fail
IN_EVERY_RUN = {
    "ZeRO-1": [],
    "ZeRO-2": ["default", "GradDrop held"],
    "ZeRO-3": ["default", "dynamic", "GradDrop held"],
    "accumulation, ZeRO-2": ["default and a head, warmed up afterwards"],
    "accumulation, ZeRO-3": [],
}
CASES = [
    pytest.param(engine, method, marks=[] if method in often else pytest.mark.slow)
    for engine, often in IN_EVERY_RUN.items()
    for method in engines.METHODS
    if method not in (HELD_LAYERS, IN_FLOAT64) and not ("ZeRO-3" in engine and "experts" in method)
]


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_two_ranks_train_what_one_process_does(ranks, one_process, engine, method):
    found = ranks("train_by_deepspeed", engine=engine, method=method)
    assert_equal(found, one_process(method, "accumulation" in engine))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "accumulation, ZeRO-2"])
def test_what_is_held_follows_renewals(ranks, one_process, engine):
    found = ranks("train_by_deepspeed", engine=engine, method=IN_FLOAT64)
    assert_close(found, one_process(IN_FLOAT64, "accumulation" in engine), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["default", "dynamic", "GradDrop held", "GradDrop on LoRA"])
@pytest.mark.parametrize("engine", ["bf16, ZeRO-1", "bf16, ZeRO-2", "bf16, ZeRO-3"])
def test_bf16_comes_close_to_one_process_in_float32(ranks, one_process, engine, method):
    assert_close(ranks("train_by_deepspeed", engine=engine, method=method), one_process(method, False), 0.3)


@pytest.mark.parametrize("engine", ["ZeRO-2", pytest.param("ZeRO-3", marks=pytest.mark.slow)])
def test_held_layers_are_refused_on_every_rank(ranks, engine):
    with pytest.raises(Failure) as failure:
        ranks("train_by_deepspeed", engine=engine, method=HELD_LAYERS)
    for error in failure.value.errors:
        assert "set frozen='gradient', or use FSDP2" in error


@pytest.mark.parametrize("method", EXPERTS)
def test_experts_are_refused_under_zero_3_on_every_rank(ranks, method):
    with pytest.raises(Failure) as failure:
        ranks("train_by_deepspeed", engine="ZeRO-3", method=method)
    for error in failure.value.errors:
        assert "use ZeRO-2 or FSDP2, or leave `target_parameters` out" in error


@needs_deepspeed_without_a_scheduler
@pytest.mark.parametrize(("engine", "method"), [
    ("ZeRO-2", "default, warmed up in training"),
    *(
        pytest.param(engine, method, marks=pytest.mark.slow)
        for engine in ("ZeRO-2", "ZeRO-3")
        for method in ("LoRA", "default", "GradDrop held")
    ),
])  # fmt: skip
def test_trainer_trains_saves_and_resumes(ranks, tmp_path, engine, method):
    settings = {"engine": engine, "method": method}
    through = ranks("train_by_trainer", folder=str(tmp_path / "two"), **settings)
    assert_equal(through, ranks("train_by_trainer", world=1, folder=str(tmp_path / "one"), **settings)[0])
    resumed = ranks("train_by_trainer", folder=str(tmp_path / "two"), **settings)
    for name, tensor in through[0]["state"].items():
        assert torch.equal(resumed[0]["state"][name], tensor), name
    two, one = (PeftModel.from_pretrained(llama(), tmp_path / each / "saved") for each in ("two", "one"))
    assert torch.allclose(logits(two), logits(one), atol=1e-5)
    assert not torch.allclose(logits(one), logits(llama()), atol=1e-3)
