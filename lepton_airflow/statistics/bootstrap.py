"""How sure are we of a metric? Bootstrap intervals for rows or whole clusters of rows.

No row is ever copied. A resample is a vector of weights over the clusters, most metrics are functions of weighted sums, and
ROC AUC is one pass over scores that are sorted once. So the time is that of (rows x resamples) additions at worst, and far
less with few clusters; the memory stays at a few times that of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.statistics import metrics
from lepton_airflow.statistics.catalogue import check_metric_names
from lepton_airflow.statistics.clusters import cluster_codes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Evaluate = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # weights (b, G) -> metric (b,)

_WEIGHTS_PER_BATCH = 2**21  # 16 MiB of weights at a time


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval."""

    low: float
    estimate: float
    high: float


def bootstrap_intervals(
    y: ArrayLike,
    p: ArrayLike,
    names: Iterable[str],
    clusters: ArrayLike | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    threshold: float = 0.5,
) -> dict[str, Interval]:
    """Put a confidence interval around each named metric of these predictions.

    ``y`` and ``p`` are as in :mod:`lepton_airflow.statistics.metrics`; ``clusters`` (n,) names what is dependent, such as a day
    or a customer. It is the percentile bootstrap (Efron & Tibshirani 1993, chapter 13) over rows, or over whole clusters (Field
    & Welsh 2007; Cameron, Gelbach & Miller 2008). The percentiles are those of Hesterberg (2015, section 5.3), widened from the
    normal to the t distribution with G - 1 degrees of freedom, because plain ones are too narrow for few clusters. A metric that
    these rows do not define (ROC AUC of a single class) is left out. The same seed gives the same result.
    """
    import numpy as np
    from scipy import stats

    names = check_metric_names(names)
    if n_resamples < 100 or not 0 < confidence < 1:
        raise BadConfiguration(
            f"bootstrap: n_resamples={n_resamples} and confidence={confidence}, "
            "expected at least 100 resamples and a confidence between 0 and 1."
        )
    truth, scores = metrics.arrays_for(names, y, p)
    codes, count = cluster_codes(clusters, len(truth))
    evaluators = _evaluators(names, truth, scores, codes, count, threshold, n_resamples)
    everything = np.ones((1, count))
    estimates = {name: float(evaluate(everything)[0]) for name, evaluate in evaluators.items()}
    defined = {name: evaluators[name] for name, value in estimates.items() if np.isfinite(value)}
    resampled: dict[str, list[NDArray[np.float64]]] = {name: [] for name in defined}
    for weights in _resampling_weights(count, n_resamples, seed):
        for name, evaluate in defined.items():
            resampled[name].append(evaluate(weights))
    tail = stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf((1 - confidence) / 2, count - 1))
    intervals = {}
    for name, values in resampled.items():
        low, high = np.nanquantile(np.concatenate(values), [tail, 1 - tail])
        intervals[name] = Interval(float(low), estimates[name], float(high))
    return intervals


