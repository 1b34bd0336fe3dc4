"""The metrics that there are, and what to know of each; how they are computed stands in ``metrics.py`` and its neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lepton_airflow.errors import BadConfiguration, did_you_mean


@dataclass(frozen=True)
class Metric:
    """What to know of a metric.

    :ivar name: what stages, artifacts and MLflow call it.
    :ivar title: what people call it at the head of a column.
    :ivar spoken: what people call it within a sentence.
    :ivar higher_is_better: False for losses and errors.
    :ivar of_positive: whether it depends on which class is the positive one, and so on a threshold.
    :ivar scale: ``share`` lies from 0 to 1, ``target`` has the unit of the target, ``open`` has neither.
    """

    name: str
    task: Literal["classification", "regression"]
    title: str
    spoken: str
    higher_is_better: bool
    scale: Literal["share", "target", "open"]
    of_positive: bool = False


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classification", "Accuracy", "accuracy", True, "share", True),
        Metric("precision", "classification", "Precision", "precision", True, "share", True),
        Metric("recall", "classification", "Recall", "recall", True, "share", True),
        Metric("f1", "classification", "F1", "F1", True, "share", True),
        Metric("roc_auc", "classification", "ROC AUC", "ROC AUC", True, "share"),
        Metric("log_loss", "classification", "Log loss", "log loss", False, "open"),
        Metric("brier", "classification", "Brier score", "Brier score", False, "open"),
        Metric("mae", "regression", "MAE", "mean absolute error", False, "target"),
        Metric("rmse", "regression", "RMSE", "RMSE", False, "target"),
        Metric("r2", "regression", "R²", "R²", True, "open"),
    )
}

# What a model is judged by unless the user says otherwise.
JUDGED_BY = {"classification": "roc_auc", "regression": "rmse"}
# What hyperparameters are chosen by: log loss, because rows of one class define it too, and it rewards calibration.
TUNED_BY = {"classification": "log_loss", "regression": "rmse"}


def metrics_of(task: str) -> tuple[str, ...]:
    """The names of a task's metrics, in the order in which they are shown."""
    return tuple(metric.name for metric in METRICS.values() if metric.task == task)


def check_metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names as a tuple; raises BadConfiguration for an unknown one, and for metrics of both tasks."""
    names = tuple(names)
    for name in names:
        if name not in METRICS:
            raise BadConfiguration(f"metrics: {name!r} is not a metric; {did_you_mean(name, METRICS)}")
    if len({METRICS[name].task for name in names}) > 1:
        raise BadConfiguration(
            f"metrics: {', '.join(names)} mix classification ({', '.join(metrics_of('classification'))}) "
            f"and regression ({', '.join(metrics_of('regression'))}); ask for one kind at a time."
        )
    return names
