"""Distances against scipy, known values and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lepton_airflow.errors import BadInput
from lepton_airflow.statistics import (
    jensen_shannon,
    kolmogorov_smirnov,
    kolmogorov_smirnov_binned,
    population_stability_index,
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


@pytest.mark.parametrize(
    ("measure", "reference", "current", "sentence"),
    [
        (population_stability_index, [1, 2], [1, 2, 3], "expected the same bins"),
        (jensen_shannon, [0, 0], [1, 2], "the reference counts sum to 0"),
        (jensen_shannon, [1, 2], [-1, 2], "minimum of -1"),
        (wasserstein, [], [1.0], r"the reference sample has shape \(0,\)"),
        (kolmogorov_smirnov, [1.0], [np.nan, 1.0], "1 missing or infinite"),
    ],
)
def test_bad_samples_are_refused_in_one_sentence(measure, reference, current, sentence):
    with pytest.raises(BadInput, match=sentence):
        measure(reference, current)
