"""Fitting models: what a trainer gets, which rows are held out together, and one fit from rows to a checked model.

**The trainer contract.** ``fit(train, valid, hyperparameters, run)`` returns a fitted scikit-learn estimator or Pipeline
over the raw feature columns, a torch module with an example input, or an ``onnx.ModelProto``.

``train``, ``valid``   DataFrames with ``run.features`` and the column ``run.target``; ``valid`` may be None. Numbers are
                       float64 rounded to float32 (what ONNX will get) with NaN for missing; categories are text with
                       ``""`` for missing. A class target holds the numbers 0..k-1 of ``run.classes``.
``hyperparameters``    the dict given to the stage
``run``                the :class:`TrainerRun`: seed, threads, checkpoints, progress

A scikit-learn Pipeline over numbers and categories starts with a ``ColumnTransformer`` that names its columns. A torch
module reads a float32 tensor [rows, columns] and gives *probabilities* [rows, classes] (or [rows, 1] for the second of
two classes), or numbers [rows, 1]; it comes as ``(module, example)``, with an attribute ``example_input``, or as
``(fitted transformer of the raw columns, module)``. A module of trainers may set ``SEARCH_SPACE`` for TuneModel; a
``fit`` that cannot give equal weights for equal inputs says why in ``fit.nondeterministic = "…"``.

A fit that takes longer than you would like to lose asks ``run.latest_checkpoint()`` once, before its loop, and offers
``run.save_checkpoint(step, write)`` after every step of it; :func:`lepton_airflow.models.fit_torch` does that for torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import re
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lepton_airflow import models
from lepton_airflow.checkpoints import Checkpoint, Checkpoints
from lepton_airflow.contract import digest_of
from lepton_airflow.dataset import DatasetInfo, load_frame, read_info
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    LeptonError,
    OutOfMemory,
    Preempted,
    did_you_mean,
)
from lepton_airflow.fitted import Fitted, Schema, as_fitted
from lepton_airflow.package import feature_frame, features_of
from lepton_airflow.stages import code_digest, is_code, load_code

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Fold = tuple[NDArray[np.intp], NDArray[np.intp]]

log = logging.getLogger(__name__)

FoldBy = Literal["row", "time"]

# OpenMP threads that wait by spinning fight over a busy CPU: boosting 400 rows with two threads took 8.4 s beside other
# work on two cores, and 0.5 s with this. It must stand before the first library brings OpenMP in.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass
class Curves:
    """What a trainer reported, over all tries.

    :ivar unit: what a step is: ``epoch``, ``step``, …
    :ivar points: one dict a report: ``step`` and the metrics.
    :ivar resumed: the steps at which a later try went on.
    """

    unit: str = "step"
    points: list[dict[str, float]] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)

    def add(self, step: float, metrics: Mapping[str, float]) -> None:
        """Take up a report. Of very many, every second is let go: no picture shows thousands."""
        self.points.append({"step": float(step), **{name: float(value) for name, value in metrics.items()}})
        if len(self.points) >= _MOST_POINTS:
            del self.points[1:-1:2]


_MOST_POINTS = 4000
_PACE_REPORTS = (
    20  # so many count for the rate: the beginning, and what else the machine did, are soon forgotten
)


def _silent(_text: str) -> None:
    """Say it to nobody."""


@dataclass
class TrainerRun:
    """What a trainer may know about its run, and what it calls to be resumable.

    :ivar info: the description of the training dataset.
    :ivar classes: the classes in the order of their numbers; empty for regression.
    :ivar seed: draw all randomness from it.
    :ivar threads: CPU threads to use; numerical libraries are limited to it already.
    :ivar device: ``auto`` (cuda where there is one, else cpu), or the device that the stage was told.
    :ivar curves: what was reported so far, also by earlier tries.
    """

    info: DatasetInfo
    features: list[str]
    target: str
    task: str
    classes: list[Any]
    seed: int
    threads: int
    device: str = "auto"
    should_stop: Callable[[], bool] = lambda: False  # True once SIGTERM came
    checkpoints: Checkpoints | None = None  # None: nothing outlives this process
    curves: Curves = field(default_factory=Curves)
    say: Callable[[str], None] = _silent  # where progress is told
    _resumes: bool = field(default=False, init=False, repr=False)
    _pace: deque[tuple[float, float]] = field(
        init=False, repr=False
    )  # when the last reports came, and of which step

    def __post_init__(self) -> None:
        self._pace = deque([(time.monotonic(), 0.0)], maxlen=_PACE_REPORTS)

    @property
    def categorical(self) -> list[str]:
        """The features that are categories, in order."""
        return [c for c in self.features if c in self.info.categorical]

    @property
    def numbers(self) -> list[str]:
        """The features that are numbers, in order."""
        return [c for c in self.features if c not in self.info.categorical]

    def latest_checkpoint(self) -> Checkpoint | None:
        """What a killed try of this very fit has left, to be asked once before the loop; None: start anew.

        Its ``path`` is a directory with the files that ``write`` put there, verified; read them before the next
        :meth:`save_checkpoint`. Other data, code, hyperparameters or library versions are another fit.
        """
        self._resumes = True
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        reached = 0.0
        if found is not None:
            saved = Curves(**found.notes)
            reached = saved.points[-1]["step"] if saved.points else 0.0
            self.curves.unit, self.curves.points = saved.unit, saved.points
            self.curves.resumed = [*saved.resumed, reached]
            self.say(f"resuming after step {found.step} from the checkpoint of an earlier try")
            self._pace.clear()  # how much of the way to the next report is behind is not known
        return found

    def save_checkpoint(self, step: int, write: Callable[[Path], object]) -> bool:
        """Offer a checkpoint wherever the state is whole; call it after every step, it costs nothing unless one is due.

        One is due when ``checkpoint_s`` have passed since the last, or SIGTERM came. Then ``write(folder)`` must write all
        that the next try needs (weights, optimizer, place in the data, random state) as files in that empty folder.

        :param step: how far the fit is; :meth:`latest_checkpoint` gives it back.
        :returns: whether one was written.
        :raises Preempted: SIGTERM came; the checkpoint is in the store. Let it pass.
        """
        self._resumes = True
        stop = self.should_stop()
        if not stop and (self.checkpoints is None or not self.checkpoints.due()):
            return False
        kept = self.checkpoints is not None and self.checkpoints.save(
            step, write, asdict(self.curves), wait=stop
        )
        if stop:
            raise Preempted(
                f"asked to stop (SIGTERM) after step {step}; the next try goes on from "
                + ("there." if kept else "an earlier checkpoint, if there is one.")
            )
        return kept

    def report(self, step: float, *, of: float | None = None, unit: str = "step", **metrics: float) -> None:
        """Tell how far the fit is: a line in the log, with rate and time left, and a point of ``curves.png``.

        A trainer without checkpoints is stopped here once SIGTERM came; one with checkpoints in :meth:`save_checkpoint`.

        :param step: how far, in ``unit``.
        :param of: where it will end at the latest.
        :param metrics: by name; ``train_x`` and ``valid_x`` share a picture.
        :raises Preempted: see above.
        """
        self.curves.unit = unit
        self.curves.add(step, metrics)
        now = time.monotonic()
        since, start = self._pace[0] if self._pace else (now, step)
        self._pace.append((now, step))
        pace = ""
        if step > start and now > since:
            each_s = (now - since) / (step - start)
            pace = f"{_span(each_s)} per {unit}" if each_s >= 0.1 else f"{1 / each_s:,.0f} {unit}s per s"
            if of is not None and of > step:
                pace += f", {_span(each_s * (of - step))} left at most"
            pace = f" ({pace})"
        values = "".join(f" {name}={value:.5g}" for name, value in metrics.items())
        self.say(f"{unit} {step:g}{f' of {of:g}' if of is not None else ''}{values}{pace}")
        if not self._resumes and self.should_stop():
            raise Preempted(
                f"asked to stop (SIGTERM) at {unit} {step:g}; the next try starts this fit again."
            )


def _span(seconds: float) -> str:
    """A time as a person says it."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * size or unit == "s":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError(seconds)


