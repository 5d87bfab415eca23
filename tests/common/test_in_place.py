"""What a layer of either method returns may be modified in place, as Falcon and wav2vec2 do with residuals."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_sparsegrad import GradDropConfig, SparseGradConfig

IN_PLACE = {
    "add": (lambda y: y.add_(1), lambda y: y + 1),
    "multiply": (lambda y: y.mul_(2), lambda y: y * 2),
    "relu": (lambda y: y.relu_(), lambda y: y.relu()),
    "all": (lambda y: y.add_(1).mul_(2).relu_(), lambda y: ((y + 1) * 2).relu()),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), [(7, 6), (2, 3, 6)]),
    "Conv1D": (lambda: Conv1D(5, 6), [(7, 6), (2, 3, 6)]),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), [(2, 3, 5, 5), (3, 5, 5)]),
    "norm": (lambda: nn.LayerNorm(6), [(7, 6), (2, 3, 6)]),
    "embedding": (lambda: nn.Embedding(9, 6), [(7,), (2, 3)]),
}
SPARSEGRAD = {
    "warm-up": {"warmup_steps": 2, "init_weights": True},
    "product": {},
    "full core": {"rank": "full"},
    "identity": {"basis": "identity"},
    "dynamic": {"support": "dynamic"},
}
GRADDROP = {"masks": {"p": 0.5}, "frozen": {"granularity": "layer", "p": 0.99, "scale": False}}
CASES = [
    *(("linear", SparseGradConfig, name) for name in SPARSEGRAD),
    *(("Conv1D", SparseGradConfig, name) for name in SPARSEGRAD),
    *((layer, GradDropConfig, name) for layer in LAYERS for name in GRADDROP),
]


class Model(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer, self.then, self.again = LAYERS[layer][0](), lambda y: y, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(checkpoint(self.layer, x, use_reentrant=False) if self.again else self.layer(x))


def adapted(layer, config, settings, *adapters):
    torch.manual_seed(0)
    options = {**{**SPARSEGRAD, **GRADDROP}[settings], "target_modules": ["layer"]}
    if config is SparseGradConfig:
        options = {"density": 0.3, "warmup_steps": 0, **options}
    given = config(**{"init_weights": False, **options})
    model = get_peft_model(Model(layer).double(), given)
    for name in adapters:
        model.add_adapter(name, given)
    if adapters:
        model.base_model.set_adapter(["default", *adapters])
    return model


def result(model, shape, then, again=False):
    """Output, and gradients of the input and of everything that trains."""
    torch.manual_seed(1)
    base = model.get_base_model()
    base.then, base.again = then, again
    takes_ids = isinstance(base.layer.base_layer, nn.Embedding)
    x = torch.randint(9, shape) if takes_ids else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    inputs = [x, *(each for each in model.parameters() if each.requires_grad)]
    inputs = [each for each in inputs if each.requires_grad]
    if y.requires_grad:
        (y * torch.randn_like(y)).sum().backward()
    return [y.detach(), *(each.grad for each in inputs)]


def assert_same(model, twin, shape, operation, **options):
    ours, theirs = IN_PLACE[operation]
    for own, expected in zip(result(model, shape, ours, **options), result(twin, shape, theirs), strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            assert torch.equal(own, expected)


@pytest.mark.parametrize("operation", IN_PLACE)
@pytest.mark.parametrize(("layer", "config", "settings"), CASES)
@pytest.mark.parametrize("number", [0, 1])
def test_gradients_are_those_out_of_place(layer, config, settings, number, operation):
    shape = LAYERS[layer][1][number]
    assert_same(adapted(layer, config, settings), adapted(layer, config, settings), shape, operation)


@pytest.mark.parametrize("number", [0, 1])
def test_with_the_weight_written_out(number):
    models = [adapted("linear", SparseGradConfig, "product") for _ in range(2)]
    for model in models:
        model.get_base_model().layer.writing_out_pays = lambda *problem: True
    shape = LAYERS["linear"][1][number]
    assert_same(*models, shape, "all")
    assert models[0].get_base_model().layer(torch.randn(shape).double()).grad_fn.name() == "_DeltaLinearBackward"


@pytest.mark.parametrize(("layer", "config", "settings"), CASES)
def test_with_gradient_checkpointing(layer, config, settings):
    shape = LAYERS[layer][1][1]
    assert_same(adapted(layer, config, settings), adapted(layer, config, settings), shape, "all", again=True)


@pytest.mark.parametrize(
    ("config", "state"),
    [
        *((config, state) for config in (SparseGradConfig, GradDropConfig) for state in ("merged", "disabled", "two")),
        (SparseGradConfig, "observed"),
    ],
)
def test_in_other_states(config, state):
    models = []
    for _ in range(2):
        model = adapted("linear", config, "product" if config is SparseGradConfig else "masks")
        if state == "merged":
            model.merge_adapter()
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        elif state == "two":
            model = adapted("linear", config, "product" if config is SparseGradConfig else "masks", "other")
        else:
            model.get_base_model().layer.adapter("default").probe = lambda *seen: True
        models.append(model)
    assert_same(*models, (2, 3, 6), "all")


@pytest.mark.parametrize("settings", SPARSEGRAD)
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_nothing_is_copied_or_viewed(settings, shape):
    """The observed output is in the frozen layer's own memory, and a delta is added in one tensor of its own."""
    model = adapted("linear", SparseGradConfig, settings).get_base_model()
    results = []
    model.layer.base_layer.register_forward_hook(lambda *call: results.append(call[-1]))
    y = model(torch.randn(shape, dtype=torch.float64))
    assert not y._is_view()
    assert (y.data_ptr() == results[0].data_ptr()) == (settings == "warm-up")
