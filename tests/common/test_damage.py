"""Damaged files, 200 of each kind, most in slow tests: the right adapter, or one clear error and a model as it was."""

from __future__ import annotations

import shutil
from random import Random

import pytest
import torch
from mutations import mutate_bytes, mutate_config, mutate_contents, mutate_tensors
from peft import PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits, train

from peft_sparsegrad import GradDropConfig, SparseGradConfig, save_transition_matrices, warmup

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETTINGS = {"density": 0.05, "warmup_steps": 0, "task_type": "CAUSAL_LM"}


@pytest.fixture(params=[range(40), pytest.param(range(40, 200), marks=pytest.mark.slow)], ids=["few", "many"])
def seeds(request):
    """One for each damaged file."""
    return request.param


def base_model():
    return llama(num_hidden_layers=2)


def sparsegrad(folder, **settings):
    model = adapted(base_model(), warmup_steps=4, slack=6.0, **settings)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    train(model)
    model.save_pretrained(folder)
    save_transition_matrices(model, folder / "matrices.safetensors")
    return model


def graddrop(folder, **settings):
    config = GradDropConfig(target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base_model(), config)
    train(model)
    model.save_pretrained(folder)
    return model


ADAPTERS = {
    "sparsegrad": sparsegrad,
    "graddrop": graddrop,
    "graddrop-sparse": lambda folder: graddrop(folder, save_density=0.1),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folder and logits of each adapter."""
    made = {}
    for name, make in ADAPTERS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        made[name] = folder, logits(PeftModel.from_pretrained(base_model(), folder))
    return made


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def refusal(load, *names: str) -> str:
    """Load; returns the error's type and text, which must name one of the `names`, or '' if there is none."""
    error = ""
    try:
        load()
    except (ValueError, KeyError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    assert not error or any(name in error for name in names), error
    return error


@pytest.mark.parametrize("name", ADAPTERS)
def test_mutated_adapter_is_right_or_refused_before_the_model_is_changed(shelf, tmp_path, name, seeds):
    folder, expected = shelf[name]
    base, refused = base_model(), 0
    before, plain = state(base), logits(base)
    for seed in seeds:
        random = Random(seed)
        path = shutil.copytree(folder, tmp_path / str(seed))
        if random.random() < 0.4:
            what = mutate_bytes(path / FILE, random)
        else:
            what = mutate_tensors(path / FILE, random, keep_checksum=random.random() < 0.4)
        loaded: list[PeftModel] = []
        load = lambda: loaded.append(PeftModel.from_pretrained(base, path))  # noqa: E731, B023
        error = refusal(load, FILE, "graddrop_")
        refused += bool(error)
        if FILE in error:
            assert same(state(base), before), (seed, what)
        elif error:  # only the model can tell, when PEFT has injected the layers, as with every method
            assert what in ("_missing", "_extra", "_renamed", "_shape", "_numbers", "_lost_column"), (seed, what)
            assert torch.equal(logits(base), plain), (seed, what)
            base = base_model()
        else:
            assert torch.equal(logits(loaded[0]), expected), (seed, what)
            base = loaded[0].unload()
        shutil.rmtree(path)
    assert refused > 0.9 * len(seeds)


@pytest.mark.parametrize("name", ADAPTERS)
def test_mutated_tensors_are_refused_under_the_name_of_an_adapter_that_is_there(shelf, tmp_path, name, seeds):
    """PEFT does not read the configuration again, and so nobody looks at the checksum."""
    folder, expected = shelf[name]
    model = PeftModel.from_pretrained(base_model(), folder)
    before = state(model)
    for seed in seeds:
        path = shutil.copytree(folder, tmp_path / str(seed))
        what = mutate_tensors(path / FILE, Random(seed), keep_checksum=False)
        refusal(lambda: model.load_adapter(path, "default"), "sparsegrad_", "graddrop_")  # noqa: B023
        assert same(state(model), before), (seed, what)
        shutil.rmtree(path)
    assert torch.equal(logits(model), expected)


# PEFT reads the file twice, first by itself: what is no JSON, or has no `peft_type`, ends in its own errors, and so
# does a further module without tensors, for which it injects the layers first.
PEFTS_OWN = ("JSONDecodeError", "UnicodeDecodeError", "KeyError", "NoMatchingPeftModuleError", "Invalid task type")


@pytest.mark.parametrize("name", ["sparsegrad", "graddrop-sparse"])
def test_mutated_settings_are_right_or_refused(shelf, tmp_path, name, seeds):
    folder, expected = shelf[name]
    plain, refused = logits(base_model()), 0
    for seed in seeds:
        path = shutil.copytree(folder, tmp_path / str(seed))
        what = mutate_config(path / CONFIG, Random(seed))
        base, loaded = base_model(), []
        load = lambda: loaded.append(PeftModel.from_pretrained(base, path))  # noqa: E731, B023
        error = refusal(load, FILE, "ValueError: `", "tensors of the adapter", "no place for", *PEFTS_OWN)
        refused += bool(error)
        if not error.startswith("KeyError"):
            assert torch.equal(logits(base), plain if error else expected), (seed, what)
        shutil.rmtree(path)
    assert refused > 0.4 * len(seeds)


def test_mutated_transition_matrices_are_right_or_refused_before_the_model_is_changed(shelf, tmp_path, seeds):
    path = tmp_path / "matrices.safetensors"
    whole = shelf["sparsegrad"][0] / "matrices.safetensors"
    config = {**SETTINGS, "warmup_steps": 4, "slack": 6.0, "transition_matrices": str(path)}
    base, refused = base_model(), 0
    before = state(base)
    shutil.copy(whole, path)
    expected = state(get_peft_model(base_model(), SparseGradConfig(**config)))
    for seed in seeds:
        shutil.copy(whole, path)
        random = Random(seed)
        kind = random.random()
        if kind < 0.3:
            what = mutate_bytes(path, random)
        elif kind < 0.7:
            what = mutate_tensors(path, random, keep_checksum=random.random() < 0.4)
        else:
            what = mutate_contents(path, random)
        loaded: list = []
        load = lambda: loaded.append(get_peft_model(base, SparseGradConfig(**config)))  # noqa: E731, B023
        if error := refusal(load, "matrices.safetensors"):
            refused += 1
            assert same(state(base), before), (seed, what)
            assert error.startswith("ValueError: `transition_matrices`")
        else:
            assert same(state(loaded[0]), expected), (seed, what)
            base = loaded[0].unload()
    assert refused > 0.8 * len(seeds)
