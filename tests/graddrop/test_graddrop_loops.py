"""GradDrop in loops that are not ours: steps inside the backward pass, on copies, by averages, and resumed."""

from __future__ import annotations

import pytest
import schedulefree
import torch
from graddrop_tools import deltas, dropped, masks_of
from peft import LoraConfig, PeftModel, get_peft_model
from pytorch_optimizer import Lookahead
from safetensors.torch import load_file, save_file
from tiny import batch, llama, rows, train_with_an_optimizer_each
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import GradDrop, GradDropConfig

VARIANTS = [{"p": 0.5}, {"granularity": "layer", "p": 0.5}]


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model, number: int) -> float:
    loss = model(**batch(number % 4)).loss
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_optimizer_inside_the_backward_pass_is_the_one_after_it(settings, checkpointing):
    losses = []
    for inside in (False, True):
        model = dropped(**settings).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        losses.append(train_with_an_optimizer_each(model, 6, inside))
        assert masks_of(model).progress.steps_taken.value == 6
    assert losses[0] == losses[1]


def step_on_copies(model, copies, optimizer) -> None:
    for parameter, own in zip(trained(model), copies, strict=True):
        own.grad = torch.zeros_like(own) if parameter.grad is None else parameter.grad.clone()
    optimizer.step()
    for parameter, own in zip(trained(model), copies, strict=True):
        parameter.data.copy_(own)
        parameter.grad = None


@pytest.mark.parametrize(
    ("settings", "announced", "message"),
    [
        ({"p": 0.5}, False, "cannot count the steps.*set_step"),
        ({"p": 0.5, "frozen": "hold"}, True, "cannot hold masked entries.*frozen='gradient'"),
        ({"granularity": "layer", "p": 0.5}, True, "cannot hold masked entries"),
    ],
    ids=str,
)
def test_optimizer_on_copies_is_refused_where_it_would_be_wrong(settings, announced, message):
    model = dropped(**settings).train()
    graddrop = GradDrop(model)
    copies = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(copies, lr=0.01)

    def steps():
        for number in range(4):
            if announced:
                graddrop.set_step(number)
            backward(model, number)
            step_on_copies(model, copies, optimizer)

    with pytest.raises(RuntimeError, match=message):
        steps()


def test_optimizer_on_copies_is_right_with_announced_steps_and_masked_gradients():
    model, plain = dropped(p=0.5).train(), dropped(p=0.5).train()
    copies = [parameter.detach().clone() for parameter in trained(model)]
    on_copies, own = torch.optim.SGD(copies, lr=0.5), torch.optim.SGD(trained(plain), lr=0.5)
    graddrop = GradDrop(model)
    for number in range(4):
        graddrop.set_step(number)
        backward(model, number)
        step_on_copies(model, copies, on_copies)
        backward(plain, number)
        own.step()
        own.zero_grad()
    assert all(torch.equal(deltas(plain)[name], delta) for name, delta in deltas(model).items())


def test_adapter_loaded_between_two_passes_is_no_step(tmp_path):
    dropped(p=0.5, init_weights=False).save_pretrained(tmp_path)
    model = dropped(p=0.5).train()
    backward(model, 0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    model.train()
    backward(model, 1)
    assert all(delta.any() for delta in deltas(model).values())


def test_file_without_the_number_of_steps_is_refused(tmp_path):
    dropped(p=0.5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("num_steps")}
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors of the adapter are missing.*num_steps"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_masks_on_other_parameters_refuse_steps_on_copies():
    model = get_peft_model(llama(), LoraConfig(target_modules=["up_proj"])).train()
    GradDrop(model, GradDropConfig(p=0.5))
    copies = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(copies, lr=0.01)
    backward(model, 0)
    step_on_copies(model, copies, optimizer)
    with pytest.raises(RuntimeError, match="cannot count the steps"):
        backward(model, 1)


def test_schedule_free_optimizer_is_refused_where_entries_rest():
    model = dropped(granularity="layer", p=0.5).train()
    optimizer = schedulefree.AdamWScheduleFree(trained(model), lr=0.01)
    optimizer.train()
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"AdamWScheduleFree swaps the weights for an average.*frozen='gradient'"):
        optimizer.step()


