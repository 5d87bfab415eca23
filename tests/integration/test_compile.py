"""`torch.compile`: one graph for a whole training step, made once, that trains like the model that is not compiled."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from graph_breaks import Compiled, compile_counts, train_compiled
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, llama, rows, train
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import PretrainedConfig, Trainer, TrainingArguments
from versions import needs_one_graph

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradConfig, create_sparsegrad_optimizer
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter
from peft_sparsegrad.sparsegrad.layer import layer_adapters

STEPS = 6


class Block(nn.Module):
    """A part of a transformer block, with a normalisation, and linear layers with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up_proj, self.down_proj = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.up_proj(self.norm(x)).relu())


class Output(NamedTuple):
    loss: torch.Tensor
    hidden: torch.Tensor


class Tower(nn.Module):
    """A language model of float64, for exact comparisons, that compiles in a second."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(64, 8), nn.ModuleList(Block() for _ in range(blocks))
        self.config = PretrainedConfig()
        self.double()

    def prepare_inputs_for_generation(self) -> None:
        """Make this a causal language model for PEFT."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_) -> Output:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return Output(F.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), labels.flatten()), x)


def tower(config) -> PeftModel:
    """A tower with an adapter, whose values are float64 as the tower is."""
    return get_peft_model(Tower(), config)


def sparsegrad(**settings) -> SparseGradConfig:
    targets = ["up_proj", "down_proj"]
    return SparseGradConfig(target_modules=targets, density=0.3, task_type="CAUSAL_LM", **settings)


def graddrop(variant: str = "GradDrop", **settings) -> GradDropConfig:
    return GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", **settings)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_parameters(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model) -> list[LayerAdapter]:
    return layer_adapters(model, "default")


