"""A candidate's quality: the metric with its interval, and its paired difference from the original."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.compression.quality import Judge
from lepton_airflow.statistics import bootstrap_intervals, paired_test


@pytest.mark.parametrize(("metric", "sign"), [("roc_auc", 1), ("log_loss", -1)])
def test_the_numbers_are_those_of_the_statistics_and_positive_is_better(metric: str, sign: int) -> None:
    rng = np.random.default_rng(2)
    y, days = rng.integers(0, 2, 400), np.repeat(np.arange(20), 20)
    original = np.clip(0.3 * y + rng.uniform(0.1, 0.6, 400), 0, 1)
    worse = np.clip(original + rng.normal(0, 0.2, 400), 0.01, 0.99)
    judge = Judge(y=y, metric=metric, max_loss=0.01, clusters=days, confidence=0.9, resamples=200, seed=3)
    low, value, high = bootstrap_intervals(y, worse, [metric], days, 200, 0.9, 3)[metric]
    found = judge.compare(original, worse)
    assert (found.low, found.value, found.high) == (low, value, high)
    paired = paired_test(y, original, worse, metric, days, 0.9)
    assert (found.difference, found.difference_low, found.difference_high) == (
        paired.difference,
        paired.low,
        paired.high,
    )
    assert found.difference < 0
    assert found.difference == pytest.approx(sign * (found.value - judge.value(original).value))
    assert judge.value(original).difference == 0


def test_rows_that_do_not_define_the_metric_are_refused() -> None:
    judge = Judge(y=[1, 1, 1], metric="roc_auc", max_loss=0.01, resamples=100)
    with pytest.raises(
        BadInput, match=r"roc_auc is not defined on these rows \(one class, or a constant target\)"
    ):
        judge.value(np.array([0.1, 0.2, 0.3]))
