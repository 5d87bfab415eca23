"""Which layers train, and how large a share of them."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from examples.llama2_chat.target_layers import find_density, select_layers
from peft_sparsegrad.cli.errors import InputError


def test_blocks_and_names(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert select_layers(model, ["up_proj", "down_proj"], 3) == dict.fromkeys(
        (f"model.layers.{block}.mlp.{name}_proj" for block in (0, 3) for name in ("up", "down")), 64 * 128
    )
    assert list(select_layers(model, ["self_attn.q_proj"], 2)) == [
        f"model.layers.{block}.self_attn.q_proj" for block in (0, 2)
    ]
    with pytest.raises(InputError, match="named mlp, wrong in"):
        select_layers(model, ["mlp", "up_proj", "wrong"], 3)


@pytest.mark.parametrize(
    ("sizes", "density", "expected"), [([8192, 8192], None, 100 / 8192), ([64, 8192], 0.02, 0.02)]
)
def test_density(sizes, density, expected):
    layers = {str(i): size for i, size in enumerate(sizes)}
    assert find_density("sparsegrad", layers, density, 100) == expected


@pytest.mark.parametrize(("sizes", "message"), [([64], "more than the 64 entries"), ([128, 256], "128 to 256")])
def test_impossible_number_of_values(sizes, message):
    layers = {str(i): size for i, size in enumerate(sizes)}
    with pytest.raises(InputError, match=message):
        find_density("lora", layers, None, 100)
    assert find_density("full", layers, None, 100) == 1.0
