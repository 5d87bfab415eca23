"""sentence-transformers' Trainer on an adapted encoder, with the plain contrastive loss and the one of GradCache.

GradCache (arXiv 2101.06983) computes the embeddings without a graph, and then piece by piece again, inside the
backward pass of the loss.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import bert, tokenizer
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropConfig, SparseGradCallback, SparseGradConfig, warmup_report

sentences = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

PAIRS = {
    "anchor": [" ".join(f"t{3 + (i * step) % 60}" for step in range(8)) for i in range(1, 49)],
    "positive": [" ".join(f"t{3 + (i * step) % 60}" for step in range(4, 12)) for i in range(1, 49)],
}
KINDS = {
    "LoRA": (LoraConfig(target_modules=["intermediate.dense", "output.dense"]), None),
    "SparseGrad": (SparseGradConfig(density=0.3, warmup_steps=2), None),
    "SparseGrad, callback": (SparseGradConfig(density=0.3, warmup_steps=2), SparseGradCallback),
    "columns": (SparseGradConfig(density=0.3, warmup_steps=2, basis="columns"), None),
    "SVD, renewed": (SparseGradConfig(density=0.3, warmup_steps=2, basis="svd", renewal_steps=3), None),
    "GradDrop": (GradDropConfig(p=0.5), None),
    "Layer-GradDrop": (GradDropConfig.from_variant("Layer-GradDrop"), GradDropCallback),
}
PLAIN, CACHED = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss


class StepsThatTrain(TrainerCallback):
    """Notes the steps after which the adapter is another one than before."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.steps, self.last = [], trained(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        now = trained(model)
        if any(not torch.equal(now[name], self.last[name]) for name in now):
            self.steps.append(state.global_step)
        self.last = now


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bert.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def fit(encoder, kind, path, loss, lr=1e-2, optim="adamw_torch", **settings):
    """Train for 12 steps of 8 pairs. Returns the model, and the steps in which the adapter has trained."""
    config, callback = KINDS[kind]
    model = sentences.SentenceTransformer(modules=[Transformer(encoder), Pooling(32)], device="cpu")
    torch.manual_seed(0)
    model.add_adapter(copy.deepcopy(config))
    arguments = sentences.SentenceTransformerTrainingArguments(
        str(path), max_steps=12, per_device_train_batch_size=8, learning_rate=lr, optim=optim, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", seed=1,
    )  # fmt: skip
    steps = StepsThatTrain()
    callbacks = [steps] if callback is None else [callback(), steps]
    sentences.SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(PAIRS), loss=loss(model, **settings), callbacks=callbacks
    ).train()
    return model.eval(), steps.steps


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_reloads(encoder, kind, tmp_path):
    model, steps = fit(encoder, kind, tmp_path, PLAIN)
    assert steps[-1] == 12
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    words, base = PAIRS["anchor"][:4], sentences.SentenceTransformer(encoder, device="cpu")
    assert (loaded.encode(words) == model.encode(words)).all()
    assert (loaded.encode(words) != base.encode(words)).any()


@pytest.mark.parametrize("kind", ["LoRA", "SVD, renewed", "GradDrop", "Layer-GradDrop"])
def test_cached_gradients_train_what_the_plain_loss_does(encoder, kind, tmp_path):
    """With plain SGD, as Adam makes whole steps of gradients that are nothing but rounding, those of a key's bias."""
    plain, _ = fit(encoder, kind, tmp_path, PLAIN, 0.5, "sgd")
    cached, steps = fit(encoder, kind, tmp_path, CACHED, 0.5, "sgd", mini_batch_size=2)
    assert steps[-1] == 12
    expected = trained(plain)
    for name, found in trained(cached).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["SparseGrad", "SparseGrad, callback", "columns"])
def test_cached_gradients_count_as_one_pass_of_a_warm_up(encoder, kind, tmp_path):
    """The bases are others than with the plain loss: each piece is a gradient of its own in the sums."""
    plain, plain_steps = fit(encoder, kind, tmp_path, PLAIN)
    cached, cached_steps = fit(encoder, kind, tmp_path, CACHED, mini_batch_size=2)
    assert warmup_report(cached).passes == warmup_report(plain).passes == 2
    assert cached_steps == plain_steps == list(range(1 if "callback" in kind else 3, 13))
