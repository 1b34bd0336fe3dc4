"""How far apart are two samples or two sets of counts? The measures that drift is judged by.

Binned measures take two arrays of counts (or shares) over the same bins or categories, shape (k,); the others
take raw numbers, shapes (n,) and (m,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lepton_airflow.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class KolmogorovSmirnov(NamedTuple):
    """The largest gap between two distribution functions, and the probability of a larger one by chance."""

    statistic: float
    p_value: float


def population_stability_index(reference: ArrayLike, current: ArrayLike) -> float:
    """Compare counts by PSI, in nats: 0 is equal; 0.1 and 0.25 are the usual marks (Siddiqi 2006).

    It is the symmetric Kullback-Leibler divergence (Jeffreys 1946). Half a count is added to every bin, so
    that an empty one gives a finite answer which shrinks with the size of the samples rather than with an
    arbitrary epsilon.
    """
    import numpy as np

    expected, observed = _counts(reference, current)
    p = (expected + 0.5) / (expected + 0.5).sum()
    q = (observed + 0.5) / (observed + 0.5).sum()
    return float(np.sum((q - p) * np.log(q / p)))


def jensen_shannon(reference: ArrayLike, current: ArrayLike) -> float:
    """Compare counts by the Jensen-Shannon distance in base 2: from 0 (equal shares) to 1 (no common bin)
    (Lin 1991)."""
    from scipy.spatial import distance

    return float(distance.jensenshannon(*_counts(reference, current), base=2))


def wasserstein(reference: ArrayLike, current: ArrayLike) -> float:
    """Compare numbers by the distance that mass has to move, in standard deviations of the reference.

    A constant reference has no scale: the distance is then 0 if nothing moved and infinite otherwise.
    """
    from scipy import stats

    before, now = _numbers("reference", reference), _numbers("current", current)
    moved, scale = float(stats.wasserstein_distance(before, now)), float(before.std())
    if scale == 0:
        return 0.0 if moved == 0 else float("inf")
    return moved / scale


def kolmogorov_smirnov(reference: ArrayLike, current: ArrayLike) -> KolmogorovSmirnov:
    """Compare numbers by the two-sample Kolmogorov-Smirnov test."""
    from scipy import stats

    found = stats.ks_2samp(_numbers("reference", reference), _numbers("current", current))
    return KolmogorovSmirnov(float(found.statistic), float(found.pvalue))


def kolmogorov_smirnov_binned(reference: ArrayLike, current: ArrayLike) -> KolmogorovSmirnov:
    """Compare counts over the same ordered bins by the Kolmogorov-Smirnov test.

    Within a bin the order is unknown, so the statistic is at most that of the raw numbers, and the p-value,
    from the asymptotic distribution, is at least theirs: a drift that it finds is there.
    """
    import numpy as np
    from scipy import stats

    before, now = _counts(reference, current)
    n, m = before.sum(), now.sum()
    gap = float(np.abs(np.cumsum(before) / n - np.cumsum(now) / m).max())
    return KolmogorovSmirnov(gap, float(stats.kstwobign.sf(gap * np.sqrt(n * m / (n + m)))))


def _counts(reference: ArrayLike, current: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    before, now = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    if before.ndim != 1 or before.shape != now.shape:
        raise BadInput(
            f"distance: counts of shapes {before.shape} and {now.shape}, expected the same bins in both; "
            "count the current data with the reference's bin edges or categories."
        )
    for name, values in (("reference", before), ("current", now)):
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise BadInput(
                f"distance: the {name} counts sum to {values.sum():g} "
                f"with a minimum of {values.min(initial=0):g}, expected finite counts "
                "from 0 up, not all 0; check the window of that sample."
            )
    return before, now


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or not np.isfinite(numbers).all():
        raise BadInput(
            f"distance: the {name} sample has shape {numbers.shape} and "
            f"{int((~np.isfinite(numbers)).sum()):,} missing or infinite values, expected a non-empty column "
            "of finite numbers; drop the missing ones and compare their share by itself."
        )
    return numbers
