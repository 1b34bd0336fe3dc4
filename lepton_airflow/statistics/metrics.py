"""Point estimates: how good are these predictions?

Conventions of the whole folder: ``y`` has shape (n,). A binary ``y`` is 0 or 1, and its ``p`` of shape (n,) or (n, 1) is the
probability of 1; of a (n, 2) ``p``, column 1 is taken. A multi-class ``y`` holds the column numbers 0..k-1 of a (n, k) ``p``.
Bad values raise :class:`~lepton_airflow.errors.BadInput`, unknown names :class:`~lepton_airflow.errors.BadConfiguration`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.statistics.catalogue import METRICS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

# ONNX models answer in float32, in which a smaller 1 - p is 0. One such row must not make the log loss infinite, and a model
# must get the same log loss whether its scores arrive as float32 or as float64.
LOG_LOSS_CLIP = 2.0**-23
_LARGEST = 1e140  # of a number to regress on: the sum of the squares of more is infinite


def classification_metrics(y: ArrayLike, p: ArrayLike, threshold: float = 0.5) -> dict[str, float | None]:
    """Score predicted probabilities: accuracy, precision, recall, F1, ROC AUC, log loss (nats) and Brier score.

    ``p >= threshold`` predicts 1. With more than two classes the largest column is predicted, precision, recall and F1 are
    macro averages, ROC AUC is the macro average of one class against the rest (Hand & Till 2001, section 2) over the classes
    that occur, and the Brier score sums over the classes (Brier 1950). ``roc_auc`` is None where only one class occurs; a
    precision or recall without a denominator is 0.
    """
    import numpy as np
    from sklearn import metrics

    labels, scores = classification_arrays(y, p)
    check_probabilities(scores)
    predicted = predicted_classes(scores, threshold)
    average = "binary" if scores.ndim == 1 else "macro"
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, average=average, zero_division=0.0
    )
    areas = [metrics.roc_auc_score(truth, score) for truth, score in one_versus_rest(labels, scores)]
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "roc_auc": float(np.mean(areas)) if areas else None,
        "log_loss": float(row_losses("log_loss", labels, scores).mean()),
        "brier": float(row_losses("brier", labels, scores).mean()),
    }


def regression_metrics(y: ArrayLike, pred: ArrayLike) -> dict[str, float | None]:
    """Score predicted numbers: mean absolute error and root mean squared error (units of ``y``), and R².

    ``r2`` is None where ``y`` is constant.
    """
    import numpy as np
    from sklearn import metrics

    truth, predicted = regression_arrays(y, pred)
    return {
        "mae": float(metrics.mean_absolute_error(truth, predicted)),
        "rmse": float(metrics.root_mean_squared_error(truth, predicted)),
        "r2": float(metrics.r2_score(truth, predicted)) if np.ptp(truth) > 0 else None,
    }


def arrays_for(
    names: tuple[str, ...], y: ArrayLike, p: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Labels and predictions as these metrics need them, checked."""
    if names and METRICS[names[0]].task == "regression":
        return regression_arrays(y, p)
    labels, scores = classification_arrays(y, p)
    if set(names) != {"roc_auc"}:  # which takes any score, because it looks at ranks alone
        check_probabilities(scores)
    return labels, scores


