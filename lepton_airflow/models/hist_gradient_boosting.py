"""Gradient boosting of trees over binned columns, for classification and regression.

Friedman 2001 (Annals of Statistics 29) with the histograms of Ke et al. 2017 (LightGBM), as scikit-learn builds them.
Missing numbers need no filling: each split learns a side for them. Categories become ranks (see ``_columns.ordinal``).
With ``valid`` it stops when the loss there has not become better for ``n_iter_no_change`` trees. The model keeps these last trees, as
scikit-learn does; a refit makes as many trees as had the least loss. Deterministic for a seed.

learning_rate        shrinkage of each tree, above 0 [dimensionless]
max_iter             trees at most (per class, with more than two classes)
max_leaf_nodes       leaves per tree at most, from 2 on
max_depth            levels per tree at most, or null
min_samples_leaf     rows per leaf at least [rows]
l2_regularization    penalty on leaf values, at least 0
max_features         share of the features drawn for each split, above 0 and at most 1
n_iter_no_change     trees without a better loss on ``valid`` before it stops
max_categories       values kept per category feature at most; further ones count as missing
min_frequency        rows that a category needs to be kept [rows]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_airflow.models import _columns

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.training.trainer import TrainerRun

TASKS = ("classification", "regression")
DEFAULTS: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_iter": 200,
    "max_leaf_nodes": 31,
    "max_depth": None,
    "min_samples_leaf": 20,
    "l2_regularization": 0.0,
    "max_features": 1.0,
    "n_iter_no_change": 10,
    "max_categories": 250,
    "min_frequency": 10,
}
SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "learning_rate": {"low": 0.02, "high": 0.3, "log": True},
    "max_iter": {"low": 50, "high": 400, "step": 50},
    "max_leaf_nodes": {"low": 7, "high": 63, "log": True},
    "min_samples_leaf": {"low": 5, "high": 200, "log": True},
    "l2_regularization": {"low": 1e-3, "high": 10.0, "log": True},
}


def fit(
    train: pd.DataFrame, valid: pd.DataFrame | None, hyperparameters: dict[str, Any], run: TrainerRun
) -> Any:
    """Fit on ``train``, stopping early by the loss on ``valid`` when there is one."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.pipeline import Pipeline

    h = {**hyperparameters, **(run.settled or {})}
    columns = _columns.ordinal(
        train, run, max_categories=h.pop("max_categories"), min_frequency=h.pop("min_frequency")
    )
    kind = HistGradientBoostingClassifier if run.task == "classification" else HistGradientBoostingRegressor
    model = kind(**h, early_stopping=valid is not None, random_state=run.seed)
    held_out = {}
    if valid is not None:
        held_out = {"X_val": columns.transform(valid[run.features]), "y_val": valid[run.target]}
    model.fit(columns.transform(train[run.features]), train[run.target], **held_out)
    # The first score is that of no tree. Without valid there are none.
    best = max(1, int(model.validation_score_.argmax())) if valid is not None else model.n_iter_
    run.settle(max_iter=best)
    return Pipeline([("columns", columns), ("model", model)])
