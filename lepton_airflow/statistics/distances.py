"""How far apart are two samples or two sets of counts? The measures that drift is judged by.

Binned measures take two arrays of counts (or shares) over the same bins or categories, shape (k,); the others
take raw numbers, shapes (n,) and (m,). Tests on counts take counts, not shares: they need the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lepton_airflow.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


_FEWEST_EXPECTED = 1  # rows a bin must expect, or the chi-square distribution does not describe it


class KolmogorovSmirnov(NamedTuple):
    """The largest gap between two distribution functions, and the probability of a larger one by chance."""

    statistic: float
    p_value: float


class DesignEffect(NamedTuple):
    """How dependent the rows of a cluster are: what turns a number of rows into a number of independent ones.

    ``mean`` is how many times larger the variance of the shares is than with independent rows, on average over
    the ``k - 1`` directions in which k shares can move; ``spread`` is the squared coefficient of variation over
    those directions. Independent rows have 1 and 0.
    """

    mean: float
    spread: float
    clusters: int


class StabilityTest(NamedTuple):
    """A population stability index, how large chance alone makes it on average, and the chance of a larger one."""

    distance: float
    by_chance: float
    p_value: float


def population_stability_index(reference: ArrayLike, current: ArrayLike) -> float:
    """Compare counts by PSI, in nats: 0 is equal; 0.1 and 0.25 are the usual marks (Siddiqi 2006).

    It is the symmetric Kullback-Leibler divergence (Jeffreys 1946). Half a count is added to every bin. So an empty bin gives
    a finite answer, which depends on the size of the samples and not on an arbitrary epsilon.
    """
    import numpy as np

    expected, observed = _counts(reference, current)
    p = (expected + 0.5) / (expected + 0.5).sum()
    q = (observed + 0.5) / (observed + 0.5).sum()
    return float(np.sum((q - p) * np.log(q / p)))


def design_effect(counts: ArrayLike) -> DesignEffect | None:
    """Measure how dependent rows are from their counts by cluster and bin, shape (clusters, k).

    These are the generalised design effects of Rao & Scott (1981), with the variance of the shares taken between clusters.
    ``mean`` is at least 1, so that dependence never counts as an advantage. None with fewer than two clusters, which say nothing
    about it.
    """
    import numpy as np

    table = np.asarray(counts, dtype=np.float64)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    clusters, k = table.shape
    if clusters < 2:
        return None
    rows, by_bin = table.sum(), table.sum(axis=0)
    share = by_bin / rows
    residual = table - table.sum(axis=1, keepdims=True) * share
    # In these units independent rows have the identity (without the direction in which shares sum to 1).
    variance = clusters / (clusters - 1) * (residual.T @ residual) / np.sqrt(np.outer(by_bin, by_bin))
    total = float(np.trace(variance))
    if total <= 0:  # every cluster has the same shares
        return DesignEffect(1.0, 0.0, clusters)
    spread = (k - 1) * float(np.square(variance).sum()) / total**2 - 1
    return DesignEffect(max(1.0, total / (k - 1)), max(0.0, spread), clusters)


def stability_test(
    reference: ArrayLike, current: ArrayLike, effect: DesignEffect | None = None
) -> StabilityTest:
    """Ask whether a population stability index is larger than chance makes it; counts, not shares.

    With equal shares the index behaves as Pearson's chi-square for two samples divided by their harmonic size: k - 1 degrees of
    freedom, times 1/n + 1/m (Yurdakul 2018). The p-value is Pearson's, because small counts disturb it less. ``effect`` says how
    much rows depend on one another; then it is the second-order correction of Rao & Scott (1984) with the F distribution of
    Thomas & Rao (1987), as in survey statistics. For the test, neighbouring bins are put together until each expects at least
    one independent row of the smaller sample.
    """
    from scipy import stats

    before, now = _counts(reference, current)
    held = before + now > 0
    before, now = before[held], now[held]
    distance = population_stability_index(before, now)
    mean, spread, clusters = effect or (1.0, 0.0, None)
    by_chance = (len(before) - 1) * mean * (1 / before.sum() + 1 / now.sum())
    before, now = _merged(before / mean, now / mean)
    directions = len(before) - 1
    if not directions:
        return StabilityTest(distance, by_chance, 1.0)
    freedom = directions / (1 + min(spread, directions - 1))
    n, m, together = before.sum(), now.sum(), before + now
    pearson = float(((before / n - now / m) ** 2 / together).sum() * n * m)
    if clusters is None:
        p_value = stats.chi2.sf(pearson, directions)
    else:
        p_value = stats.f.sf(pearson / directions, freedom, freedom * (clusters - 1))
    return StabilityTest(distance, by_chance, float(p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that, taken all together, the chance of a single false alarm stays below the level.

    Holm (1979); it holds whatever the dependence between the tests.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def jensen_shannon(reference: ArrayLike, current: ArrayLike) -> float:
    """Compare counts by the Jensen-Shannon distance in base 2 (Lin 1991): 0 for equal shares, 1 without a common bin."""
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

    The order within a bin is not known, so the statistic is at most that of the raw numbers, and the p-value, which comes from
    the asymptotic distribution, at least theirs. So what it finds, the raw numbers would show too.
    """
    import numpy as np
    from scipy import stats

    before, now = _counts(reference, current)
    n, m = before.sum(), now.sum()
    gap = float(np.abs(np.cumsum(before) / n - np.cumsum(now) / m).max())
    return KolmogorovSmirnov(gap, float(stats.kstwobign.sf(gap * np.sqrt(n * m / (n + m)))))


def _merged(
    before: NDArray[np.float64], now: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The counts with neighbouring bins put together until each expects enough of the smaller sample."""
    import numpy as np

    expected = (before + now) * min(before.sum(), now.sum()) / (before + now).sum()
    starts, held = [0], 0.0
    for index, rows in enumerate(expected):
        if held >= _FEWEST_EXPECTED:
            starts, held = [*starts, index], 0.0
        held += rows
    if held < _FEWEST_EXPECTED and len(starts) > 1:
        starts.pop()  # the last bin joins the one before
    return np.add.reduceat(before, starts), np.add.reduceat(now, starts)


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
