"""Make a model smaller and faster where that costs it nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lepton_airflow.contract import Artifact, pin, split_pin
from lepton_airflow.data.dataset import DatasetInfo, read_info
from lepton_airflow.errors import BadConfiguration, brief, did_you_mean, require
from lepton_airflow.sdk.fingerprint import cpu_model, versions
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lepton_airflow.evaluation.rows import EvaluationRows
    from lepton_airflow.packaging.card import ModelCard
    from lepton_airflow.packaging.compression.compare import Comparison
    from lepton_airflow.packaging.compression.quality import Judge
    from lepton_airflow.packaging.package import ModelPackage

    Feeds = dict[int, list[dict[str, NDArray[Any]]]]

log = logging.getLogger(__name__)

_DEFAULT_LOSS = 0.005  # of the metric; of a metric in the unit of the target this share of the original's
_CALIBRATION_BATCH = 256  # rows: bounds the memory of calibration, which holds every tensor of a batch
_TIMED_ROWS = 2048  # how many different rows are timed at most


@dataclass(kw_only=True)
class QuantizeModel(Stage):
    """Try smaller number formats on a model, measure them on this CPU, and take one only where it pays.

    Candidates: ``dynamic_int8`` (8-bit weights), ``static_int8`` (8-bit weights per channel and activations, whose ranges
    come from ``calibration``) and ``fp16``. Each is timed beside the original, call by call in turns, and scored on
    ``dataset``. One is taken when its metric is not worse by more than ``max_loss`` (the whole interval of the paired
    difference says so), it is at no batch size slower by more than ``max_slowdown``, and it is faster by ``min_speedup`` or
    smaller by ``min_shrink``.
    Otherwise the model stays as it is, and the summary says why: trees and linear models have nothing to quantize.

    Returns the artifacts ``model`` (a model package: a new one, or the very one that was given) and ``report`` (a
    directory with ``quantization.json`` and ``report.html``), and the values ``chosen`` (``fp32`` or a candidate) and
    ``reason``. What holds on this CPU may not hold on another: run it on the kind of machine that will serve.

    :param model: the model package, ``train.output["model"]``.
    :param calibration: rows that activation ranges are taken from, ``prepare.output["train"]``.
    :param dataset: rows that the candidates are judged on, ``prepare.output["valid"]``; never the test split, since
        choosing on it would spend the rows that evaluation needs. The new package names both as touched.
    :param candidates: which formats to try; None: all of them; an empty list tries none.
    :param metric: what must not get worse; None: ``roc_auc`` for classification, ``rmse`` for regression.
    :param max_loss: how much of the metric may be lost [of the metric]; None: 0.005, and for MAE and RMSE 0.5% of the
        original's.
    :param min_speedup: how many times as fast a candidate must be, with its whole interval [times].
    :param max_slowdown: how much slower a candidate may be at any batch size, with its whole interval [share, 0 to 1].
    :param min_shrink: how many times smaller a candidate must be that is no faster [times].
    :param calibration_rows: how many rows to calibrate with, spread over all of them [rows].
    :param batch_rows: batch sizes to time [rows].
    :param rounds: how often to open fresh sessions and time all of them, at least 6; the intervals count these.
    :param timing_s: about how long to time [seconds].
    :param threads: CPU threads of a session [threads].
    :param cluster_column: column that names dependent rows, such as the day; None: the one the dataset names, if any.
    :param threshold: probability of the positive class from which on it is predicted, for accuracy, precision, recall and F1.
    :param confidence: level of the metric's intervals [0 to 1].
    :param seed: of the order of calls and of the bootstrap.
    :raises BadInput: the rows do not fit the model, or do not define the metric (one class).
    :raises BadConfiguration: a test split, a quantized model, an unknown candidate or metric, a number out of its range.
    """

    windowed: ClassVar[bool] = False
    measures_machine: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "scikit-learn", "scipy")
    extra: ClassVar[str] = "quantize"
    outputs: ClassVar[tuple[str, ...]] = ("model", "report", "chosen", "reason")

    model: ArtifactUri
    calibration: ArtifactUri
    dataset: ArtifactUri
    candidates: list[str] | None = None
    metric: str | None = None
    max_loss: float | None = None
    min_speedup: float = 1.1
    max_slowdown: float = 0.03
    min_shrink: float = 2.0
    calibration_rows: int = 1024
    batch_rows: list[int] = field(default_factory=lambda: [1, 256])
    rounds: int = 12
    timing_s: float = 30.0
    threads: int = 1
    cluster_column: str | None = None
    threshold: float = 0.5
    confidence: float = 0.95
    seed: int = 0

    def run(self, run: RunInfo) -> Result:
        from lepton_airflow.evaluation.rows import load_rows
        from lepton_airflow.packaging.compression.compare import Rules, Work, compare
        from lepton_airflow.packaging.compression.convert import METHODS
        from lepton_airflow.packaging.package import ModelPackage, write_package
        from lepton_airflow.packaging.session import parquet_feeds
        from lepton_airflow.packaging.touched import overlap

        for library in self.engines:
            require(library, "QuantizeModel", self.extra)
        self._check_numbers()
        package = ModelPackage.open(run.fetch(self.model))
        card = package.card
        if card.quantization:
            raise BadConfiguration(
                f"the model is quantized already ({card.quantization.get('method')}): pass the package that was trained, "
                "train.output['model']."
            )
        paths = {"calibration": run.fetch(self.calibration), "dataset": run.fetch(self.dataset)}
        infos = {name: self._usable(name, path, package) for name, path in paths.items()}
        rows = load_rows(paths["dataset"], card, self.cluster_column)
        judge = self._judge(package, rows, paths["dataset"])

        def predict(model: bytes) -> NDArray[np.float32]:
            """Score through a package of this model, which is how it will be used."""
            write_package(run.workdir / "candidate", model, card)
            return ModelPackage.open(run.workdir / "candidate").predict_parquet(paths["dataset"])

        found = compare(
            (package.path / "model.onnx").read_bytes(),
            Work(
                output=card.schema.output,
                calibration=lambda: parquet_feeds(
                    paths["calibration"], card.features, self.calibration_rows, _CALIBRATION_BATCH
                ),
                predict=predict,
                timing=self._timing(package, paths["dataset"]),
            ),
            judge,
            list(METHODS) if self.candidates is None else self.candidates,
            rules=Rules(
                min_speedup=self.min_speedup, max_slowdown=self.max_slowdown, min_shrink=self.min_shrink
            ),
            rounds=self.rounds,
            seconds=self.timing_s,
            threads=self.threads,
            seed=self.seed,
            check_stop=run.check_stop,
        )
        for candidate in found.candidates[1:]:
            log.info("%s: %s (%s)", candidate.name, candidate.verdict, candidate.reason)
        model = self._package(run, package, paths, infos, found, judge)
        known = overlap(package, paths["dataset"], infos["dataset"]) if card.refit else None
        summary = _summary(found, judge.metric, card, known)
        report = self._report(run, found, judge, rows, card, summary)
        return Result(
            summary=summary,
            artifacts={"model": model, "report": report},
            values={"chosen": found.chosen, "reason": found.reason},
            metrics=_metrics(found),
        )

    # -- what goes in ----------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        bounds = {
            "max_loss": (0.0 if self.max_loss is None else self.max_loss, 0, "at least 0"),
            "min_speedup": (self.min_speedup, 1, "at least 1"),
            "max_slowdown": (self.max_slowdown, 0, "at least 0"),
            "min_shrink": (self.min_shrink, 1, "at least 1"),
            "timing_s": (self.timing_s, 0, "at least 0"),
            "calibration_rows": (self.calibration_rows, 1, "at least 1"),
            "batch_rows": (
                min(self.batch_rows, default=0),
                1,
                "some batch sizes of at least 1, such as [1, 256]",
            ),
            "threads": (self.threads, 1, "at least 1"),
        }
        for name, (value, smallest, expected) in bounds.items():
            if not value >= smallest:
                raise BadConfiguration(f"{name}={getattr(self, name)!r}: expected {expected}.")

    def _usable(self, name: str, path: Path, package: ModelPackage) -> DatasetInfo:
        from lepton_airflow.evaluation.rows import check_features

        info = read_info(path)
        if info.split == "test":
            raise BadConfiguration(
                f"{name} is the test split: a model that was chosen on these rows could not be evaluated on them any more. "
                f"Pass prepare.output[{'train' if name == 'calibration' else 'valid'!r}]."
            )
        check_features(package.card, path, info, "the model")
        return info

    def _judge(self, package: ModelPackage, rows: EvaluationRows, path: Path) -> Judge:
        from lepton_airflow.packaging.compression.quality import Judge
        from lepton_airflow.statistics.catalogue import JUDGED_BY, METRICS, metrics_of

        names = metrics_of(package.card.task)
        metric = self.metric or JUDGED_BY[package.card.task]
        if metric not in names:
            raise BadConfiguration(
                f"metric={metric!r} is not one of {package.card.task}; {did_you_mean(metric, names)}"
            )
        judge = Judge(
            y=rows.y,
            metric=metric,
            max_loss=_DEFAULT_LOSS if self.max_loss is None else self.max_loss,
            clusters=rows.clusters,
            confidence=self.confidence,
            threshold=self.threshold,
            seed=self.seed,
        )
        if self.max_loss is None and METRICS[metric].scale == "target":
            judge = replace(judge, max_loss=_DEFAULT_LOSS * judge.value(package.predict_parquet(path)).value)
        return judge

    def _timing(self, package: ModelPackage, path: Path) -> Feeds:
        """By batch size, feeds of real rows; where the dataset has too few, they come again."""
        import numpy as np

        from lepton_airflow.packaging.session import parquet_feeds

        parts = list(parquet_feeds(path, package.card.features, _TIMED_ROWS, _TIMED_ROWS))
        sample = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        present = len(next(iter(sample.values())))
        feeds: Feeds = {}
        for batch in self.batch_rows:
            turns = max(4, min(64, _TIMED_ROWS // batch))
            places = [np.arange(number * batch, (number + 1) * batch) % present for number in range(turns)]
            feeds[batch] = [{name: values[place] for name, values in sample.items()} for place in places]
        return feeds

    # -- what comes out --------------------------------------------------------------------------------------------

    def _package(
        self,
        run: RunInfo,
        package: ModelPackage,
        paths: Mapping[str, Path],
        infos: Mapping[str, DatasetInfo],
        found: Comparison,
        judge: Judge,
    ) -> Artifact:
        """The package to go on with: the one that was given, or a new one beside it that says where it comes from."""
        from lepton_airflow.packaging.package import write_package

        given = _sha256(run, self.model)
        if found.chosen == "fp32":
            return Artifact(pin(split_pin(self.model)[0], given), given, digest_path(package.path)[1])
        profile = package.path / "profile.json"
        folder = run.workdir / "model"
        write_package(
            folder,
            found.models[found.chosen],
            self._card(run, package.card, infos, found, judge),
            profile=profile if profile.exists() else None,
            rows=_touched_rows(package, paths),
        )
        return run.save("model", folder)

    def _card(
        self,
        run: RunInfo,
        card: ModelCard,
        infos: Mapping[str, DatasetInfo],
        found: Comparison,
        judge: Judge,
    ) -> ModelCard:
        """The card of the chosen candidate: the original's, with what was read and measured to make and choose it."""
        import numpy as np

        from lepton_airflow.packaging.card import Touched

        original = found.candidates[0]
        chosen = next(c for c in found.candidates if c.name == found.chosen)
        assert original.graph is not None
        assert chosen.graph is not None
        assert chosen.quality is not None
        assert chosen.difference is not None
        digests = {"calibration": _sha256(run, self.calibration), "dataset": _sha256(run, self.dataset)}
        scale = 1.0 if card.task == "classification" else float(np.std(np.asarray(judge.y))) or 1.0
        return replace(
            card,
            touched=[*card.touched, *(Touched.by("calibration", digests[n], infos[n]) for n in infos)],
            parity={
                "difference": chosen.difference / scale,
                "tolerance": None,  # the metric decides, not the single prediction
                "unit": "probability"
                if card.task == "classification"
                else "standard deviations of the target",
                "rows": infos["dataset"].rows,
                "tried": ["the package it was made from"],
            },
            quantization={
                "method": chosen.name,
                "of": _sha256(run, self.model),
                "calibration": digests["calibration"],
                "calibration_rows": min(self.calibration_rows, infos["calibration"].rows),
                "dataset": digests["dataset"],
                "quality": asdict(chosen.quality),
                "max_loss": judge.max_loss,
                "ops_before": original.graph.ops,
                "ops_after": chosen.graph.ops,
            },
            versions=card.versions | versions(type(self)),
        )

    def _report(
        self,
        run: RunInfo,
        found: Comparison,
        judge: Judge,
        rows: EvaluationRows,
        card: ModelCard,
        summary: str,
    ) -> Artifact:
        from lepton_airflow.packaging.compression import report
        from lepton_airflow.packaging.compression.convert import cpu_flags

        record = {
            "summary": summary,
            "chosen": found.chosen,
            "reason": found.reason,
            "candidates": [asdict(c) for c in found.candidates],
            "rules": {
                "metric": judge.metric,
                "positive_class": card.schema.positive_class,
                "threshold": self.threshold,
                "max_loss": judge.max_loss,
                "min_speedup": self.min_speedup,
                "max_slowdown": self.max_slowdown,
                "min_shrink": self.min_shrink,
            },
            "machine": {
                "cpu": cpu_model(),
                "flags": cpu_flags(),
                "threads": self.threads,
                "rounds": self.rounds,
                "timing_s": self.timing_s,
            },
            "model": {"sha256": _sha256(run, self.model)},
            "calibration": {"sha256": _sha256(run, self.calibration), "rows": self.calibration_rows},
            "dataset": {
                "sha256": _sha256(run, self.dataset),
                "rows": len(rows.y),
                "time_range": rows.info.time_range,
                "cluster_column": rows.cluster_column,
            },
            "versions": versions(type(self)),
        }
        folder = run.workdir / "report"
        folder.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "quantization.json").write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(report.render(record, found), encoding="utf-8")
        return run.save("report", folder)


