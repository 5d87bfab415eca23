"""Batches with `adapter_names`: each row is what its adapter alone gives, or the batch is refused. LoRA beside it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, bert, llama
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparsegrad import GradDropConfig, SparseGradConfig

ROWS = ["second", "__base__", "first", "second"]
MLP = {"llama": ["up_proj", "down_proj"], "bert": ["intermediate.dense", "output.dense"], "gpt2": ["c_fc", "c_proj"]}


def gpt2():
    sizes: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def t5():
    sizes: Any = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    sizes["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(**sizes))


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5}
METHODS = {
    "lora": lambda targets: LoraConfig(target_modules=targets),
    "sparsegrad": lambda targets: SparseGradConfig(target_modules=targets, warmup_steps=0, density=0.05),
    "graddrop": lambda targets: GradDropConfig(target_modules=targets),
}


def two_adapters(method, model, targets, further=None, **settings):
    """A model in float64 and evaluation mode with the adapters "first" and "second", whose deltas are not zero."""
    config = METHODS[method](targets)
    for name, value in settings.items():
        setattr(config, name, value)
    if not getattr(model, "is_quantized", False):
        model = model.double()
    model = get_peft_model(model, config, adapter_name="first")
    model.add_adapter("second", further or deepcopy(config))
    changed = ("lora_B", "sparsegrad_adapter", "graddrop_adapter", "modules_to_save", "trainable_tokens_delta")
    for name, parameter in model.named_parameters():
        if any(part in name for part in changed):
            parameter.data.normal_(std=0.2)
    return model.eval()


def alone(model, name, call):
    """What `call()` gives for the whole batch with one adapter, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    result = call()
    model.set_adapter("first")
    return result


@torch.no_grad()
def check_rows(model, inputs, rows=ROWS, tolerance=1e-9):
    mixed = model(**inputs, adapter_names=rows).logits
    expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in set(rows)}
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], expected[name][row], atol=tolerance, rtol=tolerance)
    assert not any(torch.allclose(expected[a], expected[b]) for a in expected for b in expected if a != b)


