"""Parts of the comparison by themselves: the head's rows, the order of the batches, the scores."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import bert
from transformers import default_data_collator

from benchmarks.compare.batches import LengthWindows
from benchmarks.compare.head import head_batches, settle_head, train_head_apart
from benchmarks.compare.scores import score_classes, score_numbers
from experiments.methods import METHODS


def test_the_head_gets_other_rows_where_there_are_enough():
    chosen, others = [{"row": i} for i in range(4)], [{"row": i} for i in range(4, 10)]
    seen = [row["row"] for batch in head_batches(chosen, others, steps=3, batch_size=2, seed=0) for row in batch]
    assert seen == list(range(4, 10))
    batches = list(head_batches(chosen, others, steps=4, batch_size=3, seed=0))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert {row["row"] for batch in batches for row in batch} == set(range(10))


def test_batches_are_of_like_lengths_and_shuffled_anew_in_each_epoch():
    lengths = [random.Random(i).randrange(100) for i in range(403)]
    sampler = LengthWindows(lengths, batch_size=4, seed=0)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(403))
    assert first == again != second
    assert first != list(LengthWindows(lengths, batch_size=4, seed=1))
    batches = [[lengths[row] for row in first[start : start + 4]] for start in range(0, 400, 4)]
    assert statistics.fmean(max(batch) - min(batch) for batch in batches) < 15  # 60 where nothing is sorted
    means = [statistics.fmean(batch) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # and the lengths of batches come in no order


def test_scores_of_classes_equal_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 2, generator=generator), torch.randint(0, 2, (50,), generator=generator)
    scores, predicted = score_classes(logits.numpy(), labels.numpy()), logits.argmax(1)
    tp, tn, fp, fn = (int(((predicted == p) & (labels == t)).sum()) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert scores["metric"] == pytest.approx(matthews, rel=1e-9)
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert score_classes(np.tile([0.0, 1.0], (50, 1)), labels.numpy())["metric"] == 0


def test_scores_of_numbers_equal_scipys():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40) / 2  # with ties
    predictions = (labels + rng.normal(size=40)).round(1)[:, None]
    scores = score_numbers(predictions, labels)
    pearson = scipy.stats.pearsonr(predictions[:, 0], labels).statistic
    spearman = scipy.stats.spearmanr(predictions[:, 0], labels).statistic
    assert (scores["pearson"], scores["spearman"]) == pytest.approx((pearson, spearman), rel=1e-9)
    assert scores["metric"] == pytest.approx((pearson + spearman) / 2, rel=1e-9)
    assert scores["loss"] == pytest.approx(np.mean((predictions[:, 0] - labels) ** 2), rel=1e-9)
    assert score_numbers(np.full((40, 1), 0.1), labels)["metric"] == 0
    assert np.isnan(score_numbers(np.full((40, 1), np.nan), labels)["metric"])


@pytest.mark.parametrize("method", ["lora", "sparsegrad-dynamic"])
def test_head_keeps_its_learning_rate_whatever_the_methods_is(method):
    model = METHODS[method].attach(bert(), None, 0.05, modules_to_save=["classifier"])
    make = METHODS[method].make_optimizer or (lambda m, lr: torch.optim.AdamW(trained(m), lr=lr))
    optimizer = make(model, 0.5)
    train_head_apart(optimizer, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trained(model)} == rates.keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-3 if "classifier" in name else 0.5), name


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_settled_head_is_returned_and_the_rest_of_the_model_stays():
    model = bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 2)} for i in range(8)]
    head = settle_head(model, iter([rows, rows]), default_data_collator)
    assert head
    assert all("classifier" in name or "pooler" in name for name in head)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, head.get(name, before[name])), name
        assert (name in head) == (not torch.equal(parameter, before[name])), name
