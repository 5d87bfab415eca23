"""Tiny models and trained adapters on the disk, and a way to run a command in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from peft_sparsegrad import GradDropConfig, SparseGradConfig, create_sparsegrad_optimizer, warmup
from peft_sparsegrad.cli.app import run

MLP = ["up_proj", "down_proj"]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def command(capsys):
    """Run `peft-sparsegrad` with these words."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def call(*words) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(ended.value.code or 0, captured.out, captured.err)

    yield call
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def refused(command):
    """Run a command that must end in one sentence on stderr; returns the sentence."""

    def call(*words) -> str:
        result = command(*words)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        return result.err

    return call


class Shelf:
    """Adapters that are made when a test first asks for them, and then kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, torch.nn.Module] = {}

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def base(self, kind: str = "llama"):
        if kind == "llama":
            return tiny.llama()
        if kind == "bert":
            return tiny.bert(num_labels=3)
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCAB, bos_token_id=1, eos_token_id=2, **sizes))

    def saved_base(self, kind: str = "llama", **settings) -> Path:
        path = self.folder / f"base-{kind}"
        if not path.exists():
            self.base(kind).save_pretrained(path)
            tiny.tokenizer().save_pretrained(path)
        return path

    def adapter(self, name: str) -> Path:
        """The folder of an adapter; its model is in `models`."""
        path = self.folder / name
        if not path.exists():
            kind, config, seed = ADAPTERS[name]()
            base = self.base(kind)
            base.name_or_path = str(self.saved_base(kind))
            torch.manual_seed(seed)
            model = get_peft_model(base, config)
            _train(model, seed)
            model.save_pretrained(path)
            self.models[name] = model
        return path

    def model(self, name: str):
        self.adapter(name)
        return self.models[name]


def _train(model, seed: int) -> None:
    batches = [tiny.batch(seed + i) for i in range(4)]
    if model.config.model_type == "bert":
        batches = [{**batch, "labels": batch["input_ids"][:, 0] % 3} for batch in batches]
    config = model.peft_config["default"]
    if isinstance(config, SparseGradConfig) and config.basis != "identity" and config.init_weights:
        warmup(model, batches, progress=False, steps=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    if isinstance(config, SparseGradConfig):
        optimizer = create_sparsegrad_optimizer(model, lr=0.02, weight_decay=0.01)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _sparsegrad(kind="llama", seed=0, **settings):
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    config = SparseGradConfig(**{"density": 0.05, "warmup_steps": 4, "task_type": task, "slack": 6.0, **settings})
    return kind, config, seed


def _graddrop(kind="llama", seed=0, **settings):
    return kind, GradDropConfig(**{"task_type": "CAUSAL_LM", "target_modules": MLP, **settings}), seed


def _lora(kind="llama", **settings):
    return kind, LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": MLP, **settings}), 0


ADAPTERS = {
    "sparsegrad": _sparsegrad,
    "sparsegrad-2": lambda: _sparsegrad(seed=1),
    "sparsegrad-full": lambda: _sparsegrad(rank="full"),
    "sparsegrad-dynamic": lambda: _sparsegrad(support="dynamic"),
    "sparsegrad-identity": lambda: _sparsegrad(basis="identity", warmup_steps=0),
    "sparsegrad-identity-2": lambda: _sparsegrad(basis="identity", warmup_steps=0, seed=1),
    "sparsegrad-patterns": lambda: _sparsegrad(
        rank_pattern={"layers.1.mlp.up_proj": 20}, density_pattern={"down_proj": 0.03}
    ),
    "sparsegrad-noise": lambda: _sparsegrad(init_weights=False, seed=3),
    "sparsegrad-bert": lambda: _sparsegrad("bert", modules_to_save=["classifier"]),
    "sparsegrad-gpt2": lambda: _sparsegrad("gpt2"),
    "graddrop": _graddrop,
    "graddrop-2": lambda: _graddrop(seed=1),
    "graddrop-sparse": lambda: _graddrop(save_density=0.1),
    "graddrop-gpt2": lambda: _graddrop("gpt2", target_modules=["c_fc", "mlp.c_proj"]),
    "graddrop-frozen": lambda: _graddrop(target_modules=None, granularity="layer", interval="step", p=0.3),
    "lora": _lora,
    "lora-rs": lambda: _lora(use_rslora=True, lora_alpha=5, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 7}),
    "lora-gpt2": lambda: _lora("gpt2", target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True),
    "lora-attention": lambda: _lora(target_modules=["q_proj"]),
    "ia3": lambda: (
        "llama",
        IA3Config(task_type="CAUSAL_LM", target_modules=MLP, feedforward_modules=["down_proj"]),
        0,
    ),
    "ia3-2": lambda: (
        "llama",
        IA3Config(task_type="CAUSAL_LM", target_modules=MLP, feedforward_modules=["down_proj"]),
        5,
    ),
}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def copied(shelf, tmp_path):
    """A copy of an adapter, to damage."""
    import shutil

    return lambda name: Path(shutil.copytree(shelf.adapter(name), tmp_path / f"copy-of-{name}"))
