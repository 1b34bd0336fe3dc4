"""Point estimates against scikit-learn, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as reference

from lepton_airflow.errors import BadInput
from lepton_airflow.statistics import (
    classification_metrics,
    regression_metrics,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_binary_metrics_agree_with_sklearn(rng):
    y = rng.integers(0, 2, 500)
    p = np.clip(rng.normal(0.4 + 0.2 * y, 0.2), 0.01, 0.99).round(2)
    said = p >= 0.4
    assert classification_metrics(y, p, threshold=0.4) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(y, said),
            "precision": reference.precision_score(y, said),
            "recall": reference.recall_score(y, said),
            "f1": reference.f1_score(y, said),
            "roc_auc": reference.roc_auc_score(y, p),
            "log_loss": reference.log_loss(y, p),
            "brier": reference.brier_score_loss(y, p),
        }
    )
    assert classification_metrics(y, np.stack([1 - p, p], axis=1)) == pytest.approx(
        classification_metrics(y, p)
    )


def test_multiclass_metrics_agree_with_sklearn(rng):
    y = rng.integers(0, 4, 500)
    p = rng.dirichlet(np.ones(4), 500)
    said = p.argmax(axis=1)
    assert classification_metrics(y, p) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(y, said),
            "precision": reference.precision_score(y, said, average="macro"),
            "recall": reference.recall_score(y, said, average="macro"),
            "f1": reference.f1_score(y, said, average="macro"),
            "roc_auc": reference.roc_auc_score(y, p, multi_class="ovr"),
            "log_loss": reference.log_loss(y, p),
            "brier": reference.brier_score_loss(y, p),
        }
    )


def test_a_class_that_does_not_occur_is_left_out_of_the_auc(rng):
    y = rng.integers(0, 2, 200)
    p = rng.dirichlet(np.ones(3), 200)
    expected = np.mean([reference.roc_auc_score(y == k, p[:, k]) for k in (0, 1)])
    assert classification_metrics(y, p)["roc_auc"] == pytest.approx(expected)


def test_one_class_has_no_auc_but_everything_else():
    found = classification_metrics([0, 0, 0], [0.1, 0.2, 0.9])
    assert found["roc_auc"] is None
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["precision"] == found["recall"] == 0.0


def test_a_saturated_score_costs_the_same_as_float32_and_as_float64():
    as_float32 = classification_metrics([0, 1], np.array([1.0, 0.5], dtype=np.float32))["log_loss"]
    assert as_float32 == classification_metrics([0, 1], [1.0, 0.5])["log_loss"]
    assert as_float32 < 10


def test_regression_metrics_agree_with_sklearn(rng):
    y = rng.normal(1e4, 3, 300)
    predicted = y + rng.normal(0, 1, 300)
    assert regression_metrics(y, predicted) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(y, predicted),
            "rmse": reference.root_mean_squared_error(y, predicted),
            "r2": reference.r2_score(y, predicted),
        }
    )
    assert regression_metrics([2.0, 2.0], [1.0, 2.0])["r2"] is None


@pytest.mark.parametrize(
    ("y", "p", "sentence"),
    [
        ([], [], "0 rows"),
        ([0, 1], [0.5], "expected one label per row"),
        ([0, 2], [0.5, 0.5], "row 1 is 2, expected a whole number from 0 to 1"),
        ([0, 0.5], [0.5, 0.5], "row 1 is 0.5"),
        ([0, 1], [0.5, 1.5], "row 1 is 1.5, expected a probability"),
        ([0, 1], [np.nan, 0.5], "1 of 2 values are missing or infinite, first in row 0"),
        ([0, np.inf], [0.5, 0.5], "first in row 1"),
        (["yes", "no"], [0.5, 0.5], "expected numbers; encode them"),
    ],
)
def test_bad_classification_input_is_refused_in_one_sentence(y, p, sentence):
    with pytest.raises(BadInput, match=sentence):
        classification_metrics(y, p)


@pytest.mark.parametrize(
    ("y", "p", "what"), [([1, 1e200], [1, 2], "targets"), ([1, 2], [1, -1e200], "predictions")]
)
def test_numbers_whose_squares_are_infinite_are_refused(y, p, what):
    with pytest.raises(BadInput, match=f"{what}: row 1 is -?1e\\+200, expected at most 1e\\+140"):
        regression_metrics(y, p)
    assert regression_metrics([1, 1e139], [1, 2])["rmse"] == pytest.approx(1e139 / 2**0.5)


def test_a_regression_with_several_outputs_is_refused():
    with pytest.raises(BadInput, match=r"shape \(2, 3\) for a regression"):
        regression_metrics([1.0, 2.0], np.ones((2, 3)))


def test_importing_the_package_imports_no_numpy():
    heavy = {"numpy", "scipy", "sklearn"}
    code = f"import sys, lepton_airflow.statistics; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
