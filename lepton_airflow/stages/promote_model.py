"""Decide whether a candidate becomes champion, and move the champion."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, brief, require
from lepton_airflow.registry.champion import show
from lepton_airflow.registry.ledger import (
    Ledger,
    LedgerEntry,
    Registration,
    check_model_name,
    find_version,
    is_newer,
)
from lepton_airflow.registry.mlflow import resolve_tracking
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ArtifactUri, ConnectionId, Result, RunInfo, Stage
from lepton_airflow.store.files import now

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lepton_airflow.packaging.package import ModelPackage

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PromoteModel(Stage):
    """Judge a candidate against the champion and move the champion when the candidate is better beyond chance.

    Both models score the same rows, which neither may have touched in training, tuning or calibration, and a paired
    test judges the difference. The decision is one of

    - ``bootstrap``: there is no champion yet, the candidate becomes the first;
    - ``promote``: the whole confidence interval of the difference lies above ``min_effect``;
    - ``reject``: the whole interval lies below zero;
    - ``hold``: neither; or the candidate is the champion; or its package was champion and was rolled back; or the
      champion was trained on newer data; or the champion has touched these rows, so that the comparison would flatter it.

    ``bootstrap`` and ``promote`` move the champion: a numbered record in the store's ledger, made once however often
    the task runs and however many tasks run at the same time. The MLflow aliases ``champion`` and ``previous`` follow
    it. In a backfill nothing moves unless ``on_backfill="full"``. A task instance moves the champion to a package once:
    not again when it is cleared, even if others have moved the champion since.

    Returns the artifact ``evidence`` (JSON) and the values ``decision``, ``moved``, ``reason``, and ``champion`` and
    ``previous``: the versions after this task, or None.

    :param name: name of the registered model.
    :param dataset: rows to judge on, a split such as ``prepare.output["test"]``.
    :param version: the candidate, ``register.output["version"]``; None: the one that the alias ``candidate`` means.
    :param metric: what to compare; None: ``roc_auc`` for classification, ``rmse`` for regression.
    :param confidence: level of the intervals [0 to 1].
    :param min_effect: the difference that the interval must exceed [of the metric]; negative: a margin of tolerance.
    :param cluster_column: column that names dependent rows; None: the one the dataset names, if any.
    :param threshold: probability of the positive class from which on it is predicted, for accuracy, precision, recall and F1.
    :param resamples: bootstrap resamples for the interval of each model's own metric.
    :param seed: of these resamples; the paired test uses no random numbers.
    :param allow_rolled_back: judge the candidate also when its package was champion, and RollbackModel has taken it out.
    :param on_backfill: in a backfill, ``register_only`` judges and moves nothing, ``skip`` does nothing, ``full`` moves.
    :param tracking_uri: MLflow as a database, ``sqlite:////data/mlflow.db``, or as a server, ``http://host:5000``.
    :param mlflow: id of an Airflow Connection to an MLflow server; use it instead of ``tracking_uri`` with credentials.
    :raises BadConfiguration: the candidate has touched the rows, or its task, target or classes are not the champion's.
    :raises BadInput: the rows cannot decide: too few, one class, labels that the models do not know.
    :raises IntegrityError: a package does not have the digest that it was registered with.
    """

    cacheable: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("mlflow-skinny", "onnxruntime", "scipy")
    extra: ClassVar[str] = "evaluate,register"
    links: ClassVar[tuple[str, ...]] = ("mlflow",)
    outputs: ClassVar[tuple[str, ...]] = ("evidence", "decision", "moved", "reason", "champion", "previous")

    name: str
    dataset: ArtifactUri
    version: int | None = None
    metric: str | None = None
    confidence: float = 0.95
    min_effect: float = 0.0
    cluster_column: str | None = None
    threshold: float = 0.5
    resamples: int = 1000
    seed: int = 0
    allow_rolled_back: bool = False
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"
    tracking_uri: str | None = None
    mlflow: ConnectionId | None = None

    def run(self, run: RunInfo) -> Result:
        for library in self.engines:
            require(library, "PromoteModel", self.extra)
        check_model_name(self.name)
        may_move = backfill.may_act(run, self.on_backfill, f"model {self.name!r} is not judged")
        candidate = find_version(run.store, self.name, self.version)
        connection = run.connection(self.mlflow) if self.mlflow else None
        resolve_tracking(self.tracking_uri, connection)  # a wrong one is refused before anything is judged
        finding, evidence, moved = _moved_before(run, candidate) or self._decide(run, candidate, may_move)
        shown = show(run, self.name, candidate.version, self.tracking_uri, connection)
        reason = finding.sentence
        if finding.decision in ("bootstrap", "promote") and not moved:
            reason += f" The champion stays: {backfill.reason(self.on_backfill)}"
        return Result(
            summary=reason,
            artifacts={"evidence": evidence},
            values={
                "decision": finding.decision,
                "moved": moved,
                "reason": reason,
                "champion": shown.champion,
                "previous": shown.previous,
            },
            metrics=finding.metrics,
            links={"mlflow": shown.link} if shown.link else {},
        )

    def _decide(
        self, run: RunInfo, candidate: Registration, may_move: bool
    ) -> tuple[_Finding, Artifact, bool]:
        """Judge, and move the champion if the decision says so; start again when another task has moved it meanwhile."""
        ledger = Ledger(run.store, self.name)
        bench = _Bench(self, run, candidate)
        while True:
            run.check_stop()
            champion = ledger.newest()
            # The same task instance may run twice. The ledger was read before this: if it moves later, ours is not appended.
            before = _moved_before(run, candidate)
            if before:
                return before
            finding = bench.judge(champion)
            moves = may_move and finding.decision in ("bootstrap", "promote")
            evidence = run.save("evidence.json", self._evidence(run, bench, champion, finding, moves))
            if not moves:
                return finding, evidence, False
            entry = LedgerEntry(
                name=self.name,
                sequence=champion.sequence + 1 if champion else 1,
                action=finding.decision,
                version=candidate.version,
                package=candidate.package,
                previous=champion.version if champion else None,
                run_key=run.run_key,
                sentence=finding.sentence,
                window=candidate.window,
                evidence=evidence.uri,
                identity=asdict(run.identity),
                decided=now(),
            )
            if ledger.append(entry):
                return finding, evidence, True
            log.info("another task moved the champion of %s in the meantime: judging again", self.name)

    def _evidence(
        self, run: RunInfo, bench: _Bench, champion: LedgerEntry | None, finding: _Finding, moves: bool
    ) -> str:
        def side(record: Registration | LedgerEntry | None) -> dict[str, Any] | None:
            if record is None:
                return None
            return {"version": record.version, "package": record.package, "window": record.window}

        rows = bench.rows
        record = {
            "model": self.name,
            "decision": finding.decision,
            "moves": moves,
            "sentence": finding.sentence,
            "candidate": side(bench.candidate),
            "champion": side(champion),
            "comparison": finding.comparison,
            "metrics": finding.metrics,
            "positive_class": bench.package.card.schema.positive_class,
            "dataset": {
                "uri": self.dataset,
                "sha256": split_pin(self.dataset)[1] or run.store.digest(self.dataset),
                "time_range": rows.info.time_range,
                "rows": len(rows.y),
                "cluster_column": rows.cluster_column,
            },
            "run": asdict(run.identity),
            "on_backfill": self.on_backfill,
        }
        return json.dumps(record, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class _Finding:
    decision: str
    sentence: str
    metrics: dict[str, float | None] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None


class _Bench:
    """The rows and the candidate's scores on them: computed once, also when the champion changes meanwhile."""

    def __init__(self, stage: PromoteModel, run: RunInfo, candidate: Registration) -> None:
        from lepton_airflow.evaluation.rows import load_rows
        from lepton_airflow.packaging.package import ModelPackage
        from lepton_airflow.packaging.touched import overlap
        from lepton_airflow.statistics.catalogue import JUDGED_BY

        self.stage = stage
        self.run = run
        self.candidate = candidate
        self.path = run.fetch(stage.dataset)
        self.package = ModelPackage.open(run.fetch(candidate.package))
        who = f"candidate version {candidate.version} of {stage.name!r}"
        self.rows = load_rows(self.path, self.package.card, stage.cluster_column, who=who)
        touched = overlap(self.package, self.path, self.rows.info)
        if touched:
            raise BadConfiguration(
                f"version {candidate.version} of {stage.name!r} may not be judged on this dataset: "
                f"{touched} Pass rows that it has not seen, such as prepare.output['test']."
            )
        self.judged: NDArray[np.bool_] | slice = slice(None)  # the rows that the champion has not touched
        self.metric = stage.metric or JUDGED_BY[self.package.card.task]
        self.scores = self._scores(self.package)

    def judge(self, champion: LedgerEntry | None) -> _Finding:
        """The decision about the candidate as long as this one is champion."""
        from lepton_airflow.packaging.package import ModelPackage
        from lepton_airflow.statistics.catalogue import METRICS

        metrics = self._interval("candidate", self.scores)
        if champion is None:
            value, low, high = metrics.values()
            sentence = (
                f"bootstrap: {self.stage.name} has no champion yet, so version {self.candidate.version} is the first; its "
                f"{METRICS[self.metric].title} is {value:.3f} [{low:.3f}, {high:.3f}] on {len(self.rows.y):,} rows."
                f"{self._positive_text()}"
            )
            return _Finding("bootstrap", sentence, metrics)
        if champion.sha256 == self.candidate.sha256:
            same = (
                "is"
                if champion.version == self.candidate.version
                else f"has the same package as version {champion.version},"
            )
            sentence = f"hold: version {self.candidate.version} {same} the champion already."
            return _Finding("hold", sentence, metrics)
        taken_out = Ledger(self.run.store, self.stage.name).taken_out(self.candidate.sha256)
        if taken_out and not self.stage.allow_rolled_back:
            same = (
                ""
                if taken_out.previous == self.candidate.version
                else f"has the same package as version {taken_out.previous}, which "
            )
            sentence = (
                f"hold: version {self.candidate.version} {same}was champion and was rolled back: {taken_out.sentence} "
                "(allow_rolled_back=True judges it all the same.)"
            )
            return _Finding("hold", sentence, metrics)
        package = ModelPackage.open(self.run.fetch(champion.package))
        why_not = self._why_not_compared(champion, package)
        if why_not:
            return _Finding("hold", f"hold: champion version {champion.version} {why_not}", metrics)
        try:
            return self._compared(package, metrics)
        except BadInput as error:
            if isinstance(self.judged, slice):
                raise
            sentence = f"hold: the rows that champion version {champion.version} has not touched decide nothing: {error}"
            return _Finding("hold", sentence, metrics)

    def _why_not_compared(self, champion: LedgerEntry, package: ModelPackage) -> str | None:
        """Why these rows cannot decide between the two; raises when the two can never be compared."""
        from lepton_airflow.evaluation.rows import check_features
        from lepton_airflow.packaging.touched import overlap, untouched_by_id

        self._refuse_another_kind(package, champion)
        if is_newer(champion.window, self.candidate.window):
            return (
                f"was trained on newer data ({_span(champion.window)}) than version {self.candidate.version} "
                f"({_span(self.candidate.window)})."
            )
        who = f"champion version {champion.version} of {self.stage.name!r}"
        check_features(package.card, self.path, self.rows.info, who)
        touched = overlap(package, self.path, self.rows.info)
        if not touched:
            self.judged = slice(None)
            return None
        untouched = untouched_by_id(package, self.path, self.rows.info)
        if untouched is None or not untouched.any():
            return f"may not be compared on this dataset, which could flatter it: {touched}"
        self.judged = untouched
        return None

    def _compared(self, champion: ModelPackage, metrics: dict[str, float | None]) -> _Finding:
        """What the paired test says of both models' scores on the same rows."""
        from lepton_airflow.statistics.paired import paired_test, paired_verdict

        stage, rows, judged = self.stage, self.rows, self.judged
        scores = self._scores(champion)
        result = paired_test(
            rows.y[judged],
            scores[judged],
            self.scores[judged],
            metric=self.metric,
            clusters=None if rows.clusters is None else rows.clusters[judged],
            confidence=stage.confidence,
            min_effect=stage.min_effect,
            threshold=stage.threshold,
        )
        verdict = paired_verdict(result)
        sentence = verdict.sentence
        if len(rows.y[judged]) < len(rows.y):
            sentence += f" Judged on the {len(rows.y[judged]):,} of {len(rows.y):,} rows whose ids the champion has not touched."
        metrics |= self._interval("candidate", self.scores, judged) | self._interval(
            "champion", scores, judged
        )
        metrics |= {"rows_judged": len(rows.y[judged])}
        # Of too few rows the interval is infinite, which JSON cannot say.
        comparison = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(result).items()
        }
        metrics |= {
            "difference": result.difference,
            "difference_low": comparison["low"],
            "difference_high": comparison["high"],
        }
        sentence += self._positive_text(champion)
        return _Finding(verdict.decision, sentence, metrics, comparison)

    def _positive_text(self, champion: ModelPackage | None = None) -> str:
        """Which class the metric is about, where it depends on that, and where the champion has another one."""
        from lepton_airflow.statistics.catalogue import METRICS

        mine = self.package.card.schema.positive_class
        theirs = champion.card.schema.positive_class if champion else mine
        if mine != theirs:
            return (
                f" Both are judged by the candidate's positive class {brief(mine)}; the champion was trained with "
                f"{brief(theirs)}."
            )
        told = mine is not None and METRICS[self.metric].of_positive
        return f" The positive class is {brief(mine)}." if told else ""

    def _scores(self, package: ModelPackage) -> NDArray[np.float32]:
        from lepton_airflow.evaluation.rows import columns_like

        scores = package.predict_parquet(self.path)
        return columns_like(scores, package.card.classes, self.package.card.classes)

    def _interval(
        self, who: str, scores: NDArray[np.float32], judged: NDArray[np.bool_] | slice = slice(None)
    ) -> dict[str, float | None]:
        from lepton_airflow.statistics.bootstrap import bootstrap_intervals
        from lepton_airflow.statistics.catalogue import METRICS

        stage, rows = self.stage, self.rows
        found = bootstrap_intervals(
            rows.y[judged],
            scores[judged],
            [self.metric],
            clusters=None if rows.clusters is None else rows.clusters[judged],
            n_resamples=stage.resamples,
            confidence=stage.confidence,
            seed=stage.seed,
            threshold=stage.threshold,
        )
        if self.metric not in found:
            raise BadInput(
                f"{METRICS[self.metric].title} is not defined on these {len(rows.y):,} rows (one class, or a constant target): widen "
                "the window, or pass another metric."
            )
        low, estimate, high = found[self.metric]
        return {
            f"{who}_{self.metric}": estimate,
            f"{who}_{self.metric}_low": low,
            f"{who}_{self.metric}_high": high,
        }

    def _refuse_another_kind(self, champion: ModelPackage, entry: LedgerEntry) -> None:
        mine, theirs = self.package.card, champion.card
        same_classes = sorted(mine.classes, key=repr) == sorted(theirs.classes, key=repr)
        for what in ("task", "target", "classes"):
            # Another positive class is another order of the classes: both models are judged by the candidate's.
            if getattr(mine, what) != getattr(theirs, what) and not (what == "classes" and same_classes):
                raise BadConfiguration(
                    f"{what} of version {self.candidate.version} is {getattr(mine, what)!r}, of the champion (version "
                    f"{entry.version}) it is {getattr(theirs, what)!r}: they cannot be compared. Register the candidate "
                    f"under another name than {self.stage.name!r}."
                )


def _moved_before(run: RunInfo, candidate: Registration) -> tuple[_Finding, Artifact, bool] | None:
    """What this task instance decided when it moved the champion to this package, if it did."""
    for entry in Ledger(run.store, candidate.name).find("run_key", run.run_key):
        if entry.sha256 == candidate.sha256 and entry.evidence:
            path = run.fetch(entry.evidence)
            artifact = Artifact(entry.evidence, split_pin(entry.evidence)[1] or "", path.stat().st_size)
            metrics = json.loads(path.read_bytes())["metrics"]
            return (
                _Finding(entry.action, f"{entry.sentence} (Moved by this task before.)", metrics),
                artifact,
                True,
            )
    return None


def _span(window: Mapping[str, str] | None) -> str:
    return f"{window['start']} to {window['end']}" if window else "window not known"