def train_both(config, before_step=lambda model, step: None) -> tuple[Compiled, nn.Module, nn.Module]:
    """Train a tower in compiled form and its twin without, compare them, and return the first run and both models."""
    model, twin = tower(config), tower(config)
    run = train_compiled(model, STEPS, lambda step: before_step(model, step))
    optimizer, losses = torch.optim.AdamW(trained_parameters(twin), lr=0.01), []
    for step in range(STEPS):
        before_step(twin, step)
        loss = twin(**batch(step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert run.losses == pytest.approx(losses, rel=1e-12)
    for name, value in trained(model).items():
        torch.testing.assert_close(value, trained(twin)[name], rtol=1e-9, atol=1e-12)
    return run, model, twin


# SparseGrad ----------------------------------------------------------------------------------------------------------


@needs_one_graph
@pytest.mark.parametrize("warmup_steps", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_sparsegrad_trains_the_same_in_one_graph_across_renewals(warmup_steps):
    """The warm-up itself is not compiled, for which the graph breaks once."""
    supports = []

    def note_support(model, step: int) -> None:
        supports.append(adapters(model)[-1].indices.tolist())

    run, model, _ = train_both(sparsegrad(warmup_steps=warmup_steps, renewal_steps=2), note_support)
    assert run[:3] == (1, min(warmup_steps, 1), 0)
    assert {adapter.num_steps for adapter in adapters(model)} == {STEPS - warmup_steps}
    assert supports[:STEPS] == supports[STEPS:]
    assert supports[warmup_steps] != supports[warmup_steps + 2], "a renewal was to come while the graph is used"


def test_compiled_model_sees_the_support_that_is_loaded_into_it(tmp_path):
    """A stale support would give the loaded values to other entries."""
    saved = tower(sparsegrad(warmup_steps=2))
    train(saved, steps=4)
    saved.save_pretrained(tmp_path)
    model = tower(sparsegrad(warmup_steps=0, init_weights=False))
    compiled = torch.compile(model, backend="aot_eager")
    inputs = batch()
    with torch.no_grad():
        before = compiled(**inputs).hidden
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert not torch.allclose(compiled(**inputs).hidden, before)
        torch.testing.assert_close(compiled(**inputs).hidden, saved(**inputs).hidden)


# GradDrop ------------------------------------------------------------------------------------------------------------


def announce(model, step: int) -> None:
    """Two steps in each of three epochs."""
    GradDrop(model).set_epoch(step // 2)


@needs_one_graph
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(graddrop(p=0.5), id="element"),
        pytest.param(graddrop("Layer-GradDrop", p=0.5), id="layer"),
        pytest.param(graddrop("GradFreeze-TopDown", num_epochs=3), id="epoch", marks=pytest.mark.slow),
        pytest.param(graddrop(p=0.5, frozen="hold"), id="hold", marks=pytest.mark.slow),
        pytest.param(graddrop(p=0.5, noise="gaussian"), id="gaussian", marks=pytest.mark.slow),
        pytest.param(graddrop(p=0.5, target_modules=["embed", "up_proj"]), id="embedding", marks=pytest.mark.slow),
    ],
)
def test_graddrop_trains_the_same_in_one_graph(config):
    run, *_ = train_both(config, announce if config.needs_epoch else lambda model, step: None)
    assert run[:3] == (1, 0, 0)


def test_compiled_masks_are_those_of_the_step_and_of_their_layer():
    """In a copy too, which has a sampler of its own, and with the micro-batches of a step."""
    model = tower(graddrop(p=0.5))
    model, twin = copy.deepcopy(model), tower(graddrop(p=0.5))
    torch.compiler.reset()
    compiled, kept = torch.compile(model, backend="aot_eager"), []
    for called, made in ((compiled, model), (twin, twin)):
        optimizer = torch.optim.SGD(trained_parameters(made), lr=0.1)
        for micro_batch in range(4):
            called(**batch(micro_batch // 2)).loss.backward()
            kept.append(torch.cat([parameter.grad.flatten() != 0 for parameter in trained_parameters(made)]))
            if micro_batch % 2:
                optimizer.step()
                optimizer.zero_grad()
    one, two = kept[:4], kept[4:]
    assert all(torch.equal(mask, other) for mask, other in zip(one, two, strict=True))
    assert torch.equal(one[0], one[1])
    assert 0.4 < (one[1] == one[2]).double().mean() < 0.6


def test_compiled_pass_sees_that_an_optimizer_holds_copies():
    model = tower(graddrop())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")

    def step_on_copies() -> None:
        compiled(**batch()).loss.backward()
        with torch.no_grad():
            for parameter in trained_parameters(model):
                parameter -= parameter.grad

    step_on_copies()
    with pytest.raises(RuntimeError, match="has changed without a step of an optimizer that holds it"):
        step_on_copies()


@pytest.mark.slow
def test_two_active_adapters_are_masked_each_by_its_own():
    model, twin = (get_peft_model(Tower(), graddrop(p=0.5)) for _ in range(2))
    for made in (model, twin):
        made.add_adapter("other", graddrop(p=0.5, seed=1))
        made.base_model.set_adapter(["default", "other"])
    torch.compiler.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**batch()).loss.backward()
    twin(**batch()).loss.backward()
    for parameter, other in zip(trained_parameters(model), trained_parameters(twin), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


# Both ----------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "lora": LoraConfig(task_type="CAUSAL_LM"),
    "sparsegrad": SparseGradConfig(warmup_steps=0, task_type="CAUSAL_LM"),
    "graddrop": GradDropConfig(task_type="CAUSAL_LM"),
}


@needs_one_graph
@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_graph_for_a_whole_llama(config):
    assert compile_counts(config)[:3] == (1, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"), sparsegrad(warmup_steps=0), graddrop()]
)
def test_blocks_that_are_compiled_by_themselves_share_their_graphs(config):
    """The first has one of its own, as its input needs no gradient."""
    torch.compiler.reset()
    counters.clear()
    model = get_peft_model(Tower(blocks=4), config)
    for block in model.get_base_model().layers:
        block.compile(backend="aot_eager")
    train(model, steps=2)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsegrad", "graddrop"])
def test_trainer_compiles(name, tmp_path):
    losses = []
    for compiles in (False, True):
        torch.compiler.reset()
        counters.clear()
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=5, logging_steps=1, report_to=[], use_cpu=True, learning_rate=0.01, **settings
        )
        model = get_peft_model(llama(), CONFIGS[name])
        trainer = Trainer(model, arguments, train_dataset=rows(32))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsegrad", "graddrop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_with_checkpointing_and_autocast(name, dtype):
    losses = []
    for compiles in (True, False):
        model = get_peft_model(llama(num_hidden_layers=1), CONFIGS[name]).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.compiler.reset()
        called = torch.compile(model, backend="aot_eager") if compiles else model
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
            losses.append(train(called, steps=3, optimizer=torch.optim.SGD(trained_parameters(model), lr=0.5)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.slow
def test_dynamic_support_trains_the_same():
    losses = []
    for compiles in (True, False):
        torch.compiler.reset()
        model = tower(sparsegrad(warmup_steps=2, support="dynamic"))
        optimizer = create_sparsegrad_optimizer(model, 0.05)
        losses.append(train(torch.compile(model, backend="aot_eager") if compiles else model, 5, optimizer=optimizer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
