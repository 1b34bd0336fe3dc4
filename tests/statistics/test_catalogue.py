"""The catalogue says of each metric what its numbers show."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.statistics import METRICS, classification_metrics, metrics_of, regression_metrics
from lepton_airflow.statistics.catalogue import JUDGED_BY, TUNED_BY, check_metric_names


def test_it_holds_what_is_computed_and_in_that_order() -> None:
    assert tuple(classification_metrics([0, 1], [0.1, 0.9])) == metrics_of("classification")
    assert tuple(regression_metrics([0, 1], [0.1, 0.9])) == metrics_of("regression")
    assert set(METRICS) == {*metrics_of("classification"), *metrics_of("regression")}
    for default in (JUDGED_BY, TUNED_BY):
        assert all(metric in metrics_of(task) for task, metric in default.items())


def test_a_better_model_scores_in_the_direction_it_names() -> None:
    y, good, bad = [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8], [0.6, 0.4, 0.7, 0.1]
    scores = [
        (classification_metrics(y, good), classification_metrics(y, bad)),
        (regression_metrics(y, good), regression_metrics(y, bad)),
    ]
    for better, worse in scores:
        for name, value in better.items():
            assert (value > worse[name]) == METRICS[name].higher_is_better, name


def test_shares_lie_between_0_and_1_and_only_errors_in_the_unit_of_the_target_grow_with_it() -> None:
    rng = np.random.default_rng(5)
    y, p = rng.integers(0, 2, 200), rng.random(200)
    target, predicted = rng.normal(3, 1, 200), rng.normal(3, 1, 200)
    plain, scaled = regression_metrics(target, predicted), regression_metrics(10 * target, 10 * predicted)
    for name, metric in METRICS.items():
        if metric.task == "regression":
            assert (metric.scale == "target") == (scaled[name] == pytest.approx(10 * plain[name])), name
        elif metric.scale == "share":
            worst = classification_metrics(y, 1.0 - y)[name]
            best = classification_metrics(y, 1.0 * y)[name]
            assert (worst, best) == (0, 1), name
            assert 0 < classification_metrics(y, p)[name] < 1


def test_names_are_checked() -> None:
    assert check_metric_names(iter(["brier", "f1"])) == ("brier", "f1")
    with pytest.raises(BadConfiguration, match="metrics: 'roc_acu' is not a metric; did you mean 'roc_auc'"):
        check_metric_names(["roc_acu"])
    with pytest.raises(
        BadConfiguration, match=r"accuracy, rmse mix classification \(accuracy, .*one kind at a time"
    ):
        check_metric_names(["accuracy", "rmse"])