def test_lookahead_holds_what_rests():
    """Its slow weights would move entries that are masked in this step."""
    model = dropped(p=0.5, frozen="hold").train()
    optimizer = Lookahead(torch.optim.AdamW(trained(model), lr=0.05), k=2)
    for number in range(6):
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        backward(model, number)
        rests = {name: delta.grad == 0 for name, delta in deltas(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, delta in deltas(model).items():
            assert torch.equal(delta[rests[name]], before[name][rests[name]])


class SlowWeights(torch.optim.Optimizer):
    """A Lookahead as older libraries have it: without the parts of `Optimizer` that call the hooks around a step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.optimizer.step(closure)
        with torch.no_grad():
            for slow, parameter in zip(self.slow, self.parameters, strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))


def full_or_delta(is_delta: bool, **settings) -> torch.nn.Module:
    model = dropped(**settings) if is_delta else llama()
    if not is_delta:
        GradDrop(model, GradDropConfig(**settings))
    return model.train()


def steps(model, optimizer, number: int) -> None:
    for each in range(number):
        backward(model, each)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize("settings", [{"p": 0.5, "frozen": "hold"}, {"granularity": "layer", "p": 0.5}], ids=str)
def test_slow_weights_of_a_wrapper_without_hooks_are_refused_where_entries_rest(settings, is_delta):
    model = full_or_delta(is_delta, **settings)
    optimizer = SlowWeights(torch.optim.SGD(trained(model), lr=0.1))
    with pytest.raises(RuntimeError, match=r"changed after the step.*slow weights.*frozen='gradient'"):
        steps(model, optimizer, 3)


def test_slow_weights_of_a_wrapper_without_hooks_are_right_where_nothing_is_held():
    model = dropped(p=0.5).train()
    steps(model, SlowWeights(torch.optim.SGD(trained(model), lr=0.1)), 4)
    assert masks_of(model).progress.steps_taken.value == 4


@pytest.mark.parametrize("is_delta", [True, False])
def test_weights_that_are_swapped_or_loaded_between_steps_are_no_slow_weights(is_delta):
    """An average is put in for an evaluation and taken out again; then the run goes on from earlier weights."""
    model = full_or_delta(is_delta, p=0.5, frozen="hold")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, optimizer, 2)
    with torch.no_grad():
        own = [parameter.clone() for parameter in trained(model)]
        for parameter in trained(model):
            parameter.mul_(0.5)
        model.eval()(**batch(0))
        for parameter, value in zip(model.train() and trained(model), own, strict=True):
            parameter.copy_(value)
    steps(model, optimizer, 1)
    model.load_state_dict(earlier)
    steps(model, optimizer, 2)


def test_run_resumed_without_the_callback_draws_the_masks_of_the_uninterrupted_one(tmp_path):
    def run(path, resume=None):
        model = dropped(p=0.5)
        arguments = TrainingArguments(
            str(path), max_steps=7, save_steps=4, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows(64)).train(resume_from_checkpoint=resume)
        return deltas(model)

    through = run(tmp_path / "through")
    resumed = run(tmp_path / "other", resume=str(tmp_path / "through" / "checkpoint-4"))
    assert all(torch.equal(resumed[name], delta) for name, delta in through.items())


def test_step_count_is_that_of_the_file(tmp_path):
    model = dropped(p=0.5).train()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for number in range(3):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert masks_of(loaded).progress.steps_taken.value == 3
    backward(loaded, 0)
    assert masks_of(loaded).progress.step == 3
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert masks_of(model).progress.steps_taken.value == 3


def test_reference_adapter_is_the_policy():
    """TRL copies the parameters whose names contain `.default.`."""
    model = dropped(p=0.5, init_weights=False)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    policy, reference = deltas(model), deltas(model, "ref")
    assert all(torch.equal(reference[name], delta) for name, delta in policy.items())
    assert any(delta.any() for delta in policy.values())
