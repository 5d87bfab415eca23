"""What is given to the explicit warm-up by mistake is refused in one sentence, and the adapter stays as it was."""

import pytest
import torch
from tiny import adapted, batch, llama
from transformers import BatchEncoding

from peft_sparsegrad import warmup

ONE = batch(size=2)
LISTS = {name: tensor.tolist() for name, tensor in ONE.items()}
DICTIONARIES = "dictionaries of tensors with `labels`.*a callable that runs one forward and one backward pass"
MISTAKES = {
    "tuples": ([(ONE["input_ids"], ONE["labels"])] * 4, f"batch 0 is a tuple and no dictionary.*{DICTIONARIES}"),
    "tensors": ([ONE, ONE["input_ids"]], f"batch 1 is a Tensor and no dictionary.*{DICTIONARIES}"),
    "texts": (["a text"] * 4, f"batch 0 is a str and no dictionary.*{DICTIONARIES}"),
    "lists for tensors": ([LISTS] * 4, "`input_ids` of warm-up batch 0 is a list and no tensor.*data collator"),
    "a list of labels": ([{**ONE, "labels": LISTS["labels"]}] * 4, "`labels` of warm-up batch 0 is a list"),
    "one batch": (ONE, r"`batches` is one batch: put it into a list, `\[batch\]`"),
    "a file's name": ("train.jsonl", f"`batches` must be several batches, not a str.*{DICTIONARIES}"),
    "a number": (8, f"`batches` must be several batches, not a int.*{DICTIONARIES}"),
    "nothing": (None, f"`batches` must be several batches, not a NoneType.*{DICTIONARIES}"),
}


@pytest.fixture(scope="module")
def model():
    return adapted(llama(num_hidden_layers=1), warmup_steps=2)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_batch_is_refused(model, mistake):
    batches, message = MISTAKES[mistake]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=message):
        warmup(model, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_steps_and_model_of_another_type(model):
    with pytest.raises(TypeError, match="`steps` must be a whole number or None, not '4'"):
        warmup(model, [ONE] * 4, steps="4", progress=False)
    with pytest.raises(TypeError, match="`model` must be a model with a SparseGrad adapter, not a list"):
        warmup([ONE] * 4, model, progress=False)


def test_what_a_tokenizer_gives_is_a_batch():
    warmup(adapted(llama(num_hidden_layers=1), warmup_steps=2), [BatchEncoding(ONE)] * 2, progress=False)
