"""Logistic regression for two or more classes, over scaled numbers and one-hot categories.

Minimises the log loss plus the squared length of the coefficients over ``2 C`` by L-BFGS (Hastie, Tibshirani & Friedman
2009, section 4.4); more than two classes are fitted jointly (multinomial). Deterministic for a number of threads.

C                inverse penalty, above 0 [dimensionless, on scaled columns]; smaller is simpler
class_weight     null, or "balanced" to weigh classes by 1 / frequency (probabilities are then not calibrated)
max_iter         iterations of L-BFGS at most
max_categories   columns per category feature at most; further values count as unknown
min_frequency    rows that a category needs to get its column [rows]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_airflow.models import _columns

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.training.trainer import TrainerRun

TASKS = ("classification",)
DEFAULTS: dict[str, Any] = {
    "C": 1.0,
    "class_weight": None,
    "max_iter": 1000,
    "max_categories": 100,
    "min_frequency": 10,
}
SEARCH_SPACE: dict[str, dict[str, Any]] = {"C": {"low": 1e-4, "high": 1e2, "log": True}}


def fit(
    train: pd.DataFrame,
    valid: pd.DataFrame | None,  # noqa: ARG001  the trainer contract has it
    hyperparameters: dict[str, Any],
    run: TrainerRun,
) -> Any:
    """Fit on ``train``; ``valid`` is not needed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

    h = hyperparameters
    columns = _columns.scaled_and_one_hot(
        train, run, max_categories=h["max_categories"], min_frequency=h["min_frequency"], sparse=True
    )
    model = LogisticRegression(
        C=h["C"], class_weight=h["class_weight"], max_iter=h["max_iter"], random_state=run.seed
    )
    model.fit(columns.transform(train[run.features]), train[run.target])
    run.settle()  # valid decides nothing
    return Pipeline([("columns", columns), ("model", model)])
