"""Search hyperparameters: what may be searched, and how one set of them is scored on one fold.

A search space is JSON: ``{"learning_rate": {"low": 0.01, "high": 0.3, "log": true}, "max_iter": {"low": 50, "high": 400,
"step": 50}, "class_weight": {"choices": [null, "balanced"]}}``. If ``low`` and ``high`` are whole numbers, whole numbers
are searched, unless the model's default is a fraction.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean
from lepton_airflow.training.fit import fit_model, score
from lepton_airflow.training.folds import FoldBy, make_folds
from lepton_airflow.training.rows import Rows
from lepton_airflow.training.trainer import Trainer

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from optuna.distributions import BaseDistribution

    from lepton_airflow.training.folds import Fold

_RANGE_KEYS = ("low", "high", "log", "step")


def distributions(space: Mapping[str, Any], trainer: Trainer) -> dict[str, BaseDistribution]:
    """Turn a search space into Optuna's distributions; raises BadConfiguration with the entry that is wrong."""
    if not space:
        raise BadConfiguration(
            f"search_space is empty and {trainer.name} declares none: give one, such as "
            '{"learning_rate": {"low": 0.01, "high": 0.3, "log": true}}.'
        )
    return {name: _distribution(name, entry, trainer) for name, entry in space.items()}


def _distribution(name: str, entry: Any, trainer: Trainer) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    where = f"search_space: {name}={entry!r}"
    if trainer.defaults is not None and name not in trainer.defaults:
        raise BadConfiguration(
            f"search_space: {trainer.name} has no {name!r}; {did_you_mean(name, trainer.defaults)}"
        )
    if not isinstance(entry, Mapping) or not entry:
        raise BadConfiguration(
            f'{where} is not a range {{"low": …, "high": …}} or a list {{"choices": […]}}.'
        )
    if "choices" in entry:
        choices = entry["choices"]
        plain = isinstance(choices, list) and all(isinstance(c, str | int | float | None) for c in choices)
        if len(entry) > 1 or not plain or not choices:
            raise BadConfiguration(
                f"{where}: choices must be a list of texts, numbers, true, false or null, alone."
            )
        return CategoricalDistribution(choices)
    for key in entry:
        if key not in _RANGE_KEYS:
            raise BadConfiguration(
                f"{where}: {key!r} is unknown; {did_you_mean(key, (*_RANGE_KEYS, 'choices'))}"
            )
    numbers = [entry.get("low"), entry.get("high")] + (
        [entry["step"]] if entry.get("step") is not None else []
    )
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise BadConfiguration(f"{where}: low and high (and step) must be numbers.")
    default = (trainer.defaults or {}).get(name)
    whole = all(isinstance(n, int) for n in numbers) and not isinstance(default, float)
    if isinstance(default, int) and not whole:
        raise BadConfiguration(
            f"{where}: {name} is a whole number (default {default}), so low, high and step must be."
        )
    log, step = bool(entry.get("log", False)), entry.get("step")
    try:
        if whole:
            return IntDistribution(entry["low"], entry["high"], log=log, step=step or 1)
        return FloatDistribution(entry["low"], entry["high"], log=log, step=step)
    except ValueError as error:
        raise BadConfiguration(f"{where}: {error}") from None


# -- scoring -----------------------------------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Scores a set of hyperparameters on one fold; the data are read and the folds made once in each process.

    :ivar find: looks the trainer up by name and task, in each process: its function cannot be sent to another one.
    """

    path: Path
    trainer: str
    find: Callable[[str, str], Trainer]
    metric: str
    folds: int
    fold_by: FoldBy
    seed: int
    threads: int
    max_rows: int | None

    @cached_property
    def rows(self) -> Rows:
        """The rows, or a sample of ``max_rows`` of them."""
        return Rows.load(self.path, "train", max_rows=self.max_rows, seed=self.seed)

    @cached_property
    def fold_rows(self) -> list[Fold]:
        """The folds' row numbers, equal in every process."""
        return make_folds(self.rows, self.folds, self.fold_by, self.seed)

    def __call__(
        self,
        hyperparameters: Mapping[str, Any],
        fold: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """The metric on the held-out rows of a fold."""
        trainer = self.find(self.trainer, self.rows.schema.task)
        train, held_out = self.fold_rows[fold]
        model = fit_model(
            trainer,
            self.rows,
            trainer.complete(hyperparameters),
            subset=train,
            seed=self.seed,
            threads=self.threads,
            should_stop=should_stop,
        )
        value = score(self.rows.schema, self.rows.y[held_out], model.predict(self.rows.take(held_out)))[
            self.metric
        ]
        if value is None:
            raise BadInput(
                f"{self.metric} is undefined on fold {fold + 1} of {self.folds}, whose held-out rows have one value of the "
                "target only; set fewer folds or another metric."
            )
        return value


_scorer: Scorer | None = None  # of this worker process


def _start_worker(scorer: Scorer, stop: Event, parent: int) -> None:
    """Prepare a worker process: it leaves SIGTERM to its parent, and ends when that ends, however it ends."""
    global _scorer  # noqa: PLW0603  the initializer of a pool can only leave things in globals
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _scorer = scorer

    def watch() -> None:
        while os.getppid() == parent and not stop.wait(0.5):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _score(hyperparameters: Mapping[str, Any], fold: int) -> float:
    assert _scorer is not None
    return _scorer(hyperparameters, fold)


class Workers:
    """Scores in ``count`` background processes, or in this process if ``count`` is 1.

    Use it as a context manager: leaving it ends the processes, even in the middle of a fit.
    """

    def __init__(self, scorer: Scorer, count: int, should_stop: Callable[[], bool]) -> None:
        import multiprocessing

        self.count, self._scorer, self._should_stop = count, scorer, should_stop
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork of a process with OpenMP threads may hang
            self._stop = spawn.Event()
            # replace() makes a scorer without rows: each process reads them instead of getting them through a pipe.
            self._pool = ProcessPoolExecutor(
                count, spawn, initializer=_start_worker, initargs=(replace(scorer), self._stop, os.getpid())
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, hyperparameters: Mapping[str, Any], fold: int) -> Future[float]:
        """Score one fold; the future is already done if this process does the work."""
        if self._pool is not None:
            return self._pool.submit(_score, hyperparameters, fold)
        future: Future[float] = Future()
        try:
            future.set_result(self._scorer(hyperparameters, fold, self._should_stop))
        except Exception as error:  # noqa: BLE001  as a pool does: the future raises it for the caller
            future.set_exception(error)
        return future
