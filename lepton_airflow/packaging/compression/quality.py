"""How much worse is a model in another number format?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Quality:
    """A metric with its interval, and its difference from the original's on the same rows (positive: better)."""

    metric: str
    value: float
    low: float
    high: float
    difference: float = 0.0
    difference_low: float = 0.0
    difference_high: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rows with known answers, and what counts as worse on them.

    :ivar y: (n,) class numbers, or numbers for a regression.
    :ivar max_loss: how much of the metric may be lost [of the metric].
    :ivar clusters: (n,) keys of what is dependent, or None.
    """

    y: ArrayLike
    metric: str
    max_loss: float
    clusters: ArrayLike | None = None
    confidence: float = 0.95
    threshold: float = 0.5
    resamples: int = 1000
    seed: int = 0

    def value(self, predicted: NDArray[Any]) -> Quality:
        """The metric of some predictions; raises BadInput when the rows do not define it or are too few for an interval."""
        from lepton_airflow.statistics.bootstrap import bootstrap_intervals

        found = bootstrap_intervals(
            self.y,
            predicted,
            [self.metric],
            clusters=self.clusters,
            n_resamples=self.resamples,
            confidence=self.confidence,
            seed=self.seed,
            threshold=self.threshold,
        )
        if self.metric not in found:
            raise BadInput(
                f"{self.metric} is not defined on these rows (one class, or a constant target): pass more rows, or "
                "another metric."
            )
        low, value, high = found[self.metric]
        return Quality(self.metric, value, low, high)

    def compare(self, original: NDArray[Any], candidate: NDArray[Any]) -> Quality:
        """The metric of a candidate, and its difference from the original's on the same rows.

        See :func:`lepton_airflow.statistics.paired_test`.
        """
        from lepton_airflow.statistics.paired import paired_test

        own = self.value(candidate)
        paired = paired_test(
            self.y,
            original,
            candidate,
            metric=self.metric,
            clusters=self.clusters,
            confidence=self.confidence,
            threshold=self.threshold,
        )
        return Quality(own.metric, own.value, own.low, own.high, paired.difference, paired.low, paired.high)