@dataclass(frozen=True)
class Trainer:
    """A trainer by name or reference, with what it declares about its hyperparameters."""

    name: str
    fit: Callable[..., Any]
    defaults: dict[str, Any] | None  # None: a user's own trainer, which takes what it is given
    search_space: dict[str, dict[str, Any]]
    code: str  # sha256 of its source

    @classmethod
    def find(cls, name: str, task: str) -> Trainer:
        """The standard model of that name, or the user's ``module:function``."""
        if is_code(name):
            fit = load_code(name, "trainer")
            space = getattr(sys.modules[fit.__module__], "SEARCH_SPACE", {})
            _load_torch_for(fit)
            return cls(name, fit, None, space, code_digest(name))
        module = models.load(name)
        if task not in module.TASKS:
            fitting = [n for n in models.names() if task in models.load(n).TASKS]
            raise BadConfiguration(
                f"trainer={name!r} does {' and '.join(module.TASKS)}, the dataset asks for {task}: use one of "
                f"{', '.join(fitting)}."
            )
        return cls(name, module.fit, module.DEFAULTS, module.SEARCH_SPACE, _own_code())

    def complete(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters with defaults filled in; raises BadConfiguration on an unknown name or a wrong type."""
        if self.defaults is None:
            return dict(hyperparameters)
        for name, value in hyperparameters.items():
            if name not in self.defaults:
                raise BadConfiguration(
                    f"hyperparameters: {self.name} has no {name!r}; {did_you_mean(name, self.defaults)}"
                )
            default = self.defaults[name]
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    raise BadConfiguration(
                        f"hyperparameters: {name}={value!r} is not true or false (default {str(default).lower()})."
                    )
                continue
            if isinstance(default, int | float) and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise BadConfiguration(
                    f"hyperparameters: {name}={value!r} is not a number (default {default})."
                )
            if isinstance(default, int) and value != int(value):
                raise BadConfiguration(
                    f"hyperparameters: {name}={value!r} is not a whole number (default {default})."
                )
        return {
            name: int(hyperparameters[name])
            if name in hyperparameters and isinstance(default, int) and not isinstance(default, bool)
            else hyperparameters.get(name, default)
            for name, default in self.defaults.items()
        }


def _load_torch_for(fit: Callable[..., Any]) -> None:
    """Import torch now if the user's module does so later: :func:`deterministic` seeds only what is loaded."""
    path = getattr(sys.modules[fit.__module__], "__file__", None) or ""
    source = Path(path).read_text(errors="replace") if path.endswith(".py") else ""
    if re.search(r"^\s*(?:import|from)\s+torch\b", source, re.MULTILINE):
        with contextlib.suppress(ModuleNotFoundError):  # whoever imports it is told
            importlib.import_module("torch")


def _own_code() -> str:
    """sha256 of the sources that a standard model's fit depends on."""
    here = Path(__file__).parent
    sources = [
        here / "checkpoints.py",
        here / "training.py",
        here / "fitted.py",
        here / "package.py",
        *sorted((here / "models").glob("*.py")),
    ]
    return digest_of([[p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in sources])


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A dataset in memory, checked: raw features and target as trainers get them."""

    name: str
    info: DatasetInfo
    schema: Schema
    frame: pd.DataFrame  # features and target
    clusters: NDArray[np.int64] | None = None
    moments: NDArray[Any] | None = None  # values of the time column

    @property
    def target(self) -> str:
        """The target column."""
        return str(self.info.target)

    @property
    def y(self) -> NDArray[Any]:
        """The target, (n,): class numbers as int64, or float64."""
        return self.frame[self.target].to_numpy()

    @classmethod
    def load(
        cls, path: Path, name: str, like: Rows | None = None, max_rows: int | None = None, seed: int = 0
    ) -> Rows:
        """Read a split made by PrepareData.

        :param like: the training rows, whose features and classes these must have.
        :param max_rows: keep a random sample of so many rows, in their order.
        :raises BadInput: a column or the target cannot be learned from; the sentence says which and why.
        """
        import numpy as np
        import pandas as pd

        info = read_info(path)
        if info.target is None or info.task not in ("classification", "regression"):
            raise BadInput(
                f"{name}: the dataset's target is {info.target!r} and its task {info.task!r}, expected a target column and "
                "classification or regression; set them in PrepareData."
            )
        if not info.features:
            raise BadInput(f"{name}: the dataset has no features; list them in PrepareData.")
        reference = like.info if like else info
        if info.target != reference.target or info.task != reference.task:
            raise BadInput(
                f"{name}: its target is {info.target!r} ({info.task}), that of train is {reference.target!r} "
                f"({reference.task}); take both from one PrepareData."
            )
        extra = [c for c in (info.cluster_column, info.time_column) if c]
        frame = load_frame(path, list(dict.fromkeys([*reference.features, info.target, *extra])))
        if not len(frame):
            raise BadInput(f"{name}: 0 rows, expected some; check the window and the filters of the data.")
        if max_rows is not None and len(frame) > max_rows:
            kept = np.random.default_rng(seed).choice(len(frame), max_rows, replace=False)
            frame = frame.iloc[np.sort(kept)].reset_index(drop=True)
        features = like.schema.features if like else features_of(info)
        try:
            raw = feature_frame(frame, features)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
        if like is None:
            for f in features:
                empty = (raw[f.name] == "").all() if f.kind == "category" else raw[f.name].isna().all()
                if empty:
                    raise BadInput(
                        f"{name}: feature {f.name!r} is missing in all {len(raw):,} rows, so nothing can be learned "
                        "from it; take it out of the features or mend its source."
                    )
        raw = raw.astype({f.name: np.float64 for f in features if f.kind == "number"})
        classes = like.schema.classes if like else list(info.classes)
        if info.task == "classification":
            classes, raw[info.target] = _class_numbers(frame[info.target], classes, name, info.target)
            present = np.unique(raw[info.target])
            if like is None and len(present) < max(2, len(classes)):
                absent = [c for i, c in enumerate(classes) if i not in present]
                raise BadInput(
                    f"{name}: target {info.target!r} "
                    + (
                        f"has no row of {absent[0]!r}"
                        if len(present) > 1
                        else f"is {classes[present[0]]!r} in all rows"
                    )
                    + f" ({len(raw):,} rows), expected every class at least once; widen the window or mend the target."
                )
        else:
            raw[info.target] = _numbers_to_predict(frame[info.target], name, info.target)
        clusters = pd.factorize(frame[info.cluster_column])[0] if info.cluster_column else None
        moments = frame[info.time_column].to_numpy() if info.time_column else None
        return cls(name, info, Schema(features, info.task, classes), raw, clusters, moments)

    def take(self, rows: NDArray[np.intp]) -> pd.DataFrame:
        """Some rows, as a trainer gets them."""
        return self.frame.iloc[rows].reset_index(drop=True)


def _class_numbers(
    target: pd.Series[Any], classes: list[Any], name: str, column: str
) -> tuple[list[Any], NDArray[Any]]:
    """The classes, and the number of each row's class."""
    import numpy as np

    missing = int(target.isna().sum())
    if missing:
        raise BadInput(
            f"{name}: target {column!r} is missing in {missing:,} of {len(target):,} rows; drop these rows."
        )
    values = target.tolist()
    classes = classes or sorted(set(values))
    number = {c: i for i, c in enumerate(classes)}
    if not any(v in number for v in set(values)):  # classes that JSON has only as text, such as dates
        values = [str(v) for v in values]
    unknown = sorted({str(v) for v in values if v not in number})
    if unknown:
        raise BadInput(
            f"{name}: target {column!r} has the value {unknown[0]!r}, which is none of train's classes {classes[:8]}; "
            "drop these rows or train on them."
        )
    return classes, np.array([number[v] for v in values], dtype=np.int64)


def _numbers_to_predict(target: pd.Series[Any], name: str, column: str) -> NDArray[np.float64]:
    import numpy as np

    try:
        values = target.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise BadInput(
            f"{name}: target {column!r} has dtype {target.dtype}, expected numbers for regression; "
            "set task='classification' or convert it."
        ) from None
    bad = ~np.isfinite(values)
    if bad.any():
        raise BadInput(
            f"{name}: target {column!r} is missing or infinite in {int(bad.sum()):,} of {len(values):,} rows, first in "
            f"row {int(np.argmax(bad))}; drop these rows."
        )
    return np.asarray(values)


# -- folds -------------------------------------------------------------------------------------------------------------


def make_folds(rows: Rows, folds: int, fold_by: FoldBy, seed: int) -> list[Fold]:
    """Split rows into (train, held out) pairs of row numbers.

    ``row``: K folds at random; stratified by class, and with whole clusters when the dataset names a cluster column.
    ``time``: the rows in order of time are cut into ``folds + 1`` blocks; fold k is trained on the blocks before block k
    and held out on it, so no model sees its future. Equal times stay together; rows of a cluster that is held out are
    not trained on. The first block is never held out.
    """
    import numpy as np
    from sklearn import model_selection as ms

    n, classified = len(rows.frame), rows.schema.task == "classification"
    if folds < 2:
        raise BadConfiguration(f"folds={folds}: expected at least 2.")
    if fold_by == "time":
        made = _time_folds(rows, folds)
    else:
        units = n if rows.clusters is None else int(rows.clusters.max()) + 1
        if units < folds:
            what = (
                "rows" if rows.clusters is None else f"values of cluster column {rows.info.cluster_column!r}"
            )
            raise BadInput(
                f"{rows.name}: {units} {what} cannot be split into folds={folds}; set fewer folds."
            )
        kinds = {
            (True, True): ms.StratifiedGroupKFold,
            (True, False): ms.StratifiedKFold,
            (False, True): ms.GroupKFold,
            (False, False): ms.KFold,
        }
        splitter = kinds[classified, rows.clusters is not None](folds, shuffle=True, random_state=seed)
        labels = rows.y
        if (
            classified and rows.clusters is None
        ):  # sklearn refuses when every class has fewer rows than there are folds
            labels = labels if np.bincount(labels).max() >= folds else np.zeros(n, dtype=np.int64)
        with contextlib.suppress(Warning):
            made = _quietly(lambda: list(splitter.split(np.zeros(n), labels, rows.clusters)))
    for number, (train, held_out) in enumerate(made):
        if not len(train) or not len(held_out):
            raise BadInput(f"{rows.name}: fold {number + 1} of {folds} is empty; set fewer folds.")
        if classified and len(np.unique(rows.y[train])) < 2:
            raise BadInput(
                f"{rows.name}: fold {number + 1} of {folds} leaves one class only to train on; set fewer folds"
                + (" or fold_by='row'." if fold_by == "time" else ".")
            )
    return made


def _quietly(call: Callable[[], Any]) -> Any:
    import warnings

    with (
        warnings.catch_warnings()
    ):  # a class with fewer rows than folds is handled: it gets probability 0 where unseen
        warnings.simplefilter("ignore")
        return call()


def _time_folds(rows: Rows, folds: int) -> list[Fold]:
    import numpy as np

    if rows.moments is None:
        raise BadConfiguration(
            "fold_by='time' needs a time column, the dataset names none; set time_column in PrepareData."
        )
    _, moment = np.unique(rows.moments, return_inverse=True)
    counts = np.bincount(moment)
    block_of_moment = np.minimum((np.cumsum(counts) - counts) * (folds + 1) // len(moment), folds)
    block = block_of_moment[moment]
    made = []
    for k in range(1, folds + 1):
        held_out = np.flatnonzero(block == k)
        before = block < k
        if rows.clusters is not None:
            before &= ~np.isin(rows.clusters, rows.clusters[held_out])
        made.append((np.flatnonzero(before), held_out))
    return made


# -- fitting -----------------------------------------------------------------------------------------------------------


def fit_model(
    trainer: Trainer,
    rows: Rows,
    hyperparameters: dict[str, Any],
    *,
    valid: Rows | None = None,
    subset: NDArray[np.intp] | None = None,
    seed: int,
    threads: int,
    device: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
    curves: Curves | None = None,
    say: Callable[[str], None] = _silent,
) -> Fitted:
    """Fit once, on all rows or a subset, with every source of randomness seeded and threads fixed.

    :raises LeptonError: the user's trainer failed; the message names it and the line, the cause is its error.
    """
    from sklearn.utils._param_validation import InvalidParameterError

    run = TrainerRun(
        info=rows.info,
        features=rows.schema.names,
        target=rows.target,
        task=rows.schema.task,
        classes=rows.schema.classes,
        seed=seed,
        threads=threads,
        device=device,
        should_stop=should_stop,
        checkpoints=checkpoints,
        curves=curves if curves is not None else Curves(),
        say=say,
    )
    train = rows.frame.copy() if subset is None else rows.take(subset)
    with deterministic(seed, threads):
        try:
            returned = trainer.fit(
                train, valid.frame.copy() if valid is not None else None, dict(hyperparameters), run
            )
        except (LeptonError, MemoryError):
            raise
        except InvalidParameterError as error:
            raise BadConfiguration(f"hyperparameters of {trainer.name}: {error}") from None
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
                raise OutOfMemory(
                    f"trainer {trainer.name}: the GPU's memory is full: {str(error).splitlines()[0]} Lower the batch size, "
                    "or accumulate gradients over parts of a batch."
                ) from error
            if trainer.defaults is not None:  # a standard model: no code of the user's
                raise
            raise LeptonError(
                f"trainer {trainer.name}, which is your code, failed{_where(error, trainer.fit)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            if checkpoints is not None:
                checkpoints.close()
    return as_fitted(returned, rows.schema, trainer.name)


def _where(error: BaseException, fit: Callable[..., Any]) -> str:
    """The last line of the user's own module that led to an error, in words."""
    own = getattr(sys.modules[fit.__module__], "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" in line {lines[-1]} of {Path(own).name}" if own and lines else ""


@contextlib.contextmanager
def deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seed Python, numpy and (when loaded) torch, and limit BLAS, OpenMP and torch to so many threads."""
    import random

    import numpy as np
    from threadpoolctl import threadpool_limits

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  a user's library may draw from the global generator
    with threadpool_limits(threads):
        torch = sys.modules.get("torch")
        if torch is None:
            yield
            return
        torch.manual_seed(seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def score(schema: Schema, y: NDArray[Any], predicted: NDArray[Any]) -> dict[str, float | None]:
    """All metrics of the task."""
    from lepton_airflow.statistics.metrics import classification_metrics, regression_metrics

    return (
        classification_metrics(y, predicted)
        if schema.task == "classification"
        else regression_metrics(y, predicted)
    )