def _sha256(run: RunInfo, uri: str) -> str:
    return split_pin(uri)[1] or run.store.digest(uri)


def _touched_rows(package: ModelPackage, paths: Mapping[str, Path]) -> NDArray[np.uint64] | None:
    """The fingerprints of the rows that the model had touched and of those that quantizing read.

    None when times tell, or when the rows that were read lack the ids by which the model knows its own.
    """
    import numpy as np

    from lepton_airflow.packaging.touched import id_fingerprints, row_fingerprints

    card, ids = package.card, package.card.row_identity
    if package.rows is None or (ids and any(read_info(path).id_columns != ids for path in paths.values())):
        return None
    read = [
        id_fingerprints(path, ids) if ids else row_fingerprints(path, card.features, card.target)
        for path in paths.values()
    ]
    return np.unique(np.concatenate([package.rows, *read]))


def _summary(found: Comparison, metric: str, card: ModelCard, known: str | None) -> str:
    from lepton_airflow.statistics.catalogue import METRICS

    positive = card.schema.positive_class
    told = positive is not None and METRICS[metric].of_positive
    about = f" The positive class is {brief(positive)}." if told else ""
    if known:
        about += f" The model was fitted again on rows that this was judged on, so on others it may lose more: {known}"
    if found.chosen == "fp32":
        return f"{found.reason[0].upper()}{found.reason[1:]}.{about}"
    return f"Chose {found.chosen}: {found.reason}.{about}"


def _metrics(found: Comparison) -> dict[str, float | None]:
    """Of the model to go on with, and of the original where it differs."""
    original = found.candidates[0]
    chosen = next(c for c in found.candidates if c.name == found.chosen)
    assert original.quality is not None
    assert chosen.quality is not None
    assert chosen.bytes is not None
    assert original.bytes is not None
    quality = chosen.quality
    metrics: dict[str, float | None] = {
        "speedup": chosen.speedup if chosen.latency else None,
        "size_ratio": chosen.bytes / original.bytes,
        quality.metric: quality.value,
        f"{quality.metric}_low": quality.low,
        f"{quality.metric}_high": quality.high,
        f"fp32_{quality.metric}": original.quality.value,
        "difference": quality.difference,
        "difference_low": quality.difference_low,
        "difference_high": quality.difference_high,
    }
    for prefix, candidate in (("", chosen), ("fp32_", original)):
        metrics |= {f"{prefix}p50_us_batch_{item.batch}": item.p50_us for item in candidate.latency}
    return metrics
