"""Measure how well a model predicts rows it has not seen."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lepton_airflow.contract import split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, brief, did_you_mean, require
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lepton_airflow.evaluation.rows import EvaluationRows
    from lepton_airflow.packaging.card import ModelCard

log = logging.getLogger(__name__)

_MOST_SLICES = 20  # of one column; rarer values are put together into one more


@dataclass(kw_only=True)
class EvaluateModel(Stage):
    """Run the ONNX model over a split that it has not seen, and report every metric with its interval.

    Classification: accuracy, precision, recall, F1, ROC AUC, log loss and Brier score (several classes: macro averages,
    one class against the rest; of two classes those of the model's positive class); regression: MAE, RMSE and R². A metric that the rows do not define is null. Intervals
    are bootstrap intervals over rows, or over whole clusters of rows that depend on one another.

    Returns the artifact ``report``, a directory with ``metrics.json``, the plots as PNG and ``report.html`` (one page
    that needs no other file), and as metrics a flat dict such as ``{"roc_auc": .7, "roc_auc_low": .68, …}``, which
    ``RegisterModel`` takes.

    :param model: the model package, ``train.output["model"]``.
    :param dataset: the rows to judge it on, ``prepare.output["test"]``.
    :param threshold: probability of the positive class from which on it is predicted, of two classes [0 to 1].
    :param cluster_column: column that names dependent rows, such as the day; None: the one the dataset names, if any.
    :param slices: columns to report separately: categories by value, numbers by quarter.
    :param bootstrap_resamples: how many resamples the intervals are taken from, at least 100.
    :param confidence: level of the intervals [0 to 1].
    :param seed: of the resamples.
    :param gate: the worst acceptable values, ``{"roc_auc": 0.65}`` (or ``roc_auc_low`` for the end of its interval):
        a smallest value, for losses a largest one. Where one is missed the stage fails, after its report is stored.
    :param allow_overlap: also judge on rows that the model has touched; the report then says so.
    :raises BadInput: the rows do not fit the model or lack a column, or a gate is missed.
    :raises BadConfiguration: the model has touched the rows; an unknown metric, a number out of its range.
    """

    windowed: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime", "scikit-learn", "matplotlib")
    extra: ClassVar[str] = "evaluate"
    outputs: ClassVar[tuple[str, ...]] = ("report",)

    model: ArtifactUri
    dataset: ArtifactUri
    threshold: float = 0.5
    cluster_column: str | None = None
    slices: list[str] = field(default_factory=list)
    bootstrap_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    gate: dict[str, float] | None = None
    allow_overlap: bool = False

    def run(self, run: RunInfo) -> Result:
        from lepton_airflow.evaluation.rows import load_rows
        from lepton_airflow.packaging.package import ModelPackage
        from lepton_airflow.packaging.touched import overlap
        from lepton_airflow.statistics.catalogue import metrics_of

        for library in self.engines:
            require(library, "EvaluateModel", self.extra)
        package = ModelPackage.open(run.fetch(self.model))
        card = package.card
        path = run.fetch(self.dataset)
        names = metrics_of(card.task)
        self._check_gate(names)
        rows = load_rows(path, card, self.cluster_column, self.slices)
        touched = overlap(package, path, rows.info)
        if touched and not self.allow_overlap:
            raise BadConfiguration(
                f"the model may not be judged on this dataset: {touched} Pass rows that it has not seen, such as "
                "prepare.output['test'], or allow_overlap=True to judge all the same."
            )
        scores = package.predict_parquet(path)
        run.check_stop()
        metrics = self._measure(card, names, rows.y, scores, rows.clusters)
        slices = {column: self._slices(card, rows, scores, column) for column in self.slices}
        result: dict[str, Any] = {
            "summary": _summary(card, metrics, rows, touched),
            "metrics": metrics,
            "intervals": self._intervals_text(rows),
            "slices": slices,
            "threshold": self.threshold,
            "positive_class": card.schema.positive_class,
            "overlap": touched,
            "model": {
                "sha256": split_pin(self.model)[1] or run.store.digest(self.model),
                "window": card.window,
            },
            "dataset": {
                "sha256": split_pin(self.dataset)[1] or run.store.digest(self.dataset),
                "rows": len(rows.y),
                "time_range": rows.info.time_range,
                "cluster_column": rows.cluster_column,
            },
        }
        artifact = run.save("report", self._write_report(run, card, result, rows.y, scores))
        flat = _flat(metrics) | {"rows": float(len(rows.y))}
        self._apply_gate(flat, split_pin(artifact.uri)[0])
        return Result(summary=result["summary"], artifacts={"report": artifact}, metrics=flat)

    def _write_report(
        self,
        run: RunInfo,
        card: ModelCard,
        result: Mapping[str, Any],
        y: NDArray[Any],
        scores: NDArray[Any],
    ) -> Path:
        """The folder with the numbers as JSON, the plots, and the page that holds both."""
        from lepton_airflow.evaluation import plots, report

        folder = run.workdir / "report"
        folder.mkdir(exist_ok=True)
        if card.task == "classification":
            pictures = plots.classification_plots(folder, y, scores, card.classes, self.threshold)
        else:
            pictures = plots.regression_plots(folder, y, scores)
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(report.render(result, card, pictures), encoding="utf-8")
        return folder

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _measure(
        self,
        card: ModelCard,
        names: Sequence[str],
        y: NDArray[Any],
        scores: NDArray[Any],
        clusters: NDArray[Any] | None,
    ) -> dict[str, dict[str, float | None]]:
        """Each metric as ``{"value", "low", "high"}``; the ends are None where the rows are too few for an interval."""
        from lepton_airflow.statistics.bootstrap import bootstrap_intervals

        point = self._point(card, y, scores)
        try:
            found = bootstrap_intervals(
                y,
                scores,
                names,
                clusters=clusters,
                n_resamples=self.bootstrap_resamples,
                confidence=self.confidence,
                seed=self.seed,
                threshold=self.threshold,
            )
        except BadInput as error:  # a single row or cluster
            log.warning("no intervals: %s", error)
            found = {}
        return {
            name: {
                "value": point[name],
                "low": found[name].low if name in found else None,
                "high": found[name].high if name in found else None,
            }
            for name in names
        }

    def _point(self, card: ModelCard, y: NDArray[Any], scores: NDArray[Any]) -> dict[str, float | None]:
        from lepton_airflow.statistics import metrics

        if card.task == "classification":
            return metrics.classification_metrics(y, scores, self.threshold)
        return metrics.regression_metrics(y, scores)

    def _slices(
        self, card: ModelCard, rows: EvaluationRows, scores: NDArray[Any], column: str
    ) -> list[dict[str, Any]]:
        """Metrics of the parts of a column, the main one with its interval."""
        from lepton_airflow.statistics.catalogue import JUDGED_BY

        primary = JUDGED_BY[card.task]
        found = []
        for label, mask in _parts(rows.frame[column]):
            clusters = rows.clusters[mask] if rows.clusters is not None else None
            main = self._measure(card, [primary], rows.y[mask], scores[mask], clusters)[primary]
            found.append(
                {
                    "slice": label,
                    "rows": int(mask.sum()),
                    "metrics": self._point(card, rows.y[mask], scores[mask]),
                    "interval": {"metric": primary, "low": main["low"], "high": main["high"]}
                    if main["low"] is not None
                    else None,
                }
            )
        return found

    def _intervals_text(self, rows: EvaluationRows) -> str:
        over = f"whole clusters of {rows.cluster_column}" if rows.cluster_column else "rows"
        question = (
            f" Judged on later rows of {rows.info.cluster_column} that train knows, too."
            if rows.info.known_clusters
            else ""
        )
        return (
            f"{100 * self.confidence:g}%, bootstrap over {over}, {self.bootstrap_resamples:,} resamples, seed {self.seed}."
            + question
        )

    # -- gate ------------------------------------------------------------------------------------------------------

    def _check_gate(self, names: Sequence[str]) -> None:
        known = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
        for key, bound in (self.gate or {}).items():
            if key not in known:
                raise BadConfiguration(
                    f"gate: {key!r} is not a metric of this model; {did_you_mean(key, known)}"
                )
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
                raise BadConfiguration(f"gate: {key}={bound!r} is not a number, such as 0.65.")

    def _apply_gate(self, flat: dict[str, float | None], report_uri: str) -> None:
        from lepton_airflow.statistics.catalogue import METRICS

        missed = []
        for key, bound in (self.gate or {}).items():
            value = flat[key]
            higher = METRICS[key.removesuffix("_low").removesuffix("_high")].higher_is_better
            if value is None:
                missed.append(f"{key} is not defined on these rows (required {bound:g})")
            elif (value < bound) if higher else (value > bound):
                missed.append(f"{key} is {value:.4g}, required at {'least' if higher else 'most'} {bound:g}")
        if missed:
            raise BadInput(
                f"the model is not good enough: {'; '.join(missed)}. See report.html in {report_uri}."
            )


def _parts(column: pd.Series[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """A column's parts as (label, rows): numbers by quarter, else by value with the most frequent first."""
    import numpy as np
    import pandas as pd

    missing = column.isna().to_numpy()
    present = column[~missing]
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if numeric and present.nunique() > _MOST_SLICES // 2:
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        edges = np.unique(np.quantile(values[~missing], [0, 0.25, 0.5, 0.75, 1]))
        for low, high in pairwise(edges):
            last = high == edges[-1]
            mask = (values >= low) & (values <= high if last else values < high)
            if mask.any():
                yield f"[{low:.4g}, {high:.4g}{']' if last else ')'}", mask
    else:
        frequent = list(present.value_counts().index[:_MOST_SLICES])
        for value in frequent:
            yield str(value), (column == value).fillna(False).to_numpy(dtype=bool)
        rare = (~column.isin(frequent)).to_numpy() & ~missing
        if rare.any():
            yield f"{present[rare[~missing]].nunique():,} others", rare
    if missing.any():
        yield "(missing)", missing


def _flat(metrics: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for name, metric in metrics.items():
        flat |= {name: metric["value"], f"{name}_low": metric["low"], f"{name}_high": metric["high"]}
    return flat


def _positive_text(card: ModelCard, rows: EvaluationRows) -> str:
    """Which class the numbers are about; the model was trained with it, whatever the dataset says."""
    mine, theirs = card.schema.positive_class, rows.info.positive_class
    if mine is None:
        return ""
    differs = theirs is not None and theirs != mine
    other = f" (the dataset says {brief(theirs)}: train on it to change the model's)" if differs else ""
    return f"; the positive class is {brief(mine)}{other}"


def _summary(
    card: ModelCard, metrics: dict[str, dict[str, float | None]], rows: EvaluationRows, touched: str | None
) -> str:
    from lepton_airflow.statistics.catalogue import JUDGED_BY, METRICS

    name = JUDGED_BY[card.task]
    main = metrics[name]
    if main["value"] is None:  # one class only
        name, main = "log_loss", metrics["log_loss"]
    between = f" [{main['low']:.3f}, {main['high']:.3f}]" if main["low"] is not None else ""
    text = f"{METRICS[name].title} {main['value']:.3f}{between} on {len(rows.y):,} rows"
    text += f", {' to '.join(rows.info.time_range)}" if rows.info.time_range else ""
    text += f"{_positive_text(card, rows)}."
    return f"{text} The dataset may flatter the model: {touched}" if touched else text
