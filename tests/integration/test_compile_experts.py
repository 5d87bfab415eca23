"""`torch.compile` of models with adapters on experts: one graph, and the losses of the uncompiled model."""

import pytest
import torch
from mixtures import EXPERTS, mixtral, train
from peft import get_peft_model

from peft_sparsegrad import GradDropConfig, SparseGradConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", [SparseGradConfig, GradDropConfig])
def test_compiled_training_step_is_one_graph(kind):
    settings = {"warmup_steps": 0} if kind is SparseGradConfig else {}
    models = [
        get_peft_model(mixtral("batched_mm"), kind(target_modules=[], target_parameters=EXPERTS, **settings)).train()
        for _ in range(2)
    ]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(torch.compile(models[0], backend="aot_eager"), steps=3)
    assert compiled == pytest.approx(train(models[1], steps=3), rel=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
