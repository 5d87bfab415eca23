"""What two ranks hold in training, against what `benchmarks.rank_memory` counts on the meta device."""

import importlib.util

import pytest
from versions import needs_fsdp2_of_two_dtypes, needs_fsdp2_on_a_cpu

from benchmarks.rank_memory import ENGINES

SCRIPT = "rank_memory"
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
IN_EVERY_RUN = ("FSDP2",)
CASES = [
    pytest.param(
        name,
        marks=[
            *([needs_deepspeed] if name.startswith("ZeRO") else []),
            *([needs_fsdp2_of_two_dtypes] if name.startswith("FSDP2") else []),
            *([] if name in IN_EVERY_RUN else [pytest.mark.slow]),
        ],
    )
    for name in ENGINES
]


@pytest.mark.parametrize("engine", CASES)
def test_the_first_rank_holds_what_is_counted_and_others_no_more(ranks, engine):
    first, second = ranks("measure", engine=engine)
    for method, counted in first["counted"].items():
        assert first["held"][method] == counted, method
        for kind, size in second["held"][method].items():
            assert 0.95 * counted[kind] <= size <= counted[kind], (method, kind)


@needs_fsdp2_on_a_cpu
def test_memory_of_a_step_is_that_of_the_ranks_own_parts(ranks):
    for found in ranks("step_memory"):
        assert found["moments"] <= found["optimizer"] <= found["moments"] + 1000  # and the numbers of steps
        assert found["peak"] > found["optimizer"]
