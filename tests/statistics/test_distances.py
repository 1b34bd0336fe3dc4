"""Distances against scipy, known values and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lepton_airflow.errors import BadInput
from lepton_airflow.statistics import (
    DesignEffect,
    design_effect,
    holm,
    jensen_shannon,
    kolmogorov_smirnov,
    kolmogorov_smirnov_binned,
    population_stability_index,
    stability_test,
    wasserstein,
)


def test_psi_of_large_counts_is_the_textbook_sum():
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.3, 0.3, 0.4])
    expected = float(np.sum((q - p) * np.log(q / p)))
    assert population_stability_index(p * 1e7, q * 1e7) == pytest.approx(expected, rel=1e-5)
    assert population_stability_index(q * 1e7, p * 1e7) == pytest.approx(expected, rel=1e-5)


def test_psi_of_an_empty_bin_is_finite_and_equal_samples_have_none():
    assert 0 < population_stability_index([50, 50, 0], [50, 40, 10]) < math.inf
    assert population_stability_index([5, 0, 7], [5, 0, 7]) == 0.0


def test_jensen_shannon_goes_from_0_to_1():
    assert jensen_shannon([1, 2, 3], [2, 4, 6]) == pytest.approx(0.0, abs=1e-7)
    assert jensen_shannon([1, 0], [0, 1]) == pytest.approx(1.0)
    assert jensen_shannon([1, 1], [1, 0]) == pytest.approx(jensen_shannon([1, 0], [1, 1]))


def test_wasserstein_counts_standard_deviations_of_the_reference():
    reference = np.random.default_rng(0).normal(5, 3, 1000)
    assert wasserstein(reference, reference + 2 * reference.std()) == pytest.approx(2.0)
    assert wasserstein([1.0, 1.0], [1.0]) == 0.0
    assert wasserstein([1.0, 1.0], [2.0]) == math.inf


def test_binned_kolmogorov_smirnov_is_at_most_the_raw_one_and_meets_it_on_fine_bins():
    rng = np.random.default_rng(0)
    before, now = rng.normal(0, 1, 2000), rng.normal(0.1, 1, 1500)
    raw = kolmogorov_smirnov(before, now)
    assert raw.statistic == stats.ks_2samp(before, now).statistic
    for bins in (10, 10_000):
        edges = np.linspace(-6, 6, bins + 1)
        binned = kolmogorov_smirnov_binned(np.histogram(before, edges)[0], np.histogram(now, edges)[0])
        assert binned.statistic <= raw.statistic + 1e-12
    assert binned == pytest.approx(raw, rel=0.05)


# -- beyond chance -----------------------------------------------------------------------------------------------------

DECILES = stats.norm.ppf(np.arange(0.1, 1, 0.1))


def days(
    rng: np.random.Generator, count: int, shared: float, shift: float = 0.0, rows: int = 100
) -> np.ndarray:
    """Counts by day and decile of normal numbers; ``shared`` of their variance is that of their day."""
    day = np.sqrt(shared) * rng.normal(size=(count, 1))
    values = shift + day + np.sqrt(1 - shared) * rng.normal(size=(count, rows))
    return np.stack([np.bincount(row, minlength=10) for row in np.searchsorted(DECILES, values)])


def p_value(before: np.ndarray, now: np.ndarray, clustered: bool = True) -> float:
    effect = None
    if clustered:
        effect = max(design_effect(before), design_effect(now), key=lambda e: e.mean)  # type: ignore[union-attr]
    return stability_test(before.sum(axis=0), now.sum(axis=0), effect).p_value


@pytest.mark.parametrize(
    "shared", [0.0, 0.1, 0.8, 1.0], ids=lambda s: f"{s:.0%} of the variance is the day's"
)
def test_days_that_depend_on_one_another_give_few_false_alarms(shared, chance):
    rng = np.random.default_rng(2013)
    found = np.array([p_value(days(rng, 90, shared), days(rng, 30, shared)) for _ in range(400)])
    assert (found <= 0.05).mean() <= 0.05 + chance(0.05, len(found))
    assert (found <= 0.01).mean() <= 0.01 + chance(0.01, len(found))


def test_independent_rows_give_uniform_p_values():
    rng = np.random.default_rng(1)
    shares = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
    found = [
        stability_test(rng.multinomial(3000, shares), rng.multinomial(1000, shares)).p_value
        for _ in range(800)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_taking_days_for_rows_gives_a_false_alarm_almost_always():
    rng = np.random.default_rng(7)
    pairs = [(days(rng, 90, 0.8), days(rng, 30, 0.8)) for _ in range(50)]
    assert np.mean([p_value(*pair, clustered=False) <= 0.05 for pair in pairs]) > 0.9


def test_a_drift_of_one_standard_deviation_is_found():
    rng = np.random.default_rng(3)
    powers = [
        np.mean([p_value(days(rng, 90, 0.5), days(rng, 30, 0.5, shift)) <= 0.002 for _ in range(100)])
        for shift in (0.0, 0.5, 1.0)
    ]
    assert powers[0] <= 0.02
    assert powers[0] < powers[1] < powers[2]
    assert powers[2] > 0.95


def test_the_design_effect_is_that_of_the_intraclass_correlation():
    rng = np.random.default_rng(5)
    # 100 equal rows tell no more than one.
    assert design_effect(days(rng, 400, 1.0)).mean == pytest.approx(100, rel=0.1)
    independent = design_effect(days(rng, 400, 0.0))
    assert independent.mean == pytest.approx(1, abs=0.15)
    assert design_effect([[3, 1]]) is None
    assert design_effect([[3, 1], [3, 1], [6, 2]]) == DesignEffect(1.0, 0.0, 3)
    assert design_effect([[30, 0], [0, 30], [30, 0], [0, 30]]).mean == pytest.approx(30 * 4 / 3)


def test_by_chance_is_the_mean_distance_without_drift():
    rng = np.random.default_rng(11)
    effect = design_effect(days(rng, 2000, 0.3))
    tests = []
    for _ in range(200):
        before, now = days(rng, 90, 0.3), days(rng, 30, 0.3)
        tests.append(stability_test(before.sum(axis=0), now.sum(axis=0), effect))
    assert np.mean([t.distance for t in tests]) == pytest.approx(tests[0].by_chance, rel=0.15)


def test_few_rows_in_many_bins_are_no_drift():
    rng = np.random.default_rng(13)
    shares = rng.dirichlet(np.full(100, 0.3))
    found = [
        stability_test(rng.multinomial(2000, shares), rng.multinomial(60, shares)).p_value for _ in range(400)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.1
    assert stability_test([100, 0, 0], [2, 0, 0]).p_value == 1.0


def test_holm_steps_down_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("measure", "reference", "current", "sentence"),
    [
        (population_stability_index, [1, 2], [1, 2, 3], "expected the same bins"),
        (stability_test, [1, 2], [0, 0], "the current counts sum to 0"),
        (jensen_shannon, [0, 0], [1, 2], "the reference counts sum to 0"),
        (jensen_shannon, [1, 2], [-1, 2], "minimum of -1"),
        (wasserstein, [], [1.0], r"the reference sample has shape \(0,\)"),
        (kolmogorov_smirnov, [1.0], [np.nan, 1.0], "1 missing or infinite"),
    ],
)
def test_bad_samples_are_refused_in_one_sentence(measure, reference, current, sentence):
    with pytest.raises(BadInput, match=sentence):
        measure(reference, current)