def _resampling_weights(count: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield batches (b, G): how often each cluster was drawn when G were drawn with replacement."""
    import numpy as np

    rng = np.random.default_rng(seed)
    batch = max(1, _WEIGHTS_PER_BATCH // count)
    for start in range(0, n_resamples, batch):
        size = min(batch, n_resamples - start)
        drawn = rng.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _evaluators(
    names: tuple[str, ...],
    y: NDArray[Any],
    p: NDArray[np.float64],
    codes: NDArray[np.int64],
    count: int,
    threshold: float,
    n_resamples: int,
) -> dict[str, Evaluate]:
    """Return for each metric a function of the cluster weights."""
    evaluators: dict[str, Evaluate] = {}
    for name in names:
        if name == "roc_auc":
            evaluators[name] = _auc(y, p, codes, count, n_resamples)
        elif name in ("log_loss", "brier", "mae", "rmse"):
            evaluators[name] = _mean_loss(name, metrics.row_losses(name, y, p), codes, count)
        elif name == "r2":
            evaluators[name] = _r2(y, p, codes, count)
        else:
            evaluators[name] = _from_confusion(
                name, y, metrics.predicted_classes(p, threshold), p, codes, count
            )
    return evaluators


def _mean_loss(name: str, losses: NDArray[np.float64], codes: NDArray[np.int64], count: int) -> Evaluate:
    import numpy as np

    total = np.bincount(codes, weights=losses, minlength=count)
    rows = np.bincount(codes, minlength=count)

    def evaluate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = (weights @ total) / (weights @ rows)
        return np.sqrt(mean) if name == "rmse" else mean

    return evaluate


def _r2(y: NDArray[Any], p: NDArray[np.float64], codes: NDArray[np.int64], count: int) -> Evaluate:
    import numpy as np

    centred = y - y.mean()  # keeps the sum of squares accurate where the mean is large
    sums = np.stack(
        [
            np.bincount(codes, weights=column, minlength=count)
            for column in (np.square(y - p), np.square(centred), centred)
        ]
    )
    rows = np.bincount(codes, minlength=count)

    def evaluate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        residual, square, linear = (weights @ column for column in sums)
        spread = square - np.square(linear) / (weights @ rows)
        explained: NDArray[np.float64] = 1 - residual / np.where(spread > 0, spread, np.nan)
        return explained

    return evaluate


def _from_confusion(
    name: str,
    y: NDArray[np.int64],
    predicted: NDArray[np.int64],
    p: NDArray[np.float64],
    codes: NDArray[np.int64],
    count: int,
) -> Evaluate:
    """Accuracy, precision, recall and F1, from the rows of each cluster in which a class is true, predicted, or both."""
    import numpy as np
    from scipy import sparse

    classes = 2 if p.ndim == 1 else p.shape[1]
    hit = (y == predicted).astype(np.float64)

    def by_cluster(column: NDArray[np.int64], values: NDArray[np.float64]) -> sparse.csr_array:
        return sparse.csr_array((values, (column, codes)), shape=(classes, count))

    tables = [by_cluster(y, hit), by_cluster(y, np.ones(len(y))), by_cluster(predicted, np.ones(len(y)))]

    def evaluate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        both, true, said = (table @ weights.T for table in tables)  # each (classes, b)
        ratio: NDArray[np.float64]
        if name == "accuracy":
            ratio = both.sum(axis=0) / true.sum(axis=0)
            return ratio
        if name == "f1":
            both, below = 2 * both, true + said
        else:
            below = said if name == "precision" else true
        by_class = both / np.where(below > 0, below, np.inf)  # without a denominator: 0, as zero_division=0
        occurs = (true + said) > 0
        ratio = by_class[1] if p.ndim == 1 else (by_class * occurs).sum(axis=0) / occurs.sum(axis=0)
        return ratio

    return evaluate


def _auc(
    y: NDArray[np.int64], p: NDArray[np.float64], codes: NDArray[np.int64], count: int, n_resamples: int
) -> Evaluate:
    """ROC AUC, with several classes the mean over the classes that occur in the resample."""
    import numpy as np

    areas = [
        _binary_auc(truth, score, codes, count, n_resamples) for truth, score in metrics.one_versus_rest(y, p)
    ]

    def evaluate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.array([area(weights) for area in areas]).reshape(len(areas), len(weights))
        known = np.isfinite(values)
        found = known.sum(axis=0)
        return np.where(found > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(found, 1), np.nan)

    return evaluate


def _binary_auc(
    truth: NDArray[np.bool_],
    score: NDArray[np.float64],
    codes: NDArray[np.int64],
    count: int,
    n_resamples: int,
) -> Evaluate:
    """The weighted share of (positive, negative) pairs in the right order, a tie counting half."""
    import numpy as np

    order = np.argsort(score, kind="stable")
    positive, negative = order[truth[order]], order[~truth[order]]
    of_positive, of_negative = codes[positive], codes[negative]
    below = np.searchsorted(score[negative], score[positive], "left")
    not_above = np.searchsorted(score[negative], score[positive], "right")

    def wins(weight_of_negatives: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each positive, the weight of the negatives below it and half of those tied with it."""
        running = np.concatenate([[0.0], np.cumsum(weight_of_negatives)])
        won: NDArray[np.float64] = (running[below] + running[not_above]) / 2
        return won

    def share(won: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        pairs = (weights @ np.bincount(of_positive, minlength=count)) * (
            weights @ np.bincount(of_negative, minlength=count)
        )
        return won / np.where(pairs > 0, pairs, np.nan)

    def by_rank(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        won = [float(row[of_positive] @ wins(row[of_negative])) for row in weights]
        return share(np.array(won), weights)

    # With fewer clusters than resamples, the pairs won between each two clusters are counted once, in one pass over the rows
    # for each cluster. A resample is then a small quadratic form in the weights, instead of a pass of its own.
    if count >= n_resamples:
        return by_rank
    won_between = np.stack(
        [np.bincount(of_positive, weights=wins(of_negative == g), minlength=count) for g in range(count)],
        axis=1,
    )

    def by_pairs(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return share(((weights @ won_between) * weights).sum(axis=1), weights)

    return by_pairs
