"""Timing of models whose work is known, and the interval of the speedup."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.packaging.compression.latency import median_interval, time_side_by_side


def test_a_model_of_an_eighth_of_the_work_is_faster_and_its_twin_is_not(
    products: Callable[[int], bytes],
) -> None:
    feeds = {32: [{"x0": np.ones((32, 256), np.float32)}]}
    models = {"original": products(16), "twin": products(16), "short": products(2)}
    found = {name: item[0] for name, item in time_side_by_side(models, "out", feeds, seconds=1).items()}
    assert 4 < found["short"].speedup_low <= found["short"].speedup <= found["short"].speedup_high
    assert found["twin"].speedup_low < 1.1
    assert found["twin"].speedup_high > 0.9
    assert found["original"].speedup_low == found["original"].speedup_high == 1
    assert found["short"].p50_us < found["original"].p50_us <= found["original"].p95_us


def test_median_interval_is_that_of_the_sign_test() -> None:
    from scipy.stats import binom

    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    for n in (7, 12, 25, 60):
        low, high = median_interval(list(range(n)))
        assert low + high == n - 1
        outside = int(low)
        assert 2 * binom.cdf(outside, n, 0.5) <= 0.05 < 2 * binom.cdf(outside + 1, n, 0.5), n
    with pytest.raises(BadConfiguration, match=r"rounds=5: an interval of 95% needs at least 6\."):
        median_interval([1.0] * 5)
