"""TuneModel: rows in, the best hyperparameters out."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, digest_of, split_pin
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    LeptonError,
    Preempted,
    StoreError,
    brief,
    require,
)
from lepton_airflow.sdk.closure import package_digest
from lepton_airflow.sdk.fingerprint import versions
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, ConnectionId, Result, RunInfo, Stage
from lepton_airflow.store.identity import identity_of

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from lepton_airflow.training.search import Scorer, Workers
    from lepton_airflow.training.study import StudyFile
    from lepton_airflow.training.trainer import Trainer

log = logging.getLogger(__name__)

_HOPELESS_TRIALS = 3


@dataclass(kw_only=True)
class TuneModel(Stage):
    """Search hyperparameters by cross-validation, in a study with which the next try of a killed run goes on.

    The objective is the mean of the metric over ``folds`` held-out parts. Sampling is TPE (Bergstra et al. 2011). A trial is
    pruned if its mean over the folds so far is worse than the median of earlier trials at that fold.

    The study is named after the run key and a digest of what is tuned, in a database after the store, too. So changed data or
    another space start a new study; a larger ``trials`` continues the old one, a smaller one begins anew. After a kill, finished
    trials count, and trials that were running are run again with their parameters, unless the copy of the study in a remote store
    does not have these yet. With one worker the result is that of a search that nobody stopped.

    Returns the value ``best`` (hyperparameters for TrainModel, the fixed ones included), and the artifacts ``trials``
    (JSON), ``history`` and ``importance`` (PNG; the latter needs four finished trials and two parameters).

    :param dataset: training rows, as PrepareData writes them.
    :param trainer: a name from ``lepton_airflow.models``, or ``module:function`` (contract: ``lepton_airflow.training``).
    :param search_space: what to search, as ``lepton_airflow.training.search`` describes; None: the model's own space.
    :param hyperparameters: fixed ones, not searched.
    :param metric: the metric to optimise (log_loss, roc_auc, brier, … or rmse, mae, r2); None: log_loss or rmse.
    :param folds: parts of the cross-validation, at least 2.
    :param fold_by: ``row``: at random, stratified by class, whole clusters together; ``time``: train on the past only.
    :param trials: ends after this many finished trials, over all tries of this run; pruned and failed ones count [trials].
    :param timeout_s: start no more work after this time, over all tries of this run, once one trial is complete [s].
    :param workers: trials at the same time, each in its own process [processes].
    :param storage: Optuna storage URL without a password; None: a file in the store, to which it is copied after every trial
        if the store is no local directory.
    :param storage_connection: Airflow Connection of the database to use as storage, instead of ``storage``.
    :param pruner: ``median``, or ``none`` to run every fold of every trial.
    :param max_rows: tune on a random sample of this many rows, and a row of each class that it lacks [rows].
    :param seed: seeds folds, fits and, by trial number, the sampler; with several workers the result also depends on the
        order in which trials finish.
    :param threads: CPU threads per worker [threads].
    """

    dataset: ArtifactUri
    trainer: CodeRef = "hist_gradient_boosting"
    search_space: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    folds: int = 5
    fold_by: Literal["row", "time"] = "row"
    trials: int = 20
    timeout_s: float | None = None
    workers: int = 1
    storage: str | None = None
    storage_connection: ConnectionId | None = None
    pruner: Literal["median", "none"] = "median"
    max_rows: int | None = None
    seed: int = 0
    threads: int = 1

    resumable: ClassVar[bool] = True
    windowed: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("optuna", "scikit-learn", "torch", "numpy")
    extra: ClassVar[str] = "tune"
    outputs: ClassVar[tuple[str, ...]] = ("best", "trials", "history", "importance")

    def run(self, run: RunInfo) -> Result:
        """Search until the budget of trials or time is spent."""
        for library in ("optuna", "scikit-learn", "pandas", "pyarrow", "matplotlib", "SQLAlchemy"):
            require(library, "TuneModel", self.extra)
        import optuna

        from lepton_airflow import models
        from lepton_airflow.statistics.catalogue import METRICS
        from lepton_airflow.training.search import Workers
        from lepton_airflow.training.study import StudyFile, open_study

        self._check_parameters()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        scorer = self._scorer(run)
        trainer = models.find(self.trainer, scorer.rows.schema.task)
        space = self._space(trainer)
        name = f"{run.run_key}-{self._tuned(run, trainer, scorer.metric, space)[:12]}"
        in_store = not self.storage and not self.storage_connection
        if not in_store:  # two Airflows with a store each may share the database, and have equal run keys
            name = f"{identity_of(run.store)[:12]}-{name}"
        with StudyFile.of(run, name) if in_store else nullcontext() as file:
            url = file.url if file else self._storage_url(run)
            study = open_study(
                url,
                name,
                maximize=METRICS[scorer.metric].higher_is_better,
                prune=self.pruner == "median",
                anew=run.refresh,
                # A task that was cleared to do fewer comes to what it would have come to at first.
                most=self.trials,
            )
            with Workers(scorer, self.workers, run.should_stop) as workers:
                search = _Search(self, run, study, space, workers, scorer.metric, file)
                search.take_up()
                search.go()
            study.set_user_attr("finished", True)
            if file and not file.keep(search.done):
                raise StoreError(
                    f"the finished study could not be brought to the store {run.store.root}, see the warning above: the next try "
                    "goes on from what is there."
                )
        return self._result(run, study, scorer, list(space))

    def _check_parameters(self) -> None:
        for name in ("trials", "workers", "threads"):
            if getattr(self, name) < 1:
                raise BadConfiguration(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.max_rows is not None and self.max_rows < 1:
            raise BadConfiguration(f"max_rows={self.max_rows}: expected at least 1, or null for all rows.")

    def _scorer(self, run: RunInfo) -> Scorer:
        """Make what scores a trial; rows and folds are made at once, so that a study is begun only if they can be."""
        from lepton_airflow import models
        from lepton_airflow.training.search import Scorer

        scorer = Scorer(
            path=run.fetch(self.dataset),
            trainer=self.trainer,
            find=models.find,
            metric="",
            folds=self.folds,
            fold_by=self.fold_by,
            seed=self.seed,
            threads=self.threads,
            max_rows=self.max_rows,
        )
        scorer.metric = self._metric(scorer.rows.schema.task)
        _ = scorer.fold_rows
        return scorer

    def _space(self, trainer: Trainer) -> dict[str, BaseDistribution]:
        """Check what is searched: the trainer must know it, and it must not be fixed, too."""
        from lepton_airflow.training.search import distributions

        trainer.complete(self.hyperparameters)
        space = distributions(self.search_space or trainer.search_space, trainer)
        for name in space:
            if name in self.hyperparameters:
                raise BadConfiguration(
                    f"{name!r} is fixed in hyperparameters and searched in search_space; keep one."
                )
        return space

    def _tuned(
        self, run: RunInfo, trainer: Trainer, metric: str, space: Mapping[str, BaseDistribution]
    ) -> str:
        """A digest of all that a study is about, so that each has its own."""
        return digest_of(
            [
                [
                    split_pin(self.dataset)[1] or run.store.digest(self.dataset),
                    self.trainer,
                    trainer.code,
                    self.hyperparameters,
                ],
                [package_digest("lepton_airflow.training.search"), versions(type(self))],
                [metric, self.folds, self.fold_by, self.max_rows, self.seed, self.pruner],
                {k: [type(d).__name__, vars(d)] for k, d in space.items()},
            ]
        )

    def _metric(self, task: str) -> str:
        from lepton_airflow.statistics.catalogue import TUNED_BY, check_metric_names, metrics_of

        name = self.metric or TUNED_BY[task]
        check_metric_names([name])
        fitting = metrics_of(task)
        if name not in fitting:
            raise BadConfiguration(f"metric={name!r} does not fit {task}: use one of {', '.join(fitting)}.")
        return name

    def _storage_url(self, run: RunInfo) -> str:
        from lepton_airflow.training.study import checked_url, connection_url

        if self.storage and self.storage_connection:
            raise BadConfiguration("storage and storage_connection both name a storage; keep one.")
        if self.storage_connection:
            return connection_url(run.connection(self.storage_connection))
        return checked_url(self.storage or "")

    def _result(self, run: RunInfo, study: optuna.Study, scorer: Scorer, names: list[str]) -> Result:
        from lepton_airflow.statistics.catalogue import METRICS
        from lepton_airflow.training.study import finished
        from lepton_airflow.training.study_plots import importances, plot_history, plot_importance

        metric, positive = scorer.metric, scorer.rows.schema.positive_class
        told = positive is not None and METRICS[metric].of_positive
        # Numbered among themselves: Optuna also numbers the trials that a stop has cut short, which were run again.
        trials = [t for t in study.get_trials(deepcopy=False) if finished(t)]
        counts = {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED")}
        failed = sum("error" in t.user_attrs for t in trials)
        best = study.best_trial
        best_number = [t.number for t in trials].index(best.number)
        listed = [
            {
                "number": number,
                "state": t.state.name.lower(),
                "value": t.value if t.state.name == "COMPLETE" else None,
                "hyperparameters": t.params,
                "folds": t.user_attrs.get("folds", []),
                "seconds": round(t.duration.total_seconds(), 3) if t.duration else None,
            }
            | ({"error": t.user_attrs["error"]} if "error" in t.user_attrs else {})
            for number, t in enumerate(trials)
        ]
        report = {
            "study": study.study_name,
            "metric": metric,
            "positive_class": positive,
            "direction": study.direction.name.lower(),
            "best": best_number,
            "trials": listed,
        }
        maximize = study.direction.name == "MAXIMIZE"
        history = plot_history(trials, metric, run.workdir / "history.png", maximize=maximize)
        artifacts: dict[str, Artifact] = {
            "trials": run.save("trials.json", json.dumps(report, indent=1, ensure_ascii=False)),
            "history": run.save("history.png", history),
        }
        importance = importances(study, self.seed) if len(names) > 1 else {}
        if importance:
            path = plot_importance(importance, metric, run.workdir / "importance.png")
            artifacts["importance"] = run.save("importance.png", path)
        else:
            log.info(
                "importance is not drawn: it needs two parameters and four complete trials of different value"
            )
        return Result(
            f"Best {metric} {best.value:.5g} (mean of {self.folds} folds) in trial {best_number} of {self.trainer}; "
            f"{counts['COMPLETE']} trials complete, {counts['PRUNED']} pruned, {failed} failed."
            + (f" The positive class is {brief(positive)}." if told else ""),
            artifacts,
            values={"best": {**self.hyperparameters, **best.params}},
            metrics={
                f"best_{metric}": best.value,
                "trials_complete": float(counts["COMPLETE"]),
                "trials_pruned": float(counts["PRUNED"]),
                "trials_failed": float(failed),
            },
        )


@dataclass
class _Running:
    """A trial that has not run through all folds yet."""

    trial: optuna.Trial
    number: int
    hyperparameters: dict[str, Any]
    values: list[float] = field(default_factory=list)


@dataclass
class _Search:
    """The search. Only this process writes the study, so that no trial is counted or run twice."""

    stage: TuneModel
    run: RunInfo
    study: optuna.Study
    space: dict[str, BaseDistribution]
    workers: Workers
    metric: str
    file: StudyFile | None = None
    running: dict[Future[float], _Running] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    spent_before: float = 0.0

    def take_up(self) -> None:
        """Go on from an earlier try: count the time of its finished trials, and queue those that were running."""
        from optuna.trial import TrialState

        from lepton_airflow.training.study import finished

        trials = self.study.get_trials(deepcopy=False)
        seconds = [t.duration.total_seconds() for t in trials if t.duration and finished(t)]
        self.spent_before = sum(seconds) / self.workers.count
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
                if "error" not in trial.user_attrs and trial.params.keys() == self.space.keys():
                    self.study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number})
        if trials:
            log.info("study %s is taken up with %d finished trials", self.study.study_name, self.done)

    @property
    def done(self) -> int:
        """How many trials count against the budget."""
        from lepton_airflow.training.study import finished

        return sum(map(finished, self.study.get_trials(deepcopy=False)))

    def go(self) -> None:
        """Run trials until the budget is spent."""
        while True:
            self.run.check_stop()
            while len(self.running) < self.workers.count and self._may_start():
                self._start()
            if not self.running or self._hopeless():
                break
            self._await_one()
        if not self._complete():
            errors = [t.user_attrs["error"] for t in self.study.get_trials() if "error" in t.user_attrs]
            raise BadInput(
                f"none of {self.done} trials gave a value; the last one: {errors[-1] if errors else 'pruned'}. Change the "
                "search_space or the hyperparameters."
            )

    def _complete(self) -> bool:
        return any(t.state.name == "COMPLETE" for t in self.study.get_trials(deepcopy=False))

    def _hopeless(self) -> bool:
        """Whether the first few trials all failed, so that the others would, too."""
        from lepton_airflow.training.study import finished

        done = [t for t in self.study.get_trials(deepcopy=False) if finished(t)]
        return len(done) >= _HOPELESS_TRIALS and all("error" in t.user_attrs for t in done)

    def _out_of_time(self) -> bool:
        limit = self.stage.timeout_s
        return limit is not None and self._spent() >= limit and self._complete()

    def _spent(self) -> float:
        return self.spent_before + time.monotonic() - self.started

    def _may_start(self) -> bool:
        return self.done + len(self.running) < self.stage.trials and not self._out_of_time()

    def _start(self) -> None:
        import optuna

        # Seeded by the number of trials: a sampler that is seeded once would repeat its first parameters after a kill. Those
        # that a stop has cut short do not count, or the search would go on with others than if nobody had stopped it.
        number = self.done + len(self.running)
        digest = hashlib.sha256(f"{self.stage.seed}/{number}".encode()).digest()
        self.study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"))
        trial = self.study.ask(self.space)
        running = _Running(trial, number, {**self.stage.hyperparameters, **trial.params})
        self._next_fold(running)

    def _next_fold(self, running: _Running) -> None:
        future = self.workers.submit(running.hyperparameters, len(running.values))
        self.running[future] = running

    def _await_one(self) -> None:
        """Handle the results that are there, after at most half a second."""
        from concurrent.futures.process import BrokenProcessPool

        done, _ = concurrent.futures.wait(
            self.running, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in sorted(done, key=lambda f: self.running[f].number):
            running = self.running.pop(future)
            try:
                value = future.result()
            except (Preempted, BadConfiguration):
                raise
            except BrokenProcessPool:
                self.run.check_stop()
                raise LeptonError(
                    f"a worker process ended in trial {running.number} (out of memory, or killed): a retry goes on "
                    "from the finished trials; set fewer workers or max_rows."
                ) from None
            except Exception as error:  # noqa: BLE001  hyperparameters that cannot be fitted end their trial only
                self.run.check_stop()  # the signal came to its process, too: no verdict on the hyperparameters
                own = isinstance(error, LeptonError)  # its message is a whole sentence
                self._fail(running, str(error) if own else f"{type(error).__name__}: {error}")
                continue
            self._advance(running, value)

    def _advance(self, running: _Running, value: float) -> None:
        from optuna.trial import TrialState

        if not math.isfinite(value):
            self.run.check_stop()
            self._fail(running, f"{self.metric} is {value} on fold {len(running.values) + 1}")
            return
        running.values.append(value)
        mean = math.fsum(running.values) / len(running.values)
        running.trial.report(mean, step=len(running.values) - 1)
        running.trial.set_user_attr("folds", running.values)
        if len(running.values) == self.stage.folds:
            self.study.tell(running.trial, mean)
            self._progress(running, f"{self.metric} {mean:.5g}")
        elif self._out_of_time():  # neither finished nor failed: it does not count
            self.study.tell(running.trial, state=TrialState.FAIL)
            self._progress(running, "cut short, the time is spent")
        elif running.trial.should_prune():
            self.study.tell(running.trial, state=TrialState.PRUNED)
            self._progress(running, f"pruned after fold {len(running.values)} at {self.metric} {mean:.5g}")
        else:
            self._next_fold(running)

    def _fail(self, running: _Running, text: str) -> None:
        from optuna.trial import TrialState

        running.trial.set_user_attr("error", text[:500])
        self.study.tell(running.trial, state=TrialState.FAIL)
        self._progress(running, f"failed: {text[:300]}")

    def _progress(self, running: _Running, outcome: str) -> None:
        done = self.done
        if self.file:
            self.file.keep(done)
        best = f"{self.study.best_value:.5g}" if self._complete() else "none yet"
        left = self._spent() / max(done, 1) * max(self.stage.trials - done, 0)
        if self.stage.timeout_s is not None:
            left = min(left, max(self.stage.timeout_s - self._spent(), 0.0))
        log.info(
            "trial %d (%d of %d): %s; best %s; about %.0f s left; %s",
            running.number,
            done,
            self.stage.trials,
            outcome,
            best,
            left,
            running.trial.params,
        )
