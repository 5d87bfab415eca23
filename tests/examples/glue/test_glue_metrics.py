"""GLUE's metrics, against values worked out by hand."""

import numpy as np
import pytest

from examples.glue.metrics import score_accuracy, score_accuracy_and_f1, score_correlations, score_matthews
from examples.glue.tasks import PAPER_TASKS, TASKS


def logits(*predicted, classes=2):
    return np.eye(classes)[list(predicted)]


def test_accuracy_of_three_classes():
    scores = score_accuracy(logits(0, 1, 2, 2, classes=3), np.array([0, 1, 1, 2]))
    assert scores == {"score": 0.75, "accuracy": 0.75}


def test_f1_is_of_the_second_class():
    # 2 true positives, 1 false positive, 1 false negative: F1 = 4 / 6
    scores = score_accuracy_and_f1(logits(1, 1, 1, 0, 0), np.array([1, 1, 0, 1, 0]))
    assert scores == {"score": 0.6, "accuracy": 0.6, "f1": pytest.approx(2 / 3)}


def test_matthews_correlation():
    # TP 2, TN 1, FP 1, FN 1: (2·1 − 1·1) / √(3·3·2·2)
    scores = score_matthews(logits(1, 1, 1, 0, 0), np.array([1, 1, 0, 1, 0]))
    assert scores["score"] == scores["matthews"] == pytest.approx(1 / 6)
    assert score_matthews(logits(1, 1, 1), np.array([1, 0, 1]))["score"] == 0


def test_correlations():
    scores = score_correlations(np.array([[1.0], [2.0], [3.0], [10.0]]), np.array([0.0, 1.0, 2.0, 3.0]))
    x, y = np.array([1, 2, 3, 10]) - 4, np.array([0, 1, 2, 3]) - 1.5
    assert scores["pearson"] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["score"] == pytest.approx((scores["pearson"] + 1) / 2)


@pytest.mark.parametrize("predicted", [[2.0, 2.0, 2.0], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0]])
def test_a_model_that_knows_nothing_has_no_correlation(predicted):
    assert score_correlations(np.array(predicted)[:, None], np.array([0.0, 1.0, 2.0]))["score"] == 0.0


def test_the_nine_tasks():
    assert len(TASKS) == 9
    assert PAPER_TASKS == ["stsb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"]
    assert [TASKS[name].num_outputs for name in ("stsb", "cola", "mnli")] == [1, 2, 3]
    assert [task.name for task in TASKS.values() if task.is_regression] == ["stsb"]
    for task in TASKS.values():
        outputs = np.zeros((2, task.num_outputs))
        assert "score" in task.score(outputs, np.array([0, 0 if task.is_regression else 1]))
