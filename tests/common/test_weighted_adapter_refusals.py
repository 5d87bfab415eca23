"""What `add_weighted_adapter` refuses, without changing anything."""

import math
from dataclasses import replace

import pytest
import tiny
from peft import get_peft_model
from weighted_adapter_tools import WEIGHTS, pair

from peft_sparsegrad import GradDropConfig, SparseGradConfig

BAD = {
    "an unknown name": ({"adapters": ["x", "c"]}, r"`adapters`: the model has no adapter 'c', only x, y"),
    "no name": ({"adapters": [], "weights": []}, "`adapters` must be a list with at least one"),
    "a string": ({"adapters": "xy"}, "`adapters` must be a list"),
    "too few weights": ({"weights": [1.0]}, r"`weights` must be 2 numbers, one an adapter, not \[1.0\]"),
    "a weight of NaN": ({"weights": [1.0, math.nan]}, "`weights` must be finite"),
    "a weight of Inf": ({"weights": [1.0, -math.inf]}, "`weights` must be finite"),
    "a weight of text": ({"weights": [1.0, "2"]}, "`weights` must be finite numbers"),
    "an unknown kind": (
        {"combination_type": "mean"},
        "`combination_type` must be one of linear, cat, ties, dare_linear",
    ),
    "a kind with SVD": (
        {"combination_type": "ties_svd"},
        "`combination_type='ties_svd'` is for merges by SVD.*linear, cat",
    ),
    "LoRA's default": ({"combination_type": "svd", "svd_rank": 8}, "linear and cat are exact"),
    "a rank": ({"svd_rank": 8}, "`svd_rank=8` is for merges by SVD"),
    "no density": (
        {"combination_type": "ties"},
        r"`density` must be in \(0, 1\] with combination_type='ties', not None",
    ),
    "a density of 0": ({"combination_type": "dare_linear", "density": 0.0}, r"`density` must be in \(0, 1\]"),
    "a density above 1": ({"combination_type": "ties", "density": 1.5}, r"`density` must be in \(0, 1\].*not 1.5"),
    "a density of nothing": ({"density": 0.5}, "`density=0.5` is for kinds that prune, ties"),
    "an unknown election": ({"majority_sign_method": "most"}, "`majority_sign_method` must be total or frequency"),
    "a name in use": ({"adapter_name": "y"}, "`adapter_name='y'` is the name of an adapter.*`delete_adapter`"),
    "a name of torch's": ({"adapter_name": "double"}, "`adapter_name='double'` is an attribute of torch's modules"),
    "a dotted name": ({"adapter_name": "v1.0"}, "`adapter_name` must be a name without dots, not 'v1.0'"),
}


@pytest.fixture(scope="module", params=["sparsegrad", "graddrop"])
def unchanged(request, tmp_path_factory):
    return pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(unchanged, case):
    arguments, message = BAD[case]
    names = list(unchanged.state_dict())
    with pytest.raises(ValueError, match=message) as refused:
        unchanged.add_weighted_adapter(
            **{"adapters": ["x", "y"], "weights": [1, 1], "adapter_name": "new", **arguments}
        )
    assert "\n" not in str(refused.value)
    assert list(unchanged.peft_config) == ["x", "y"]
    assert list(unchanged.state_dict()) == names


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_different_bases_are_refused_but_for_cat(kind, tmp_path):
    model = pair("sparsegrad, other bases", tmp_path)
    density = None if kind == "linear" else 0.5
    with pytest.raises(ValueError, match=rf"`combination_type='{kind}'`.*'x' and 'y' have different.*type='cat'"):
        model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", kind, density=density)
    assert list(model.peft_config) == ["x", "y"]


def test_adapter_in_its_warm_up_is_refused(tmp_path):
    model = pair("sparsegrad", tmp_path)
    model.add_adapter("c", SparseGradConfig(density=0.05, warmup_steps=4))
    with pytest.raises(ValueError, match="the warm-up of the adapter 'c' has not finished"):
        model.add_weighted_adapter(["x", "c"], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["x", "y", "c"]


def test_bases_with_nothing_in_common_are_refused():
    settings = {"warmup_steps": 0, "target_modules": ["up_proj"], "init_weights": False}
    model = get_peft_model(tiny.llama(), SparseGradConfig(rank=(None, 8), **settings), adapter_name="x")
    model.add_adapter("y", SparseGradConfig(rank=(8, None), **settings))
    model.add_adapter("c", SparseGradConfig(basis="identity", **settings))
    for other, message in (
        ("y", "opposite sides at 'model.layers.0.mlp.up_proj'"),
        ("c", "basis='identity' and others"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*`merge_adapter`"):
            model.add_weighted_adapter(["x", other], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["x", "y", "c"]


@pytest.mark.parametrize(
    "config", [SparseGradConfig(warmup_steps=0), GradDropConfig()], ids=["sparsegrad", "graddrop"]
)
def test_task_heads_are_refused(config):
    model = get_peft_model(tiny.llama(), replace(config, modules_to_save=["lm_head"]), adapter_name="x")
    with pytest.raises(ValueError, match=r"`adapters`: 'x' has `modules_to_save=\['lm_head'\]`, of which there is no"):
        model.add_weighted_adapter(["x"], [1.0], "sum")
