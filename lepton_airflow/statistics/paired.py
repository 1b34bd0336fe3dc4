"""Is the candidate better than the champion? A paired test on the same rows, and the verdict drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.statistics import metrics
from lepton_airflow.statistics.clusters import cluster_codes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Decision = Literal["promote", "hold", "reject"]

_SPOKEN = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "log_loss": "log loss",
    "brier": "Brier score",
    "mae": "mean absolute error",
    "rmse": "RMSE",
    "r2": "R²",
}


@dataclass(frozen=True)
class PairedResult:
    """What the test found: the metric of both models, and their difference with its confidence interval.

    ``difference``, ``low`` and ``high`` are oriented so that positive means that the candidate is better, also for
    losses. ``p_value`` is two-sided, for the hypothesis that the difference is exactly ``min_effect``: it is below
    1 - ``confidence`` exactly when the interval excludes ``min_effect``.
    """

    metric: str
    champion: float
    candidate: float
    difference: float
    low: float
    high: float
    p_value: float
    confidence: float
    min_effect: float
    n: int
    n_clusters: int | None  # None: the rows were taken as independent
    method: str


@dataclass(frozen=True)
class Verdict:
    """A decision and the one sentence that explains it."""

    decision: Decision
    sentence: str


@dataclass(frozen=True)
class _Linearised:
    """A metric as its value plus a sum of small contributions of rows, of which the variance is taken.

    ``units`` is how many clusters the scarcest part of the metric rests on: for ROC AUC those with positives or those
    with negatives, for recall those with positives.
    """

    value: float
    influence: NDArray[np.float64]  # (n,), sums to 0
    units: int


def paired_test(
    y: ArrayLike,
    p_champion: ArrayLike,
    p_candidate: ArrayLike,
    metric: str = "roc_auc",
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    min_effect: float = 0.0,
    threshold: float = 0.5,
) -> PairedResult:
    """Test whether the candidate's metric differs from the champion's by more than chance, on the same rows.

    ``y`` and both ``p`` as in :mod:`lepton_airflow.statistics.metrics`; ``clusters`` (n,) names what is dependent.
    Every metric is linearised: the error of the estimated difference is, to first order, a sum of one influence value
    per row, whose variance is estimated from its cluster sums, with t quantiles on one degree of freedom less than
    there are clusters. Nothing is drawn at random. By metric that is

    - ROC AUC: DeLong, DeLong & Clarke-Pearson (1988), by the ranks of Sun & Xu (2014); with clusters Obuchowski (1997).
    - log loss, Brier score, accuracy, mean absolute error: the mean of row differences with the cluster-robust variance
      of Liang & Zeger (1986) and its G / (G - 1) factor (CR1); without clusters this is the paired t test.
    - precision, recall, F1, R²: the same variance of a linearised ratio (Binder 1983). RMSE: the root by delta method.

    Raises BadInput where rows or clusters are too few, a value is missing, or the rows do not define the metric.
    """
    import numpy as np
    from scipy import stats

    (metric,) = metrics.check_metric_names([metric])
    if not 0 < confidence < 1:
        raise BadConfiguration(f"paired test: confidence={confidence}, expected a number between 0 and 1, such as 0.95.")
    truth, champion_scores = metrics.arrays_for((metric,), y, p_champion)
    _, candidate_scores = metrics.arrays_for((metric,), y, p_candidate)
    if champion_scores.shape != candidate_scores.shape:
        raise BadInput(
            f"predictions: champion {champion_scores.shape} and candidate {candidate_scores.shape} differ in shape, "
            "expected the same rows and classes from both; score both models on one evaluation set."
        )
    codes, count = cluster_codes(clusters, len(truth))
    champion = _linearise(metric, truth, champion_scores, codes, threshold)
    candidate = _linearise(metric, truth, candidate_scores, codes, threshold)

    sign = 1.0 if metrics.HIGHER_IS_BETTER[metric] else -1.0
    difference = sign * (candidate.value - champion.value)
    by_cluster = np.bincount(codes, weights=candidate.influence - champion.influence, minlength=count)
    error = float(np.sqrt(np.square(by_cluster).sum()))
    df = min(champion.units, candidate.units) - 1
    reach = float(stats.t.ppf((1 + confidence) / 2, df)) * error
    beyond = abs(difference - min_effect)
    p_value = 2 * float(stats.t.sf(beyond / error, df)) if error > 0 else float(beyond == 0)
    return PairedResult(
        metric=metric,
        champion=champion.value,
        candidate=candidate.value,
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p_value=p_value,
        confidence=confidence,
        min_effect=min_effect,
        n=len(truth),
        n_clusters=None if clusters is None else count,
        method=_method(metric, clustered=clusters is not None, df=df),
    )


def verdict(result: PairedResult, min_effect: float | None = None) -> Verdict:
    """Decide from the interval of a paired test, and say why in one sentence.

    Promote when the whole interval lies above ``min_effect`` (default: that of the test). Reject when the whole
    interval lies below 0, the candidate being worse beyond chance. Otherwise hold. A negative ``min_effect`` is a
    non-inferiority margin: a candidate that is at most that much worse is promoted.
    """
    required = result.min_effect if min_effect is None else min_effect
    if result.low > required:
        decision: Decision = "promote"
        because = f"above the required {required:+.3f}"
    elif result.high < 0:
        decision, because = "reject", "below zero"
    else:
        decision = "hold"
        because = f"which does not lie above the required {required:+.3f}"
    rows = f"{result.n:,} rows"
    if result.n_clusters is not None:
        rows += f" in {result.n_clusters:,} clusters"
    oriented = "" if metrics.HIGHER_IS_BETTER[result.metric] else " (positive is better)"
    return Verdict(
        decision,
        f"{decision}: {_SPOKEN[result.metric]} {result.candidate:.3f} against {result.champion:.3f} of the champion "
        f"on {rows}; the difference {result.difference:+.3f}{oriented} has the {100 * result.confidence:g}% interval "
        f"[{result.low:+.3f}, {result.high:+.3f}], {because}.",
    )


def _linearise(
    metric: str, y: NDArray[Any], p: NDArray[np.float64], codes: NDArray[np.int64], threshold: float
) -> _Linearised:
    import numpy as np

    ones = np.ones(len(y))
    if metric == "roc_auc":
        return _linearise_auc(y, p, codes)
    if metric in ("log_loss", "brier", "mae"):
        return _ratio(metrics.row_losses(metric, y, p), ones, codes)
    if metric == "rmse":
        square = _ratio(metrics.row_losses(metric, y, p), ones, codes)
        root = float(np.sqrt(square.value))
        return _Linearised(root, square.influence / (2 * root or 1.0), square.units)  # all errors 0: influence is 0
    if metric == "r2":
        spread = np.square(y - y.mean())
        if not spread.any():
            raise BadInput(f"r2: all {len(y):,} targets are {y[0]:g}, expected at least two values; compare by mae.")
        unexplained = _ratio(np.square(y - p), spread, codes)
        return _Linearised(1 - unexplained.value, -unexplained.influence, unexplained.units)
    predicted = metrics.predicted_classes(p, threshold)
    if metric == "accuracy":
        return _ratio((y == predicted).astype(np.float64), ones, codes)
    if p.ndim == 1:
        return _class_ratio(metric, y == 1, predicted == 1, codes)
    occurring = np.union1d(y, predicted)
    return _average([_class_ratio(metric, y == k, predicted == k, codes) for k in occurring])


def _class_ratio(
    metric: str, true: NDArray[np.bool_], said: NDArray[np.bool_], codes: NDArray[np.int64]
) -> _Linearised:
    import numpy as np

    both = (true & said).astype(np.float64)
    if metric == "precision":
        return _ratio(both, said.astype(np.float64), codes)
    if metric == "recall":
        return _ratio(both, true.astype(np.float64), codes)
    return _ratio(2 * both, true.astype(np.float64) + said, codes)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64], codes: NDArray[np.int64]) -> _Linearised:
    """The ratio of two sums over rows; 0 without a denominator."""
    import numpy as np

    total = float(below.sum())
    if total == 0:
        return _Linearised(0.0, np.zeros(len(below)), _units(np.ones(len(below), dtype=bool), codes))
    value = float(above.sum()) / total
    units = _units(below > 0, codes)
    if units < 2:
        raise BadInput(
            "paired test: the rows that the metric counts lie in 1 cluster, expected at least 2; "
            "widen the window or choose a metric that counts every row, such as log_loss."
        )
    return _Linearised(value, np.sqrt(units / (units - 1)) * (above - value * below) / total, units)


def _linearise_auc(y: NDArray[np.int64], p: NDArray[np.float64], codes: NDArray[np.int64]) -> _Linearised:
    pairs = metrics.one_versus_rest(y, p)
    if not pairs:
        raise BadInput(
            f"roc_auc: all {len(y):,} rows have the label {y[0]}, expected at least two classes; "
            "widen the window or compare by log_loss."
        )
    return _average([_linearise_binary_auc(truth, score, codes) for truth, score in pairs])


def _linearise_binary_auc(
    truth: NDArray[np.bool_], score: NDArray[np.float64], codes: NDArray[np.int64]
) -> _Linearised:
    """ROC AUC and DeLong's structural components, from ranks.

    A positive's component is the share of negatives it beats, a negative's the share of positives that beat it, ties
    counting half. Their deviations from the AUC, over the number of their kind, are the influence. Each kind carries
    the root of its own small-sample factor, so that single rows give DeLong's variance exactly and clusters that all
    hold both kinds give Obuchowski's.
    """
    import numpy as np
    from scipy import stats

    rank = stats.rankdata(score)
    area = 0.0
    influence = np.empty(len(score))
    scarcest = len(score)
    for kind, name in ((truth, "positive"), (~truth, "negative")):
        units = _units(kind, codes)
        if units < 2:
            raise BadInput(
                f"roc_auc: the {int(kind.sum()):,} {name} rows lie in 1 cluster, expected at least 2 clusters with "
                f"{name} rows; widen the window."
            )
        beaten = (rank[kind] - stats.rankdata(score[kind])) / (~kind).sum()
        component = beaten if name == "positive" else 1 - beaten
        area = float(component.mean())
        influence[kind] = np.sqrt(units / (units - 1)) * (component - area) / kind.sum()
        scarcest = min(scarcest, units)
    return _Linearised(area, influence, scarcest)


def _average(parts: list[_Linearised]) -> _Linearised:
    """The macro average over classes."""
    import numpy as np

    influence = parts[0].influence / len(parts)
    for part in parts[1:]:
        influence = influence + part.influence / len(parts)
    return _Linearised(float(np.mean([part.value for part in parts])), influence, min(part.units for part in parts))


def _units(rows: NDArray[np.bool_], codes: NDArray[np.int64]) -> int:
    import numpy as np

    return int(np.count_nonzero(np.bincount(codes[rows])))


def _method(metric: str, clustered: bool, df: int) -> str:
    if metric == "roc_auc":
        name = "clustered DeLong test (Obuchowski 1997)" if clustered else "DeLong test (1988)"
    elif metric in ("precision", "recall", "f1", "r2", "rmse"):
        name = "linearised " + ("cluster-robust test (CR1)" if clustered else "paired t test")
    else:
        name = "cluster-robust t test (CR1)" if clustered else "paired t test"
    return f"{name}, two-sided, t with {df:,} degrees of freedom"
