"""The examples that a language is scored on."""

from __future__ import annotations

from typing import Any, Protocol

Features = list[dict[str, Any]]


class EvaluationSet(Protocol):
    """Rows for the model, and how its predictions for them are scored."""

    features: Features

    def score(self, predictions: Any) -> dict[str, float]:
        """Scores in percent, the task's metric among them.

        Args:
            predictions: What `Trainer.predict` returns for the features, an array or several.
        """
        ...