def classification_arrays(y: ArrayLike, p: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels as int64 (n,) and scores as float64, (n,) if binary and (n, k) otherwise."""
    import numpy as np

    truth, scores = _finite("labels", y), _finite("predictions", p)
    if scores.ndim == 2 and scores.shape[1] <= 2:
        scores = scores[:, -1]
    _same_rows(truth, scores)
    classes = 2 if scores.ndim == 1 else scores.shape[1]
    wrong = (truth < 0) | (truth >= classes) | (truth != np.floor(truth))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BadInput(
            f"labels: row {row} is {truth[row]:g}, expected a whole number from 0 to {classes - 1} "
            f"as the predictions have {classes} classes; encode the target as class numbers."
        )
    return truth.astype(np.int64), scores


def regression_arrays(y: ArrayLike, pred: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return targets and predictions as float64 (n,)."""
    import numpy as np

    truth, predicted = _finite("targets", y), _finite("predictions", pred)
    if predicted.ndim == 2 and predicted.shape[1] == 1:
        predicted = predicted[:, 0]
    _same_rows(truth, predicted)
    if predicted.ndim != 1:
        raise BadInput(
            f"predictions: shape {predicted.shape} for a regression, expected one number per row, "
            f"shape ({len(truth)},); score each output by itself."
        )
    for what, values in ("targets", truth), ("predictions", predicted):
        if (np.abs(values) > _LARGEST).any():
            row = int(np.argmax(np.abs(values) > _LARGEST))
            raise BadInput(
                f"{what}: row {row} is {values[row]:g}, expected at most {_LARGEST:g}, beyond which squared errors have no finite "
                "sum; predict the target in a larger unit, or its logarithm."
            )
    return truth, predicted


def check_probabilities(scores: NDArray[np.float64]) -> None:
    """Refuse scores outside [0, 1], with room for the rounding of float32."""
    import numpy as np

    wrong = (scores < -LOG_LOSS_CLIP) | (scores > 1 + LOG_LOSS_CLIP)
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise BadInput(
            f"predictions: row {place[0]} is {scores[place]:g}, expected a probability from 0 to 1; "
            "return probabilities from the model, or ask for roc_auc only, which takes any score."
        )


def predicted_classes(scores: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Return the predicted class of each row, shape (n,)."""
    import numpy as np

    if not 0 <= threshold <= 1:
        raise BadConfiguration(f"threshold={threshold}: expected a probability, from 0 to 1.")
    return (scores >= threshold).astype(np.int64) if scores.ndim == 1 else scores.argmax(axis=1)


def one_versus_rest(
    labels: NDArray[np.int64], scores: NDArray[np.float64]
) -> list[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """The (truth, score) pairs that ROC AUC averages over: each class that occurs beside another one."""
    pairs = [(labels == 1, scores)] if scores.ndim == 1 else []
    if scores.ndim == 2:
        pairs = [(labels == k, scores[:, k]) for k in range(scores.shape[1])]
    return [(truth, score) for truth, score in pairs if 0 < truth.sum() < len(truth)]


def row_losses(name: str, y: NDArray[Any], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The loss of each row, shape (n,), of a metric that is a mean of them; of rmse the squares."""
    import numpy as np

    rows = np.arange(len(y))
    losses: NDArray[np.float64]
    if name == "mae":
        losses = np.abs(p - y)
    elif name == "rmse" or (name == "brier" and p.ndim == 1):
        losses = np.square(p - y)
    elif name == "brier":
        losses = np.square(p).sum(axis=1) - 2 * p[rows, y] + 1
    else:
        of_truth = np.where(y == 1, p, 1 - p) if p.ndim == 1 else p[rows, y]
        losses = -np.log(np.clip(of_truth, LOG_LOSS_CLIP, 1.0))
    return losses


def _finite(what: str, values: ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        kind = np.asarray(values).dtype
        raise BadInput(f"{what}: values of type {kind}, expected numbers; encode them first.") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        row = int(np.argmax(bad.reshape(len(numbers), -1).any(axis=1)))
        raise BadInput(
            f"{what}: {int(bad.sum()):,} of {numbers.size:,} values are missing or infinite, "
            f"first in row {row}; expected finite numbers, so drop or repair these rows before scoring."
        )
    return numbers


def _same_rows(truth: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
    if truth.ndim != 1 or len(truth) != len(scores):
        raise BadInput(
            f"predictions: shape {scores.shape} against labels of shape {truth.shape}, "
            "expected one label per row; score the model on the rows that the labels come from."
        )
    if len(truth) == 0:
        raise BadInput("labels: 0 rows, expected at least one; check the window of the evaluation data.")
