"""Default targets on transformers' own architectures: train, merge, save and load, with LoRA as the control."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from architecture_checks import check, number_with_default_targets, output
from architectures import model_types, tiny_model
from not_built import NOT_BUILT
from peft import LoraConfig, get_peft_model

from peft_sparsegrad import GradDropConfig, SparseGradConfig

USUAL = ["bert", "deepseek_v3", "falcon_h1", "llama", "llava", "mixtral", "siglip", "t5", "wav2vec2"]
ROOT = Path(__file__).parents[2]
TYPES = [pytest.param(each, marks=() if each in USUAL else pytest.mark.slow) for each in model_types()]


def lora_on(model_type: str, names: set[str]) -> set[str] | None:
    """Train LoRA on the same modules; return those without gradient, or None where PEFT cannot add or load it."""
    try:
        return check(model_type, lambda: LoraConfig(target_modules=names, init_lora_weights=False))[1]
    except (AssertionError, ValueError):
        return None


def proposal_of(model_type: str) -> list[str] | None:
    """Return the targets that the error for a model without default proposes; None where there is a default."""
    try:
        get_peft_model(tiny_model(model_type), SparseGradConfig())
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert "SparseGrad has no default for the model type" in message
    proposal = re.search(r"target_modules=(\[.*?\])", message)
    assert proposal or "It has no linear layers" in message
    return ast.literal_eval(proposal[1]) if proposal else []


@pytest.mark.parametrize("model_type", TYPES)
def test_sparsegrads_default_works_or_its_error_proposes_targets_that_do(model_type):
    targets = proposal_of(model_type)
    if targets == []:
        return
    names, idle = check(model_type, lambda: SparseGradConfig(warmup_steps=0, target_modules=targets))
    assert lora_on(model_type, names) in (idle, None)
    assert idle < names


@pytest.mark.parametrize("model_type", TYPES)
def test_graddrops_default_works(model_type):
    names, idle = check(model_type, lambda: GradDropConfig(p=0.0))
    assert idle < names


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_is_said_to_be_no_tiny_model_is_none(model_type):
    if NOT_BUILT[model_type].startswith(("large", "slow")):
        pytest.skip("building it takes too long to be tried")
    with pytest.raises(Exception):  # noqa: B017, PT011  each fails in a way of its own
        output(tiny_model(model_type))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_guide_counts_the_types_that_need_no_targets():
    guide = " ".join((ROOT / "docs" / "guides" / "from-lora.md").read_text("utf-8").split())
    lora, sparse, dropped = map(number_with_default_targets, (LoraConfig, SparseGradConfig, GradDropConfig))
    assert f"of {len(model_types())} model types" in guide
    assert f"`LoraConfig` takes {lora}, `SparseGradConfig` {sparse} and `GradDropConfig` {dropped};" in guide
