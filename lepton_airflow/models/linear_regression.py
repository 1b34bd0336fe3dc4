"""Linear regression by penalised least squares, over scaled numbers and one-hot categories.

Minimises the squared error plus ``alpha`` times the squared length of the coefficients (Hoerl & Kennard 1970, ridge
regression; Hastie, Tibshirani & Friedman 2009, section 3.4.1). Deterministic: it has a closed form.

alpha            penalty, at least 0 [dimensionless, on scaled columns]; 0 is ordinary least squares
max_categories   columns per category feature at most; further values count as unknown
min_frequency    rows that a category needs to get its column [rows]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_airflow.models import _columns

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.training.trainer import TrainerRun

TASKS = ("regression",)
DEFAULTS: dict[str, Any] = {"alpha": 1.0, "max_categories": 100, "min_frequency": 10}
SEARCH_SPACE: dict[str, dict[str, Any]] = {"alpha": {"low": 1e-3, "high": 1e3, "log": True}}


def fit(
    train: pd.DataFrame,
    valid: pd.DataFrame | None,  # noqa: ARG001  the trainer contract has it
    hyperparameters: dict[str, Any],
    run: TrainerRun,
) -> Any:
    """Fit on ``train``; ``valid`` is not needed."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import Pipeline

    h = hyperparameters
    columns = _columns.scaled_and_one_hot(
        train, run, max_categories=h["max_categories"], min_frequency=h["min_frequency"], sparse=False
    )
    model = Ridge(alpha=h["alpha"], solver="cholesky")
    model.fit(columns.transform(train[run.features]), train[run.target])
    run.settle()  # valid decides nothing
    return Pipeline([("columns", columns), ("model", model)])
