"""TuneModel: rows in, the best hyperparameters out."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, digest_of, split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, Preempted, StoreError, require
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, ConnectionId, Result, RunInfo, Stage

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from lepton_airflow.connections import Connection
    from lepton_airflow.store.checkpoints import Checkpoints
    from lepton_airflow.training.search import Workers

log = logging.getLogger(__name__)

_HOPELESS_TRIALS = 3
_STARTUP_TRIALS = 5  # trials before the pruner compares; a median of fewer says little


@dataclass(kw_only=True)
class TuneModel(Stage):
    """Search hyperparameters by cross-validation, in a study that a killed run takes up again.

    The objective is the mean of the metric over ``folds`` held-out parts. Sampling is TPE (Bergstra et al. 2011); a trial
    whose mean over the folds so far is worse than the median of earlier trials at that fold is pruned.

    The study lives in ``storage`` under the run key and a digest of what is being tuned, so changed data or another space
    start a new one, while a larger ``trials`` goes on with the old. After a kill the finished trials stand, and what was
    running is run again: with its parameters, except that a copy in a remote store may not know them yet.

    Returns the value ``best`` (hyperparameters for TrainModel, the fixed ones included), and the artifacts ``trials``
    (JSON), ``history`` and ``importance`` (PNG; the latter from four finished trials and two parameters on).

    :param dataset: training rows, as PrepareData writes them.
    :param trainer: a name from ``lepton_airflow.models``, or ``module:function`` (contract: ``lepton_airflow.training``).
    :param search_space: what to search, as ``lepton_airflow.training.search`` describes; None: the model's own space.
    :param hyperparameters: fixed ones, not searched.
    :param metric: what to make best (log_loss, roc_auc, brier, … or rmse, mae, r2); None: log_loss or rmse.
    :param folds: parts of the cross-validation, at least 2.
    :param fold_by: ``row``: at random, stratified by class, whole clusters together; ``time``: train on the past only.
    :param trials: finished trials (also pruned or failed) after which it ends, over all tries of this run [trials].
    :param timeout_s: stop starting work after so long, over all tries of this run, once one trial is complete [s].
    :param workers: trials at the same time, each in its own process [processes].
    :param storage: Optuna storage URL without a password; None: a file in the store, copied there after every trial where
        the store is no local directory.
    :param storage_connection: Airflow Connection of the database to use as storage, instead of ``storage``.
    :param pruner: ``median``, or ``none`` to run every fold of every trial.
    :param max_rows: tune on a random sample of so many rows [rows].
    :param seed: seeds folds, fits and, by trial number, the sampler; with several workers the order of results counts too.
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
        from lepton_airflow.training.search import Scorer, Workers, distributions

        for name in ("trials", "workers", "threads"):
            if getattr(self, name) < 1:
                raise BadConfiguration(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.max_rows is not None and self.max_rows < 1:
            raise BadConfiguration(f"max_rows={self.max_rows}: expected at least 1, or null for all rows.")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
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
        task = scorer.rows.schema.task
        scorer.metric = metric = self._metric(task)
        _ = scorer.fold_rows  # folds that cannot be made are refused before a study is
        trainer = models.find(self.trainer, task)
        trainer.complete(self.hyperparameters)
        space = distributions(self.search_space or trainer.search_space, trainer)
        for name in space:
            if name in self.hyperparameters:
                raise BadConfiguration(
                    f"{name!r} is fixed in hyperparameters and searched in search_space; keep one."
                )
        tuned = [
            [
                split_pin(self.dataset)[1] or run.store.digest(self.dataset),
                trainer.code,
                self.hyperparameters,
            ],
            [metric, self.folds, self.fold_by, self.max_rows, self.seed],
            {k: [type(d).__name__, vars(d)] for k, d in space.items()},
        ]
        name = f"{run.run_key}-{digest_of(tuned)[:12]}"
        in_store = not self.storage and not self.storage_connection
        with _StudyFile.of(run, name) if in_store else nullcontext() as file:
            study = self._study(run, file.url if file else self._storage_url(run), name, metric)
            with Workers(scorer, self.workers, run.should_stop) as workers:
                search = _Search(self, run, study, space, workers, metric, file)
                search.take_up()
                search.go()
            study.set_user_attr("finished", True)
            if file and not file.keep(search.done):
                raise StoreError(
                    f"the finished study could not be brought to the store {run.store.root}, see the warning above: the next try "
                    "goes on from what is there."
                )
        return self._result(run, study, metric, list(space))

    def _metric(self, task: str) -> str:
        from lepton_airflow.statistics.catalogue import TUNED_BY, check_metric_names, metrics_of

        name = self.metric or TUNED_BY[task]
        check_metric_names([name])
        fitting = metrics_of(task)
        if name not in fitting:
            raise BadConfiguration(f"metric={name!r} does not fit {task}: use one of {', '.join(fitting)}.")
        return name

    def _study(self, run: RunInfo, url: str, name: str, metric: str) -> optuna.Study:
        """The study of this run, made anew when a finished one is to be refreshed."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        from lepton_airflow.statistics.catalogue import METRICS

        shown = url.partition("@")[2] or url  # what follows the password, if there is one
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
        arguments: dict[str, Any] = {
            "study_name": name,
            "direction": "maximize" if METRICS[metric].higher_is_better else "minimize",
            "pruner": pruner if self.pruner == "median" else optuna.pruners.NopPruner(),
            "load_if_exists": True,
        }
        try:
            options = (
                {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
            )
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
            study = optuna.create_study(storage=storage, **arguments)
            if run.refresh and study.user_attrs.get("finished"):
                log.info("a new result was asked for: the finished study %s is made anew", name)
                optuna.delete_study(study_name=name, storage=storage)
                study = optuna.create_study(storage=storage, **arguments)
        except SQLAlchemyError as error:
            raise StoreError(
                f"the study's storage {shown} cannot be used: {str(error.__cause__ or error).splitlines()[0]}. Check that "
                "the database is reachable and may be written to."
            ) from error
        except (ImportError, ValueError) as error:
            raise BadConfiguration(
                f"storage {shown}: {error}. Expected a URL such as postgresql+psycopg2://user@host/database."
            ) from error
        return study

    def _storage_url(self, run: RunInfo) -> str:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        if self.storage and self.storage_connection:
            raise BadConfiguration("storage and storage_connection both name a storage; keep one.")
        if self.storage_connection:
            return _connection_url(run.connection(self.storage_connection))
        storage = self.storage or ""
        try:
            url = make_url(storage)
            url.get_dialect()
        except ArgumentError:
            raise BadConfiguration(
                f"storage={storage!r} is no database URL; expected one such as "
                "postgresql+psycopg2://user@host/database or sqlite:////absolute/path.db."
            ) from None
        if url.password:
            raise BadConfiguration(
                "storage holds a password, which would be kept in the DAG and the receipt: make an Airflow Connection "
                "of it and name that in storage_connection."
            )
        return storage

    def _result(self, run: RunInfo, study: optuna.Study, metric: str, names: list[str]) -> Result:
        trials = study.get_trials(deepcopy=False)
        counts = {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED")}
        failed = sum("error" in t.user_attrs for t in trials)
        best = study.best_trial
        listed = [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "value": t.value if t.state.name == "COMPLETE" else None,
                "hyperparameters": t.params,
                "folds": t.user_attrs.get("folds", []),
                "seconds": round(t.duration.total_seconds(), 3) if t.duration else None,
            }
            | ({"error": t.user_attrs["error"]} if "error" in t.user_attrs else {})
            for t in trials
        ]
        report = {
            "study": study.study_name,
            "metric": metric,
            "direction": study.direction.name.lower(),
            "best": best.number,
            "trials": listed,
        }
        artifacts: dict[str, Artifact] = {
            "trials": run.save("trials.json", json.dumps(report, indent=1, ensure_ascii=False)),
            "history": run.save("history.png", _plot_history(study, metric, run.workdir / "history.png")),
        }
        importance = _importance(study, self.seed) if len(names) > 1 else {}
        if importance:
            path = _plot_importance(importance, metric, run.workdir / "importance.png")
            artifacts["importance"] = run.save("importance.png", path)
        else:
            log.info(
                "importance is not drawn: it needs two parameters and four complete trials of different value"
            )
        return Result(
            f"Best {metric} {best.value:.5g} (mean of {self.folds} folds) in trial {best.number} of {self.trainer}; "
            f"{counts['COMPLETE']} trials complete, {counts['PRUNED']} pruned, {failed} failed.",
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
class _StudyFile:
    """The study as a file in the store; of a store that is no local directory, a copy that goes there after every trial.

    The process of the search alone writes it.
    """

    path: Path
    copies: Checkpoints | None = None

    @classmethod
    @contextmanager
    def of(cls, run: RunInfo, name: str) -> Iterator[_StudyFile]:
        """The file of the study of that name, as the last try left it."""
        if run.store.root.startswith("file://"):
            folder = Path(run.store.root.removeprefix("file://")) / "studies"
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"{folder} cannot be made: {error.strerror}; check that the store is writable."
                ) from error
            yield cls(folder / f"{name}.db")
            return
        from lepton_airflow.store.checkpoints import Checkpoints

        scratch = run.workdir / "study"
        copies = Checkpoints(run.store, f"checkpoints/{run.run_key}/{name}", scratch, 0.0)
        try:
            scratch.mkdir(exist_ok=True)
            file = cls(run.workdir / "study.db", copies)
            file.path.unlink(missing_ok=True)  # of another run in the same folder: what counts is the store
            if found := copies.latest():
                shutil.copyfile(found.path / "study.db", file.path)
            yield file
        finally:
            copies.close()

    @property
    def url(self) -> str:
        """The URL for Optuna."""
        from sqlalchemy.engine import URL

        return URL.create(
            "sqlite", database=str(self.path)
        ).render_as_string()  # which a path may need quoted

    def keep(self, done: int) -> bool:
        """Bring the study to the store as it is now; in vain it costs a warning, and the next trial brings it along."""
        return self.copies is None or self.copies.save(done, self._write, {}, wait=True)

    def _write(self, folder: Path) -> None:
        with (
            closing(sqlite3.connect(self.path)) as study,
            closing(sqlite3.connect(folder / "study.db")) as copy,
        ):
            study.backup(copy)


@dataclass
class _Running:
    """A trial on its way through the folds."""

    trial: optuna.Trial
    hyperparameters: dict[str, Any]
    values: list[float] = field(default_factory=list)


@dataclass
class _Search:
    """The loop: this process alone writes the study, so that no trial can be counted or run twice."""

    stage: TuneModel
    run: RunInfo
    study: optuna.Study
    space: dict[str, BaseDistribution]
    workers: Workers
    metric: str
    file: _StudyFile | None = None
    running: dict[Future[float], _Running] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    spent_before: float = 0.0

    def take_up(self) -> None:
        """Queue again what an earlier try was running when it ended, and count what it finished."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        seconds = [t.duration.total_seconds() for t in trials if t.duration and _finished(t)]
        self.spent_before = sum(seconds) / self.workers.count
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
                if trial.params:
                    self.study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number})
        if trials:
            log.info("study %s is taken up with %d finished trials", self.study.study_name, self.done)

    @property
    def done(self) -> int:
        """Trials that count against the budget."""
        return sum(map(_finished, self.study.get_trials(deepcopy=False)))

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
        """Whether the first few trials all failed, as the rest of them then would."""
        finished = [t for t in self.study.get_trials(deepcopy=False) if _finished(t)]
        return len(finished) >= _HOPELESS_TRIALS and all("error" in t.user_attrs for t in finished)

    def _out_of_time(self) -> bool:
        limit = self.stage.timeout_s
        return limit is not None and self._spent() >= limit and self._complete()

    def _spent(self) -> float:
        return self.spent_before + time.monotonic() - self.started

    def _may_start(self) -> bool:
        return self.done + len(self.running) < self.stage.trials and not self._out_of_time()

    def _start(self) -> None:
        import optuna

        # A sampler seeded once would draw the same first parameters again after a kill; the number of trials goes on.
        trials = len(self.study.get_trials(deepcopy=False))
        digest = hashlib.sha256(f"{self.stage.seed}/{trials}".encode()).digest()
        self.study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"))
        trial = self.study.ask(self.space)
        running = _Running(trial, {**self.stage.hyperparameters, **trial.params})
        self._next_fold(running)

    def _next_fold(self, running: _Running) -> None:
        future = self.workers.submit(running.hyperparameters, len(running.values))
        self.running[future] = running

    def _await_one(self) -> None:
        """Take the results that are there, or wait half a second for one."""
        from concurrent.futures.process import BrokenProcessPool

        done, _ = concurrent.futures.wait(
            self.running, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in sorted(done, key=lambda f: self.running[f].trial.number):
            running = self.running.pop(future)
            try:
                value = future.result()
            except (Preempted, BadConfiguration):
                raise
            except BrokenProcessPool:
                self.run.check_stop()
                raise LeptonError(
                    f"a worker process ended in trial {running.trial.number} (out of memory, or killed): a retry goes on "
                    "from the finished trials; set fewer workers or max_rows."
                ) from None
            except Exception as error:  # noqa: BLE001  one set of hyperparameters that cannot be fitted ends its trial only
                own = isinstance(error, LeptonError)  # says all by itself
                self._fail(running, str(error) if own else f"{type(error).__name__}: {error}")
                continue
            self._advance(running, value)

    def _advance(self, running: _Running, value: float) -> None:
        from optuna.trial import TrialState

        if not math.isfinite(value):
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
            running.trial.number,
            done,
            self.stage.trials,
            outcome,
            best,
            left,
            running.trial.params,
        )


