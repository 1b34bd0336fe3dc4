"""Bootstrap intervals: agreement with scikit-learn on repeated rows, coverage by simulation, and cost."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.statistics import (
    bootstrap_intervals,
    classification_metrics,
    metrics_of,
    regression_metrics,
)
from lepton_airflow.statistics.bootstrap import _evaluators

RUNS = 300


@pytest.mark.parametrize("n_resamples", [10, 1000])  # one pass per resample, or pairs between clusters
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_repeated_rows(simulation, classes, n_resamples):
    rng = simulation.rng
    codes, y = rng.integers(0, 25, 400), rng.integers(0, classes, 400)
    p = rng.random(400).round(1) if classes == 2 else rng.dirichlet(np.ones(4), 400).round(1)
    weights = rng.integers(0, 4, (3, 25)).astype(float)
    evaluators = _evaluators(metrics_of("classification"), y, p, codes, 25, 0.5, n_resamples)
    for i, weight in enumerate(weights):
        rows = np.repeat(np.arange(400), weight[codes].astype(int))
        expected = classification_metrics(y[rows], p[rows])
        assert {name: f(weights)[i] for name, f in evaluators.items()} == pytest.approx(expected)


def test_weights_are_repeated_rows_in_regression(simulation):
    rng = simulation.rng
    codes, y = rng.integers(0, 25, 400), rng.normal(100, 1, 400)
    p = y + rng.normal(0, 0.5, 400)
    weights = rng.integers(0, 4, (1, 25)).astype(float)
    rows = np.repeat(np.arange(400), weights[0, codes].astype(int))
    evaluators = _evaluators(metrics_of("regression"), y, p, codes, 25, 0.5, 1000)
    expected = regression_metrics(y[rows], p[rows])
    assert {name: f(weights)[0] for name, f in evaluators.items()} == pytest.approx(expected)


@pytest.mark.parametrize("names", [metrics_of("classification"), metrics_of("regression")])
def test_intervals_hold_the_estimate_and_repeat_with_the_seed(simulation, names):
    day = simulation.days(20, 30)
    y, signal = simulation.outcome(day)
    p = simulation.model(day, signal)
    found = bootstrap_intervals(y, p, names, day)
    assert list(found) == list(names)
    for interval in found.values():
        assert interval.low < interval.estimate < interval.high
    assert bootstrap_intervals(y, p, names, day) == found
    assert bootstrap_intervals(y, p, names, day, seed=1) != found


def coverage(simulation, truth, metric, days, rows, clustered=True):
    """The share of simulations whose 95% interval holds the truth."""
    held = 0
    for seed in range(RUNS):
        day = simulation.days(days, rows)
        y, signal = simulation.outcome(day)
        p = simulation.model(day, signal)
        low, _, high = bootstrap_intervals(y, p, [metric], day if clustered else None, 300, seed=seed)[metric]
        held += low <= truth <= high
    return held / RUNS


@pytest.fixture
def truth(simulation):
    """Each metric on very many days of one row: what intervals of days with many rows are to hold too."""
    day = simulation.days(400_000, 1)
    y, signal = simulation.outcome(day)
    return classification_metrics(y, simulation.model(day, signal))


@pytest.mark.parametrize("metric", ["roc_auc", "brier", "f1"])
@pytest.mark.parametrize(("days", "rows"), [(12, 50), (40, 20)])
def test_intervals_by_day_cover_at_the_nominal_rate(simulation, chance, truth, metric, days, rows):
    # Allowed below: 2 points for the 12 days, of which no percentile of a skewed statistic can make more.
    seen = coverage(simulation, truth[metric], metric, days, rows)
    assert 0.93 - chance(0.93, RUNS) <= seen <= 0.95 + chance(0.95, RUNS)


def test_intervals_by_row_cover_where_rows_are_independent(simulation, chance, truth):
    seen = coverage(simulation, truth["brier"], "brier", 200, 1, clustered=False)
    assert abs(seen - 0.95) <= chance(0.95, RUNS) + 0.01


def test_ignoring_the_days_makes_intervals_too_narrow(simulation, truth):
    assert coverage(simulation, truth["brier"], "brier", 12, 50, clustered=False) < 0.8


def test_an_undefined_metric_is_left_out():
    found = bootstrap_intervals([0, 0, 0], [0.1, 0.2, 0.9], ["roc_auc", "brier"])
    assert list(found) == ["brier"]


def test_thirty_thousand_rows_in_thirty_days_take_seconds(simulation):
    day = simulation.days(30, 1000)
    y, signal = simulation.outcome(day)
    p = simulation.model(day, signal)
    start = time.process_time()
    bootstrap_intervals(y, p, ["roc_auc", "brier", "log_loss"], day)
    assert time.process_time() - start < 3


def test_wrong_settings_and_clusters_are_refused():
    y, p = [0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8]
    with pytest.raises(BadConfiguration, match="n_resamples=5"):
        bootstrap_intervals(y, p, ["brier"], n_resamples=5)
    with pytest.raises(BadConfiguration, match="not a metric"):
        bootstrap_intervals(y, p, ["auc"])
    with pytest.raises(BadInput, match="at least 2 clusters"):
        bootstrap_intervals(y, p, ["brier"], clusters=[1, 1, 1, 1])
