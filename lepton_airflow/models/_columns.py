"""Preprocessing that the standard models share, and that converts to ONNX exactly.

The frequent categories are chosen here. All others, rare or never seen, are "unknown" to the encoder, and so are missing
values where they are rare. skl2onnx cannot convert scikit-learn's own grouping of infrequent categories.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadInput
from lepton_airflow.models import at_least

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.compose import ColumnTransformer

    from lepton_airflow.training.trainer import TrainerRun


def scaled_and_one_hot(
    train: pd.DataFrame, run: TrainerRun, *, max_categories: int, min_frequency: int, sparse: bool
) -> ColumnTransformer:
    """Fit a transformer that scales numbers to mean 0 and variance 1 and makes a column of each frequent category.

    A missing number becomes the median. A row with a rare or unknown category is 0 in all columns of that feature.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    kept = {c: sorted(names) for c, names in _kept(train, run, max_categories, min_frequency).items()}
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    one_hot = OneHotEncoder(
        categories=list(kept.values()), handle_unknown="ignore", sparse_output=sparse, dtype="float64"
    )
    columns = ColumnTransformer(
        [("numbers", numbers, run.numbers)] * bool(run.numbers)
        + [("categories", one_hot, list(kept))] * bool(kept),
        sparse_threshold=1.0 if sparse else 0.0,
    )
    return columns.fit(train[run.features])


def ordinal(
    train: pd.DataFrame, run: TrainerRun, *, max_categories: int, min_frequency: int
) -> ColumnTransformer:
    """Fit a transformer that passes numbers on and turns a frequent category into its rank by mean target, others into NaN.

    For two classes or a regression, the best split of a category's values is a cut of this order (Breiman et al. 1984,
    *Classification and Regression Trees*, section 4.2). With more classes the rank is by frequency.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OrdinalEncoder

    kept = _kept(train, run, max_categories, min_frequency)
    if len(run.classes) <= 2:
        for c, names in kept.items():
            mean = train[run.target].groupby(train[c].to_numpy()).mean()
            names.sort(key=lambda name: (mean[name], name))
    rank = OrdinalEncoder(
        categories=[_objects(names) for names in kept.values()],
        handle_unknown="use_encoded_value",
        unknown_value=float("nan"),
    )
    columns = ColumnTransformer(
        [("numbers", "passthrough", run.numbers)] * bool(run.numbers)
        + [("categories", rank, list(kept))] * bool(kept)
    )
    return columns.fit(train[run.features])


def _kept(
    train: pd.DataFrame, run: TrainerRun, max_categories: int, min_frequency: int
) -> dict[str, list[str]]:
    """The frequent values of each category feature that has any; raises when no feature is left to learn from."""
    at_least(1, {"max_categories": max_categories, "min_frequency": min_frequency})
    found = {c: frequent(train[c], max_categories, min_frequency) for c in run.categorical}
    kept = {c: names for c, names in found.items() if names}
    if not kept and not run.numbers:
        raise BadInput(
            f"no value of the features {', '.join(map(repr, run.categorical[:5]))} occurs in min_frequency={min_frequency} of "
            f"the {len(train):,} rows, so nothing is left to learn from; lower min_frequency or bring more rows."
        )
    return kept


def frequent(column: pd.Series[str], max_categories: int, min_frequency: int) -> list[str]:
    """The most frequent values with at least ``min_frequency`` rows, the most frequent first, ties by name."""
    counts = column.value_counts()
    counts = counts[counts >= min_frequency]
    return [
        str(name) for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_categories]
    ]


def _objects(names: list[str]) -> Any:
    import numpy as np

    return np.array(names, dtype=object)
