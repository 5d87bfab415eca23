"""The layer through PEFT's public API."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny import adapted, batch, bert, llama, logits, train
from torch import nn
from versions import needs_one_graph

from peft_sparsegrad import SparseGradConfig, SparseGradLinear
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def sparsegrad_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]


def noisy(model=None, **settings):
    """An adapter that changes the outputs."""
    return adapted(model, init_weights=False, **settings)


def test_fresh_adapter_changes_nothing_and_base_weights_get_no_gradient():
    base = llama()
    expected = logits(base)
    model = adapted(base)
    assert torch.equal(logits(model), expected)
    model(**batch()).loss.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "sparsegrad_" not in name)


@pytest.mark.parametrize("rank", ["auto", 16, (20, 12), (None, 12), (20, None), "full"])
@pytest.mark.parametrize("support", ["static", "dynamic"])
def test_trains_with_every_rank(rank, support):
    losses = train(adapted(rank=rank, support=support), steps=41)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("basis", ["svd", "identity"])
def test_trains_in_data_free_bases(basis):
    losses = train(adapted(basis=basis), steps=41)
    assert losses[-1] < losses[0] - 0.1


def test_svd_basis_is_each_weights_own():
    model = adapted(basis="svd", rank=12)
    layer = sparsegrad_layers(model)[0]
    group = layer.adapter("default").basis
    left, _, right = torch.linalg.svd(layer.weight)
    assert torch.allclose((group.V.T @ left[:, :12]).abs(), torch.eye(12), atol=1e-3)
    assert torch.allclose((group.U.T @ right[:12].T).abs(), torch.eye(12), atol=1e-3)
    assert len({id(layer.adapter("default").basis) for layer in sparsegrad_layers(model)}) == 6


def test_layers_of_a_group_share_one_pair_of_matrices():
    model = adapted(rank=16)
    groups = {id(layer.adapter("default").basis) for layer in sparsegrad_layers(model)}
    assert len(sparsegrad_layers(model)) == 6
    assert len(groups) == 2
    assert sum(key.endswith(".U") for key in model.state_dict()) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "to"])
def test_sharing_survives(how):
    model = noisy(rank=16)
    expected = logits(model)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        model = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        model = model.double().to("cpu").float()
    assert len({layer.adapter("default").basis.U.data_ptr() for layer in sparsegrad_layers(model)}) == 2
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("how", ["inject", "add_adapter"])
def test_sharing_without_a_peft_model(how):
    model, config = llama(), SparseGradConfig(density=0.05, warmup_steps=0)
    if how == "inject":
        inject_adapter_in_model(config, model)
    else:
        model.add_adapter(config)
    assert len({id(layer.adapter(layer.active_adapters[0]).basis) for layer in sparsegrad_layers(model)}) == 2


@pytest.mark.parametrize("support", ["static", "dynamic"])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unmerge(support, make, safe_merge):
    model = noisy(make(), support=support, task_type=None).eval()
    ids = batch()["input_ids"]
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert not torch.allclose(base, expected, atol=1e-3)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not sparsegrad_layers(merged)
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)


def test_merging_twice_merges_once():
    model = noisy()
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_safe_merge_refuses_nan_and_leaves_the_weight():
    model = noisy()
    layer = sparsegrad_layers(model)[0]
    before = layer.weight.clone()
    with torch.no_grad():
        layer.adapter("default").values[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)


def test_two_adapters_switch_stack_and_are_deleted():
    model = noisy()
    first = logits(model)
    model.add_adapter("other", SparseGradConfig(density=0.1, rank=24, warmup_steps=0, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.base_model.set_adapter(["default", "other"])
    stacked = logits(model)
    assert not torch.allclose(stacked, second, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(logits(model), stacked, atol=1e-4)
    model.unmerge_adapter()
    model.base_model.set_adapter(["other"])
    model.delete_adapter("default")
    assert torch.allclose(logits(model), second, atol=1e-4)
    assert not any("default" in key for key in model.state_dict())


def test_per_module_overrides():
    model = adapted(
        density_pattern={"down_proj": 0.1, r"layers\.0\.mlp\.up_proj": 0.2}, rank_pattern={"down_proj": 30}
    )
    plans = {layer.adapter("default").plan.name: layer.adapter("default").plan for layer in sparsegrad_layers(model)}
    assert plans["model.layers.1.mlp.down_proj"].k == 205
    assert plans["model.layers.1.mlp.down_proj"].core_shape == (30, 30)
    assert plans["model.layers.0.mlp.up_proj"].k == 410
    assert plans["model.layers.1.mlp.up_proj"].k == 102


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_in_other_dtypes_keeps_values_and_bases_in_float32(dtype):
    model = noisy(llama().to(dtype))
    state = model.state_dict()
    assert {state[key].dtype for key in state if key.endswith((".U", ".V"))} == {torch.float32}
    values = sparsegrad_layers(model)[0].adapter("default").values
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss = model(**batch()).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert values.grad.abs().sum() > 0


def test_autocast_gives_gradients_in_float32():
    model = noisy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    gradient = sparsegrad_layers(model)[0].adapter("default").values.grad
    assert gradient.dtype == torch.float32
    reference = noisy()
    reference.load_state_dict(model.state_dict())
    reference(**batch()).loss.backward()
    expected = sparsegrad_layers(reference)[0].adapter("default").values.grad
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.99


def test_float16_overflow_while_the_loss_scale_is_found_is_left_out_of_the_warm_up():
    model = adapted(warmup_steps=4, rank=16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(40):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch(step % 4)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for layer in sparsegrad_layers(model):
        assert layer.adapter("default").is_settled
        assert torch.isfinite(layer.adapter("default").basis.U).all()
        assert layer.adapter("default").values.any()


def test_all_linear():
    model = adapted(target_modules="all-linear")
    assert len(sparsegrad_layers(model)) == 3 * 7
    base = llama()
    with pytest.raises(ValueError, match="cannot hold"):
        adapted(base, target_modules="all-linear", rank=2)
    assert not sparsegrad_layers(base)


def test_no_target_matched():
    with pytest.raises(ValueError, match=r"Target modules .*nonsense.* not found in the base model"):
        adapted(target_modules=["nonsense"])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_gradient_checkpointing_trains_the_same(use_reentrant, warmup_steps):
    plain = train(adapted(warmup_steps=warmup_steps).train(), steps=7)
    model = adapted(warmup_steps=warmup_steps).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert train(model, steps=7) == pytest.approx(plain, abs=1e-5)


@needs_one_graph
def test_compiled_layer_agrees():
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
        SparseGradConfig(target_modules=["0", "2"], density=0.2, warmup_steps=0, init_weights=False),
    )
    x = torch.randn(5, 16)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


class Regression(nn.Module):
    """Two linear layers that give a loss as a language model does, in a fraction of the time to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up_proj, self.down_proj = nn.Embedding(64, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        loss = (self.down_proj(self.up_proj(hidden).relu()) - self.embed(labels.clamp(min=0))).square().mean()
        return SimpleNamespace(loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Regression, pytest.param(lambda: llama(num_hidden_layers=1), id="llama")])
def test_compiled_model_warms_up_and_trains(make):
    settings = {"target_modules": ["up_proj", "down_proj"], "task_type": None, "warmup_steps": 2, "renewal_steps": 2}
    plain, model = (adapted(make(), **settings) for _ in range(2))
    losses = train(plain, steps=7)
    assert train(torch.compile(model, backend="aot_eager"), steps=7) == pytest.approx(losses, abs=1e-4)
    for compiled, other in zip(layer_adapters(model, "default"), layer_adapters(plain, "default"), strict=True):
        assert compiled.num_steps == other.num_steps == 5
        assert torch.equal(compiled.indices, other.indices)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact(tmp_path, low_cpu_mem_usage, dtype):
    """Also on a bf16 base, where PEFT would round the tensors of a low-memory load through bf16."""
    model = noisy(llama().to(dtype), warmup_steps=4)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved = {k: v for k, v in model.state_dict().items() if "sparsegrad_" in k}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in saved.items())
    assert torch.equal(logits(loaded), expected)


def test_device_map(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path)
    mapped = type(base).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert train(adapted(mapped), steps=3) == pytest.approx(train(adapted(base), steps=3), abs=1e-6)
