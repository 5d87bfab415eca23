"""The experiments in the layout of PEFT's MetaMathQA comparison, and the runner that hands them to PEFT's program."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import batch, llama, logits

from benchmarks.metamathqa.__main__ import EXPERIMENTS, HERE, main
from peft_sparsegrad import GradDropConfig, SparseGradAdam, SparseGradConfig

EXPECTED = {
    "sparsegrad/llama-3.2-3B-default": SparseGradConfig(task_type="CAUSAL_LM"),
    "sparsegrad/llama-3.2-3B-paper": SparseGradConfig.from_variant("paper", task_type="CAUSAL_LM"),
    "graddrop/llama-3.2-3B-target-q-v": GradDropConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "graddrop/llama-3.2-3B-on-lora-rank32": LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64),
}
# Stands in for PEFT's program, which needs a GPU: it takes the same arguments and the same three parts of the path.
PROGRAM = """
import argparse, json
import torch
from peft import PeftConfig
from utils import FILE_NAME_TRAIN_PARAMS

parser = argparse.ArgumentParser()
parser.add_argument("-v", "--verbose", action="store_true")
parser.add_argument("path_experiment")
options = parser.parse_args()
parts = options.path_experiment.split("/")
settings = json.load(open(f"{options.path_experiment}/{FILE_NAME_TRAIN_PARAMS}"))
optimizer = getattr(torch.optim, settings.get("optimizer_type", "AdamW"))
config = PeftConfig.from_pretrained(options.path_experiment)
print(len(parts), parts[0], options.verbose, optimizer.__name__, type(config).__name__)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the stand-in, and this process as it was once the test is over."""
    folder = tmp_path / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(PROGRAM)
    (folder / "utils.py").write_text('FILE_NAME_TRAIN_PARAMS = "training_params.json"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.optim, "SparseGradAdam", None, raising=False)
    monkeypatch.setattr(peft, "get_peft_model", peft.get_peft_model)
    yield tmp_path
    sys.modules.pop("utils", None)


def test_every_experiment_is_known():
    assert set(EXPERIMENTS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains_in_a_loop_like_that_of_peft(name):
    folder = HERE / "experiments" / name
    config = PeftConfig.from_pretrained(str(folder))
    assert config.to_dict() == {**EXPECTED[name].to_dict(), "peft_version": config.peft_version}
    params = json.loads((folder / "training_params.json").read_text("utf-8"))
    kind = {"AdamW": torch.optim.AdamW, "SparseGradAdam": SparseGradAdam}[params.get("optimizer_type", "AdamW")]
    model = get_peft_model(llama(), config)
    untrained = logits(model)
    optimizer = kind(model.parameters(), **params["optimizer_kwargs"])
    with torch.inference_mode():
        model.eval()(**batch())
    for seed in range(34):  # longer than the warm-up
        model.train()
        optimizer.zero_grad()
        model(**batch(seed), num_items_in_batch=64).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if seed in (10, 33):  # in the warm-up and after it
            with torch.inference_mode():
                model.eval().generate(input_ids=batch()["input_ids"][:, :2], max_new_tokens=1, pad_token_id=0)
    assert not torch.equal(logits(model), untrained)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sparsegrad/llama-3.2-3B-default", "AdamW SparseGradConfig"),
        ("sparsegrad/llama-3.2-3B-paper", "SparseGradAdam SparseGradConfig"),
        ("graddrop/llama-3.2-3B-target-q-v", "AdamW GradDropConfig"),
        ("graddrop/llama-3.2-3B-on-lora-rank32", "AdamW LoraConfig"),
    ],
)
def test_runner_hands_over_the_experiment_and_further_options(checkout, capsys, name, said):
    main(["--peft-source", ".", name, "-v"])
    assert capsys.readouterr().out == f"3 experiments True {said}\n"


def test_masks_are_put_on_the_adapter_that_the_program_makes(checkout, capsys):
    main(["--peft-source", ".", "graddrop/llama-3.2-3B-on-lora-rank32"])
    model = peft.get_peft_model(llama(), LoraConfig(r=8, target_modules=["up_proj"], init_lora_weights=False))
    model(**batch()).loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert 0.1 < (gradients == 0).float().mean() < 0.3, "p=0.2 of masks.json"


def test_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    before = Path.cwd()
    with pytest.raises(SystemExit, match="2"):
        main(["--peft-source", str(tmp_path), EXPERIMENTS[0]])
    assert "clone https://github.com/huggingface/peft" in capsys.readouterr().err
    assert Path.cwd() == before