def tokens():
    return {"input_ids": batch(size=len(ROWS))["input_ids"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_each_row_is_as_its_adapter_alone(method, kind):
    check_rows(two_adapters(method, MODELS[kind](), MLP[kind]), tokens())


def test_layers_that_do_more_than_multiply():
    """GradDrop's normalisation layers and embeddings, biases included; the default targets have the former."""
    check_rows(two_adapters("graddrop", bert(), ["LayerNorm", "word_embeddings", "pooler.dense"]), tokens())
    check_rows(two_adapters("graddrop", llama(), None), tokens())


def test_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1))
    model = two_adapters("graddrop", model, ["0"])
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        mixed = model(x, adapter_names=ROWS)
        for row, name in enumerate(ROWS):
            torch.testing.assert_close(mixed[row], alone(model, name, lambda: model(x))[row])


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_on_some_layers_only(method):
    model = two_adapters(method, llama(), MLP["llama"], further=METHODS[method](["down_proj"]))
    check_rows(model, tokens())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "further", [{"modules_to_save": ["classifier"]}, {"trainable_token_indices": [3, 4, 5, 6, 7]}]
)
def test_trained_modules_and_tokens_go_with_their_row(method, further):
    check_rows(two_adapters(method, bert(), MLP["bert"], **further), tokens())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "search"), [("llama", {}), ("llama", {"num_beams": 3}), ("t5", {"num_beams": 3})], ids=str
)
def test_generate(method, kind, search):
    targets = {"llama": MLP["llama"], "t5": ["wi", "wo"]}[kind]
    model = two_adapters(method, MODELS[kind](), targets, task_type={"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[kind])
    settings = {**tokens(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **search}
    mixed = model.generate(**settings, adapter_names=ROWS)
    expected = {name: alone(model, name, lambda: model.generate(**settings)) for name in set(ROWS)}
    for row, name in enumerate(ROWS):
        assert torch.equal(mixed[row], expected[name][row])
    assert len({tuple(each.flatten().tolist()) for each in expected.values()}) > 1, "not all adapters find the same"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_base(tmp_path, method, bits):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}": True, "bnb_4bit_compute_dtype": torch.float32})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    check_rows(two_adapters(method, model, MLP["llama"]), tokens(), tolerance=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_rows(method):
    """As in LoRA, a pass in evaluation mode with autograd on is differentiable."""
    model = two_adapters(method, llama(), MLP["llama"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**tokens(), adapter_names=ROWS).logits[2].square().mean().backward()
    mixed = [parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    model(input_ids=tokens()["input_ids"][2:3]).logits.square().mean().backward()
    for one, parameter in zip(mixed, trained, strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_of_a_mixed_batch(method):
    """Not after one that failed either. LoRA's hooks then stay, so that it is no control here."""
    model = two_adapters(method, llama(), MLP["llama"])
    before = model(**tokens()).logits
    model(**tokens(), adapter_names=ROWS)
    assert torch.equal(model(**tokens()).logits, before)
    with pytest.raises(ValueError, match=r"adapter_names.* 3 .*4"):
        model(**tokens(), adapter_names=ROWS[:3])
    if method != "lora":
        assert torch.equal(model(**tokens()).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_without_adapters_every_row_is_the_base(method):
    model = two_adapters(method, llama(), MLP["llama"])
    with model.disable_adapter():
        assert torch.equal(model(**tokens(), adapter_names=ROWS).logits, model(**tokens()).logits)


OURS = ["sparsegrad", "graddrop"]


@pytest.mark.parametrize("method", OURS)
def test_several_sequences_for_a_row_are_refused_with_a_way_out_that_works(method):
    model, ids = two_adapters(method, llama(), MLP["llama"]), tokens()["input_ids"][:2]
    search = {"max_new_tokens": 3, "do_sample": True}
    message = r"2 names for 4 rows: .*in place of `num_return_sequences` each row with its name as often"
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, adapter_names=ROWS[:2], num_return_sequences=2, **search)
    names = [name for name in ROWS[:2] for _ in range(2)]
    assert len(model.generate(input_ids=ids.repeat_interleave(2, 0), adapter_names=names, **search)) == 4


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "third", "first", "first"], "`adapter_names` has 'third', .* it has first, second, and __base__"),
        (["first"] * 3, "`adapter_names` has 3 names for 4 rows"),
        ("first", "`adapter_names` must be a list with one name for each row, not 'first'"),
    ],
)
def test_names_that_do_not_fit_are_refused(method, names, message):
    model = two_adapters(method, llama(), MLP["llama"])
    with pytest.raises(ValueError, match=message):
        model(**tokens(), adapter_names=names)


@pytest.mark.parametrize("method", METHODS)
def test_states_without_a_right_answer_are_refused(method):
    model = two_adapters(method, llama(), MLP["llama"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**tokens(), adapter_names=ROWS)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        model(**tokens(), adapter_names=ROWS)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("active", ["first", "second"])
def test_adapters_of_which_one_trains_a_head_are_refused(method, active):
    """LoRA fails with a KeyError, or gives the original head to the rows of an adapter that has its own."""
    model = two_adapters(method, bert(), MLP["bert"], METHODS[method](MLP["bert"]), modules_to_save=["classifier"])
    model.set_adapter(active)
    with pytest.raises(ValueError, match=r"only some train 'model.classifier'"):
        model(**tokens(), adapter_names=ROWS)


@pytest.mark.parametrize("method", OURS)
def test_layers_whose_input_has_other_rows_are_refused(method):
    """Experts take the tokens that were routed to them, by chance as many as the batch has rows."""
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(8, 8)])})
    model = two_adapters(method, model, ["experts.0"])
    with pytest.raises(ValueError, match=r"on 'model.experts.0', whose input does not have the rows"):
        model(torch.randn(4, 8), adapter_names=ROWS)
