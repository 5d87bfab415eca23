"""The pictures of the documentation, from a real run: a small LLaMA that knows docstrings meets source code.

    python docs/pictures.py docs/pictures

takes one to two minutes of one CPU core.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

from examples._text import draw_batches, standard_library_code, standard_library_docstrings
from peft_sparsegrad import GradDropConfig, SparseGradCallback, SparseGradConfig, WarmUpReport, warmup
from peft_sparsegrad.plots import (
    active_entries,
    energy_over_training,
    gradient_heat_map,
    gradient_magnitudes,
    nonzero_over_training,
    output_gradient_rows,
    recorded_nonzero_shares,
    spectra,
    support_maps,
)
from peft_sparsegrad.plots.nonzero_shares import observed_output_gradients
from peft_sparsegrad.plots.supports import LayerSupport
from peft_sparsegrad.sparsegrad.layer import SparseGradLinear, layer_adapters

LENGTH, BATCH = 64, 16
LAYER, LOWER_LAYER = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"
VARIANTS = ("GradDrop", "Anneal-Layer-GradDrop", "GradDrop-Epoch", "GradFreeze-TopDown")


def draw_all(folder: Path) -> None:
    """Train, and write every picture to `folder`, which appears only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        path = Path(temporary) / "pictures"
        path.mkdir()
        base = pretrained()
        for name, figure in {**sparsegrad_pictures(base), **classifier_pictures(base), **graddrop_pictures()}.items():
            figure.savefig(path / f"{name}.png")
        path.rename(folder)


def sparsegrad_pictures(base: LlamaForCausalLM) -> dict[str, Figure]:
    """Name to figure, of an adapter with the default settings, and of one layer's gradient in its basis."""
    code = code_blocks()
    adapted, report = warmed_up(base, draw_batches(code[:-BATCH], 8, BATCH, seed=1))
    gradient = gradient_of(base, code[-BATCH:])
    basis = next(adapter.basis for adapter in layer_adapters(adapted, "default") if adapter.plan.name == LAYER)
    return {
        "gradient_heat_map": gradient_heat_map(gradient, basis.U, basis.V, LAYER),
        "sorted_magnitudes": gradient_magnitudes(gradient, basis.U, basis.V, LAYER),
        "spectra": spectra(report),
        "support_map": support_maps(supports_of(adapted)),
        "energy_over_training": energy_over_training(train_with_log(base, code)),
    }


def classifier_pictures(base: LlamaForCausalLM) -> dict[str, Figure]:
    """∂L/∂Y of the paper's layer, two full bases, while the model learns to tell docstrings from code."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(copy.deepcopy(base.config))
    model.config.pad_token_id = 0
    model.model.load_state_dict(base.model.state_dict())
    adapted = get_peft_model(model, SparseGradConfig(rank="full", task_type="SEQ_CLS"))
    batches = labelled_batches(49)
    warmup(adapted, batches[:8], steps=8, progress=False)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    with recorded_nonzero_shares(adapted) as shares:
        for batch in batches[8:-1]:
            adapted(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    layer = model.get_submodule(LOWER_LAYER)
    assert isinstance(layer, SparseGradLinear)
    rows: list[torch.Tensor] = []
    with observed_output_gradients({"": layer}, lambda _, gradient: rows.append(gradient)):
        adapted(**batches[-1]).loss.backward()
    V = layer.adapter("default").basis.V
    return {
        "output_gradient_rows": output_gradient_rows(rows[0], V, LOWER_LAYER),
        "nonzero_over_training": nonzero_over_training(shares),
    }


def labelled_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of docstrings (0) and code (1) of 1 to `LENGTH` bytes, padded with zeros."""
    generator = torch.Generator().manual_seed(0)
    texts = [docstring_blocks(), code_blocks()]
    batches = []
    for _ in range(count):
        labels = torch.randint(2, (BATCH,), generator=generator)
        rows = [int(torch.randint(len(texts[label]), (), generator=generator)) for label in labels]
        blocks = torch.stack([texts[label][row] for label, row in zip(labels, rows, strict=True)])
        lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        batches.append({"input_ids": blocks * mask, "attention_mask": mask, "labels": labels})
    return batches


def graddrop_pictures() -> dict[str, Figure]:
    """Six blocks and five epochs of some variants."""
    blocks = [f"block {number}" for number in range(1, 7)]
    return {
        f"active_entries_{name.lower()}": active_entries(
            GradDropConfig.from_variant(name, num_epochs=5), blocks, title=name
        )
        for name in VARIANTS
    }


def byte_blocks(documents: list[str]) -> torch.Tensor:
    """Blocks of `LENGTH` bytes, which are the tokens, in random order."""
    tokens = torch.frombuffer(bytearray("\n\n".join(documents).encode()), dtype=torch.uint8).long()
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def pretrained() -> LlamaForCausalLM:
    """A LLaMA with 2 blocks of width 128, trained on docstrings for 300 steps."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in draw_batches(docstring_blocks(), 300, BATCH, seed=0):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@cache
def docstring_blocks() -> torch.Tensor:
    """Blocks (count, `LENGTH`) of bytes of the standard library's docstrings."""
    return byte_blocks(standard_library_docstrings())


@cache
def code_blocks() -> torch.Tensor:
    """Blocks (count, `LENGTH`) of bytes of the standard library's code."""
    return byte_blocks(standard_library_code(400_000))


def copy_of(base: LlamaForCausalLM) -> LlamaForCausalLM:
    model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict())
    return model


def warmed_up(base: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> tuple[PeftModel, WarmUpReport]:
    """Return a copy of the model with an adapter of the default settings, and what its warm-up found."""
    adapted = get_peft_model(copy_of(base), SparseGradConfig())
    return adapted, warmup(adapted, batches, steps=8, progress=False)


def gradient_of(base: LlamaForCausalLM, held_out: torch.Tensor) -> torch.Tensor:
    """Return ∂L/∂W of a batch that the warm-up has not seen."""
    model = copy_of(base)
    model(input_ids=held_out, labels=held_out).loss.backward()
    gradient = model.get_submodule(LAYER).weight.grad
    assert isinstance(gradient, torch.Tensor)
    return gradient


def supports_of(adapted: PeftModel) -> list[LayerSupport]:
    """Return the entries that train, layer by layer."""
    supports = []
    for adapter in layer_adapters(adapted, "default"):
        assert adapter.indices is not None
        supports.append(LayerSupport(adapter.plan.name, adapter.plan.role, adapter.indices, adapter.plan.core_shape))
    return supports


def train_with_log(base: LlamaForCausalLM, code: torch.Tensor) -> list[dict[str, float]]:
    """The Trainer's log of 150 steps on source code."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=150, per_device_train_batch_size=BATCH, learning_rate=1e-2, logging_steps=5,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = [{"input_ids": block, "labels": block} for block in code]
        model = get_peft_model(copy_of(base), SparseGradConfig(task_type="CAUSAL_LM"))
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[SparseGradCallback()])  # pyright: ignore
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
