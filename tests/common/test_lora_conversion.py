"""A SparseGrad adapter as LoRA: the same outputs, in a process that has plain PEFT only."""

from __future__ import annotations

import json
import math
import re
import warnings

import pytest
import torch
from fresh import run_program
from paper_layer import random_orthogonal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from peft_sparsegrad import SparseGradConfig, SparseGradLinear, convert_to_lora

IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # Conv1D
        return GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=20, **sizes)).eval()


def trained(kind: str = "bert", dtype=torch.float32, **settings) -> PeftModel:
    """An adapter with noise for values and orthogonal bases."""
    settings = {"num_values": 12, "rank": 10, "warmup_steps": 0, "init_weights": False, **settings}
    model = get_peft_model(tiny(kind).to(dtype), SparseGradConfig(**settings)).eval().to(dtype)
    for layer in layers(model).values():
        group = layer.adapter("default").basis
        (n_out, n_in), (r_out, r_in) = group.weight_shape, group.ranks
        U = None if r_in is None else random_orthogonal(n_in, 1)[:, :r_in]
        V = None if r_out is None else random_orthogonal(n_out, 2)[:, :r_out]
        group.fill(U, V)
    return model


def layers(model) -> dict[str, SparseGradLinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def delta_of(conversion, name: str) -> torch.Tensor:
    """B A in float64, (out, in)."""
    a, b = (conversion.state_dict[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    return b @ a


def delta(layer) -> torch.Tensor:
    """ΔW in float64, (out, in)."""
    weight = layer.get_delta_weight("default").double()
    return weight.T if layer.fan_in_fan_out else weight


LOAD = """
import json, sys, torch, transformers
from peft import PeftModel

jobs = json.loads(sys.argv[1])
for job in jobs:
    base = getattr(transformers, job["class"]).from_pretrained(job["base"], dtype=getattr(torch, job["dtype"])).eval()
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor(job["ids"])).last_hidden_state, job["output"])
assert "peft_sparsegrad" not in sys.modules
"""

CASES = {
    "bert": ("bert", torch.float32, {}),
    "bert in float64": ("bert", torch.float64, {}),
    "dynamic": ("bert", torch.float32, {"support": "dynamic"}),
    "identity": ("bert", torch.float32, {"basis": "identity", "rank": "auto"}),
    "one-sided": ("bert", torch.float32, {"rank": "auto"}),
    "one-sided in float64": ("bert", torch.float64, {"rank": "auto", "num_values": 60}),
    "one-sided Conv1D": ("gpt2", torch.float32, {"rank": "auto"}),
    "different ranks": ("bert", torch.float32, {"density_pattern": {"0.intermediate.dense": 0.1}, "num_values": None}),
    "Conv1D": ("gpt2", torch.float32, {}),
    "Conv1D in float64": ("gpt2", torch.float64, {}),
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Case to (our output, output of a fresh process that loads the LoRA adapter with plain PEFT)."""
    jobs, expected = [], {}
    for number, (case, (kind, dtype, settings)) in enumerate(CASES.items()):
        directory = tmp_path_factory.mktemp(f"case{number}")
        base = tiny(kind).to(dtype)
        base.save_pretrained(directory / "base")
        model = trained(kind, dtype, **settings)
        convert_to_lora(model).save(directory / "lora")
        expected[case] = output(model)
        assert (output(base) - expected[case]).abs().max() > 0.05, "the adapter must matter"
        paths = {name: str(directory / name) for name in ("base", "output")}
        names = {"class": type(base).__name__, "dtype": str(dtype).removeprefix("torch."), "ids": IDS.tolist()}
        jobs.append({**names, **paths, "adapter": str(directory / "lora")})
    done = run_program("-c", LOAD, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    got = [torch.load(job["output"]) for job in jobs]
    return {case: (expected[case], theirs) for case, theirs in zip(CASES, got, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_same_outputs_in_a_process_with_plain_peft(elsewhere, case):
    ours, theirs = elsewhere[case]
    assert theirs.dtype == ours.dtype
    tolerance = 1e-10 if "float64" in case else 1e-5
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_exact_conversion_in_this_process(tmp_path, kind):
    model = trained(kind)
    expected = output(model)
    conversion = convert_to_lora(model)
    assert torch.equal(output(model), expected), "the model is not changed"
    conversion.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == conversion.state_dict.keys()
    torch.testing.assert_close(output(PeftModel.from_pretrained(tiny(kind), tmp_path)), expected, atol=1e-5, rtol=1e-5)
    assert set(conversion.errors) == set(layers(model))
    assert conversion.largest_error < 1e-12


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": (3, 10)}, 3),
        ({"rank": (10, 3)}, 3),
        ({"rank": (4, 10), "num_values": 3}, None),
        ({"rank": (10, 4), "num_values": 3}, None),
        ({"support": "dynamic", "rank": (5, 8)}, 5),
        ({"support": "dynamic", "rank": (8, 5)}, 5),
    ],
    ids=str,
)
def test_exact_rank_is_the_number_of_rows_or_columns_in_use(settings, expected):
    model = trained(**{"num_values": 20, **settings})
    conversion = convert_to_lora(model)
    for name, layer in layers(model).items():
        adapter = layer.adapter("default")
        plan = adapter.plan
        indices = torch.arange(plan.num_entries) if adapter.indices is None else adapter.indices
        rows, columns = indices // plan.core_shape[1], indices % plan.core_shape[1]
        in_use = min(len(rows.unique()), len(columns.unique()))
        assert in_use == (expected or in_use)
        assert conversion.state_dict[f"base_model.model.{name}.lora_A.weight"].shape[0] == in_use
        torch.testing.assert_close(delta_of(conversion, name), delta(layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", ["auto", "narrower"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rank_of_a_one_sided_adapter_is_its_columns(kind, rank):
    """However many rows of the core hold values, no more than the few columns of the transition matrix are needed."""
    model = trained(kind, torch.float64, rank=rank, num_values=60, slack=2)
    conversion = convert_to_lora(model)
    for name, layer in layers(model).items():
        ranks = layer.adapter("default").plan.ranks
        (columns,) = (rank for rank in ranks if rank is not None)
        out_features, in_features = layer.adapter("default").plan.weight_shape
        assert columns == math.ceil(2 * 60 / (out_features if rank == "auto" else max(out_features, in_features)))
        a = conversion.state_dict[f"base_model.model.{name}.lora_A.weight"]
        assert a.any(1).sum() == columns  # the rest is padding, up to the rank of the module that needs most
        torch.testing.assert_close(delta_of(conversion, name), delta(layer), atol=1e-12, rtol=1e-12)
    assert conversion.largest_error == 0
    capped = convert_to_lora(model, rank=8)
    assert all(torch.equal(capped.state_dict[key], value) for key, value in conversion.state_dict.items())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_given_rank_is_the_best_there_is_and_its_error_is_reported(kind, rank):
    model = trained(kind, num_values=60)
    conversion = convert_to_lora(model, rank=rank)
    for name, layer in layers(model).items():
        wanted, got = delta(layer), delta_of(conversion, name)
        assert torch.linalg.matrix_rank(got, rtol=1e-5) == rank
        singular_values = torch.linalg.svdvals(wanted)
        optimal = (singular_values[rank:].norm() / singular_values.norm()).item()
        assert optimal > 0.1
        assert conversion.errors[name] == pytest.approx(((wanted - got).norm() / wanted.norm()).item(), rel=1e-4)
        assert conversion.errors[name] == pytest.approx(optimal, rel=1e-4)
    assert conversion.largest_error == max(conversion.errors.values())
    assert conversion.config.r == conversion.config.lora_alpha == rank


def test_rank_beyond_the_exact_one_changes_nothing():
    model = trained()
    exact, generous = convert_to_lora(model), convert_to_lora(model, rank=1000)
    assert generous.errors == exact.errors
    assert all(torch.equal(generous.state_dict[key], value) for key, value in exact.state_dict.items())


def test_adapter_that_was_never_trained(tmp_path):
    model = trained(init_weights=True)
    conversion = convert_to_lora(model)
    assert conversion.largest_error == 0
    assert {tensor.shape[0] for key, tensor in conversion.state_dict.items() if "lora_A" in key} == {1}
    conversion.save(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(tiny("bert"), tmp_path)), output(tiny("bert")))


def test_named_adapter_is_the_one_that_is_converted():
    model = trained()
    first = convert_to_lora(model).state_dict
    model.add_adapter("other", SparseGradConfig(num_values=4, rank=2, warmup_steps=0, init_weights=False))
    assert all(torch.equal(convert_to_lora(model).state_dict[key], tensor) for key, tensor in first.items())
    other = convert_to_lora(model, adapter_name="other")
    layer = next(iter(layers(model).values()))
    name = next(iter(layers(model)))
    torch.testing.assert_close(delta_of(other, name).float(), layer.get_delta_weight("other"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapted", [("0", "1.0"), ("0", "1.1")], ids=str)
def test_module_whose_name_ends_another_ones(tmp_path, adapted):
    """`0` must not stand for `1.0`, neither in the rank pattern nor as a target."""

    def make() -> torch.nn.Sequential:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
        return torch.nn.Sequential(torch.nn.Linear(12, 12), inner)

    targets = "|".join(re.escape(name) for name in adapted)
    settings = {"num_values": None, "rank": "full", "warmup_steps": 0, "init_weights": False}
    config = SparseGradConfig(target_modules=targets, density=0.02, density_pattern={r"1\.\d": 0.3}, **settings)
    model = get_peft_model(make(), config)
    assert set(layers(model)) == set(adapted)
    conversion = convert_to_lora(model)
    conversion.save(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    x = torch.randn(3, 12)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    keys = {key for key in loaded.state_dict() if "lora_" in key}
    assert keys == {key.replace(".weight", ".default.weight") for key in conversion.state_dict}


def test_modules_to_save_are_refused():
    model = trained(modules_to_save=["pooler"])
    with pytest.raises(ValueError, match=r"modules_to_save.*merge_and_unload"):
        convert_to_lora(model)


@pytest.mark.parametrize("rank", [0, -1, 0.9, "16"])
def test_rank_below_one(rank):
    with pytest.raises(ValueError, match=f"`rank` must be a whole number of at least 1, not {rank!r}$"):
        convert_to_lora(trained(), rank=rank)


@pytest.mark.parametrize("batch", [[{"input_ids": IDS}], IDS])
def test_what_is_no_batch_is_refused(batch):
    message = r"^`batch` must be one batch for `model\(\*\*batch\)`, a dictionary of tensors, not a (list|Tensor)$"
    with pytest.raises(TypeError, match=message):
        convert_to_lora(trained(), batch=batch)


def test_unknown_adapter_and_other_methods():
    with pytest.raises(ValueError, match="no SparseGrad or GradDrop adapter named 'other'"):
        convert_to_lora(trained(), adapter_name="other")
    with pytest.raises(ValueError, match="no SparseGrad or GradDrop adapter named 'default'"):
        convert_to_lora(get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"])))


def test_adapter_in_the_middle_of_its_warm_up():
    model = get_peft_model(tiny("bert"), SparseGradConfig(warmup_steps=4))
    model(input_ids=IDS).last_hidden_state.sum().backward()
    with pytest.raises(ValueError, match="warm-up of the adapter 'default' has not finished"):
        convert_to_lora(model)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_s_own_conversion_works(kind):
    model = trained(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state_dict = peft_convert_to_lora(model, rank=10)
    ours = convert_to_lora(model)
    for name in layers(model):
        a, b = (state_dict[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close((b @ a).double(), delta_of(ours, name), atol=1e-4, rtol=1e-4)