def _finished(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs


_DRIVERS = {"postgres": "postgresql+psycopg2", "postgresql": "postgresql+psycopg2", "mysql": "mysql+mysqldb"}


def _connection_url(connection: Connection) -> str:
    """SQLAlchemy's URL of an Airflow Connection to a database."""
    from sqlalchemy.engine import URL

    if connection.type == "sqlite":
        return f"sqlite:///{connection.host or connection.schema}"
    if connection.type not in _DRIVERS:
        raise BadConfiguration(
            f"Connection {connection.id!r} is of type {connection.type!r}, which holds no study; expected one of "
            f"{', '.join(_DRIVERS)}, sqlite."
        )
    url = URL.create(
        _DRIVERS[connection.type],
        username=connection.login,
        password=connection.password,
        host=connection.host,
        port=connection.port,
        database=connection.schema,
    )
    return url.render_as_string(hide_password=False)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _plot_history(study: optuna.Study, metric: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    pruned = [
        t for t in study.get_trials(deepcopy=False) if t.state.name == "PRUNED" and t.intermediate_values
    ]
    better = max if study.direction.name == "MAXIMIZE" else min
    best = [better(t.value for t in complete[: i + 1] if t.value is not None) for i in range(len(complete))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([t.number for t in complete], [t.value for t in complete], "o", label="complete")
    last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
    axes.plot([t.number for t in pruned], last, "x", color="0.6", label="pruned (mean of the folds run)")
    axes.step([t.number for t in complete], best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=f"{metric}, mean over folds", title=f"{len(complete)} complete trials")
    axes.legend()
    figure.savefig(path, format="png", dpi=100)
    return path


def _importance(study: optuna.Study, seed: int) -> dict[str, float]:
    """Share of the variance of the value that each parameter explains (fANOVA, Hutter et al. 2014); empty if too few."""
    import optuna

    values = {t.value for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"}
    if len(values) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _plot_importance(importance: dict[str, float], metric: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    names = sorted(importance, key=lambda name: importance[name])
    figure = Figure(figsize=(7, 1 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [importance[n] for n in names])
    axes.set(xlabel=f"share of the variance of {metric} (fANOVA)", xlim=(0, 1))
    figure.savefig(path, format="png", dpi=100)
    return path
