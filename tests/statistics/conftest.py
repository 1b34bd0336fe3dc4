"""Simulated data whose truth is known: days with effects of their own, and models that are equally good."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special


class Simulation:
    """Draws days, outcomes and models; two models drawn alike are exchangeable, so their true difference is
    0."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def days(self, count: int, rows: int, unequal: bool = False) -> np.ndarray:
        """Return the day of each row: ``rows`` a day, or log-normal numbers around that."""
        sizes = np.full(count, rows)
        if unequal:
            sizes = np.maximum(3, (rows * self.rng.lognormal(0, 0.8, count) / np.exp(0.32)).astype(int))
        return np.repeat(np.arange(count), sizes)

    def outcome(self, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return labels and the signal behind them; some days are bad as a whole."""
        signal = self.rng.normal(size=len(day))
        level = self.rng.normal(0, 0.7, day.max() + 1)[day]
        return (self.rng.random(len(day)) < special.expit(signal + level - 1.2)).astype(int), signal

    def model(
        self, day: np.ndarray, signal: np.ndarray, slope: float = 0.8, spread: float = 0.6
    ) -> np.ndarray:
        """Return the scores of a model whose quality and level differ by day."""
        slopes = slope + self.rng.normal(0, spread, day.max() + 1)[day]
        levels = self.rng.normal(0, spread, day.max() + 1)[day]
        return special.expit(signal * slopes + levels + self.rng.normal(0, 0.8, len(day)) - 1.2)


@pytest.fixture
def simulation() -> Simulation:
    return Simulation(seed=20130101)


@pytest.fixture
def chance():
    """How far a share seen in n simulations may lie from the true one by chance: 3.5 standard errors."""
    return lambda share, n: 3.5 * np.sqrt(share * (1 - share) / n)
