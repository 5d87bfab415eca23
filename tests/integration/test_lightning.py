"""Lightning's Trainer and Fabric, which hand the passes of a step to the optimizer as a closure.

Everything is held to a plain loop with the same batches, to the last bit.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, llama

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradAdam, SparseGradConfig

lightning = pytest.importorskip("lightning")

STEPS, LAYERS = 12, ["up_proj", "down_proj"]
RENEWED = {"density": 0.05, "warmup_steps": 4, "renewal_steps": 3}
KINDS = {
    "LoRA": (LoraConfig(r=4, target_modules=LAYERS), torch.optim.AdamW),
    "SparseGrad": (SparseGradConfig(**RENEWED), torch.optim.AdamW),
    "columns": (SparseGradConfig(basis="columns", **RENEWED), torch.optim.AdamW),
    "SVD": (SparseGradConfig(**{**RENEWED, "basis": "svd", "warmup_steps": 2}), torch.optim.AdamW),
    "dynamic": (SparseGradConfig(density=0.05, warmup_steps=4, support="dynamic"), SparseGradAdam),
    "GradDrop": (GradDropConfig(p=0.5), torch.optim.AdamW),
    "GradDrop, held": (GradDropConfig(p=0.5, frozen="hold"), torch.optim.AdamW),
    "Layer-GradDrop": (GradDropConfig.from_variant("Layer-GradDrop", p=0.5), torch.optim.AdamW),
    "GradDrop-Epoch": (GradDropConfig.from_variant("GradDrop-Epoch", num_epochs=2), torch.optim.AdamW),
}
WAYS = {
    "automatic": {},
    "micro-batches": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.01},
    "bf16": {"precision": "bf16-mixed"},
}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Module(lightning.LightningModule):
    def __init__(self, kind: str, manual: bool = False) -> None:
        super().__init__()
        self.kind, self.model, self.automatic_optimization = kind, model_of(kind), not manual

    def on_train_batch_start(self, examples, index) -> None:  # a resumed run may skip the start of its epoch
        announce(self.kind, self.model, self.current_epoch)

    def training_step(self, examples, index):
        loss = self.model(**examples).loss
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return optimizer_of(self.kind, self.model)


def model_of(kind: str):
    torch.manual_seed(0)
    return get_peft_model(llama(), KINDS[kind][0]).train()


def optimizer_of(kind: str, model) -> torch.optim.Optimizer:
    return KINDS[kind][1]([p for p in model.parameters() if p.requires_grad], lr=0.02)


def announce(kind: str, model, epoch: int) -> None:
    if kind == "GradDrop-Epoch":
        GradDrop(model).set_epoch(epoch)


def data() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader([batch(number % 4) for number in range(STEPS // 2)], batch_size=None)


def fitted(module: Module, **settings):
    checkpoint = settings.pop("ckpt_path", None)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, **{**QUIET, **settings})
    trainer.fit(module, data(), ckpt_path=checkpoint, weights_only=False)
    return trained(module.model)


def plain(kind: str, accumulate_grad_batches=1, gradient_clip_val=None, precision=None) -> dict[str, torch.Tensor]:
    model = model_of(kind)
    optimizer = optimizer_of(kind, model)
    for epoch in range(2):
        announce(kind, model, epoch)
        for index, examples in enumerate(data()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
                loss = model(**examples).loss
            (loss / accumulate_grad_batches).backward()
            if (index + 1) % accumulate_grad_batches == 0:
                if gradient_clip_val is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip_val)
                optimizer.step()
                optimizer.zero_grad()
    return trained(model)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(bool(value.any()) for value in one.values())
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_what_a_plain_loop_does(kind, way):
    assert_same(fitted(Module(kind), **WAYS[way]), plain(kind, **WAYS[way]))


@pytest.mark.parametrize("kind", KINDS)
def test_manual_optimization_trains_what_a_plain_loop_does(kind):
    """There too Lightning hands a closure to the optimizer, one that does nothing."""
    assert_same(fitted(Module(kind, manual=True)), plain(kind))


class Interrupted(lightning.Callback):
    """Writes a checkpoint after a step, and ends the run there."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_ends_as_the_uninterrupted_one(kind, tmp_path):
    """From the end of the first epoch, as Lightning does not know which batches of an epoch a checkpoint has had."""
    path, module = str(tmp_path / "run.ckpt"), Module(kind)
    stop = Interrupted(path, STEPS // 2)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, callbacks=[stop], **QUIET)
    trainer.fit(module, data())
    assert trainer.global_step == STEPS // 2
    assert_same(fitted(Module(kind), ckpt_path=path), plain(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_fabric_trains_what_a_plain_loop_does(kind):
    model = model_of(kind)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, optimizer_of(kind, model))
    for epoch in range(2):
        announce(kind, model, epoch)
        for examples in data():
            fabric.backward(wrapped(**examples).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(trained(model), plain(kind))
