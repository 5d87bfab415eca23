"""The shares of LLaMA-2 7B that train, as its README has them beside the SparseGrad paper's Table 6."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.methods import METHODS

PROJECTIONS = ("up_proj", "down_proj")


def trained_share(method: str, projections=PROJECTIONS, every: int = 3, **settings) -> float:
    """Percent of the parameters of LLaMA-2 7B that train in the projections of every so many blocks, from block 0."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, vocab_size=32000))
        whole = sum(p.numel() for p in model.parameters())
        names = [f"layers.{block}.mlp.{name}" for block in range(0, 32, every) for name in projections]
        adapted = METHODS[method].attach(model, names, 0.01, **settings)
    return 100 * sum(p.numel() for p in adapted.parameters() if p.requires_grad) / whole


@pytest.mark.parametrize(
    ("counted", "method", "settings"),
    [
        ("14.7", "full", {}),
        ("22.1", "full", {"projections": (*PROJECTIONS, "gate_proj")}),
        ("0.16", "lora", {"rank": 32}),
        ("0.46", "lora", {"rank": 32, "every": 1}),
        ("0.03", "sparsegrad", {"num_values": 100_000}),
    ],
)
def test_share_of_the_model_that_trains(counted, method, settings):
    digits = len(counted.partition(".")[2])
    assert f"{trained_share(method, **settings):.{digits}f}" == counted
