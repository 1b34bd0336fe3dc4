"""A trainer with what it declares (:class:`Trainer`), and what it gets and calls while it fits (:class:`TrainerRun`)."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, Preempted, brief, did_you_mean
from lepton_airflow.sdk.values import plain_json
from lepton_airflow.store.checkpoints import Checkpoint, Checkpoints
from lepton_airflow.training.curves import Curves

_PACE_REPORTS = 20  # the rate is that of the last reports, so that a slow start is soon forgotten


def silent(_text: str) -> None:
    """Say it to nobody."""


@dataclass
class TrainerRun:
    """What a trainer may know about its run, and what it calls to report progress and to be resumable.

    :ivar info: the description of the training dataset.
    :ivar classes: the classes in the order of their numbers; empty for regression.
    :ivar seed: draw all randomness from it.
    :ivar threads: CPU threads to use; numerical libraries are limited to this number already.
    :ivar device: ``auto`` (cuda where there is one, else cpu), or the device that the stage was given.
    :ivar should_stop: gives True once SIGTERM came.
    :ivar checkpoints: where checkpoints are kept; None: they are not.
    :ivar curves: what was reported so far, also by earlier tries.
    :ivar say: is told of the progress.
    :ivar settled: None, but for a refit on train and valid: what the fit before it passed to :meth:`settle`. There is no
        ``valid`` then, and nothing to stop early by.
    """

    info: DatasetInfo
    features: list[str]
    target: str
    task: str
    classes: list[Any]
    seed: int
    threads: int
    device: str = "auto"
    should_stop: Callable[[], bool] = lambda: False
    checkpoints: Checkpoints | None = None
    curves: Curves = field(default_factory=Curves)
    say: Callable[[str], None] = silent
    settled: Mapping[str, Any] | None = None
    # What the trainer has settled, call by call.
    _told: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    # Whether the trainer keeps checkpoints: then save_checkpoint stops it, else report.
    _resumes: bool = field(default=False, init=False, repr=False)
    # The time and the step of the last reports.
    _pace: deque[tuple[float, float]] = field(init=False, repr=False)

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
        """What an earlier, killed try of this fit left; None: start from the beginning. Call it once, before the loop.

        ``path`` of the checkpoint is a directory with the files that ``write`` made, verified. Read them before the next
        :meth:`save_checkpoint`. A fit with other data, code, hyperparameters or library versions is another fit.
        """
        self._resumes = True
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        if found is not None:
            saved = Curves(**found.notes)
            reached = saved.points[-1]["step"] if saved.points else 0.0
            self.curves.unit, self.curves.points = saved.unit, saved.points
            self.curves.resumed = [*saved.resumed, reached]
            self.say(f"resuming after step {found.step} from the checkpoint of an earlier try")
            self._pace.clear()  # the checkpoint may be of any moment between two reports
        return found

    def save_checkpoint(self, step: int, write: Callable[[Path], object]) -> bool:
        """Write a checkpoint if one is due: when ``checkpoint_s`` have passed since the last, or SIGTERM came.

        Call it after every step, wherever the state is complete; it costs nothing unless a checkpoint is due.
        ``write(folder)`` must then write all that the next try needs (weights, optimizer, place in the data, random state)
        as files into that empty folder.

        :param step: how far the fit is; the ``step`` of :meth:`latest_checkpoint`.
        :returns: whether a checkpoint was written.
        :raises Preempted: SIGTERM came, and the checkpoint is in the store. Do not catch it.
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

    def settle(self, **numbers: Any) -> None:
        """Tell what ``valid`` has decided, such as ``trees=57``, for a refit on train and valid; without numbers: nothing.

        The refit finds it in ``settled``. A trainer that never calls this cannot be refitted. :func:`fit_torch` calls it.

        :param numbers: by name; numbers, texts, or lists of these.
        """
        told = plain_json(numbers)
        for name, value in told.items():
            try:
                json.dumps(value)
                json.dumps(numbers[name], allow_nan=False, default=_listed)  # NaN would be kept as null
            except (TypeError, ValueError):
                raise BadConfiguration(
                    f"run.settle({name}={brief(numbers[name])}): expected a finite number, a text, or a list of these, which the "
                    "store can keep."
                ) from None
        self._told.append(told)

    @property
    def decided(self) -> dict[str, Any] | None:
        """What :meth:`settle` was told; None if it was not called.

        :raises BadConfiguration: it was told two values of one name, as by a ``fit`` of two loops.
        """
        if not self._told:
            return None
        decided: dict[str, Any] = {}
        for name, value in ((name, value) for told in self._told for name, value in told.items()):
            if decided.setdefault(name, value) != value:
                raise BadConfiguration(
                    f"run.settle({name}={brief(value)}): it was {brief(decided[name])} before in the same fit, so a refit does not "
                    "know which; a fit can be refitted that settles each name once."
                )
        return decided

    def report(self, step: float, *, of: float | None = None, unit: str = "step", **metrics: float) -> None:
        """Report how far the fit is: a line in the log, with rate and time left, and a point in ``curves.png``.

        :param step: how far the fit is, in ``unit``.
        :param of: the last step at the latest.
        :param metrics: by name; ``train_x`` and ``valid_x`` are drawn together.
        :raises Preempted: SIGTERM came, and the trainer keeps no checkpoints; else :meth:`save_checkpoint` raises it.
        """
        self.curves.unit = unit
        self.curves.add(step, metrics)
        pace = self._told_pace(step, of, unit)
        values = "".join(f" {name}={value:.5g}" for name, value in metrics.items())
        self.say(f"{unit} {step:g}{f' of {of:g}' if of is not None else ''}{values}{pace}")
        if not self._resumes and self.should_stop():
            raise Preempted(
                f"asked to stop (SIGTERM) at {unit} {step:g}; the next try starts this fit again."
            )

    def _told_pace(self, step: float, of: float | None, unit: str) -> str:
        """Rate and time left, in words; empty while they are not known."""
        now = time.monotonic()
        since, start = self._pace[0] if self._pace else (now, step)
        self._pace.append((now, step))
        if step <= start or now <= since:
            return ""
        each_s = (now - since) / (step - start)
        text = f"{_span(each_s)} per {unit}" if each_s >= 0.1 else f"{1 / each_s:,.0f} {unit}s per s"
        if of is not None and of > step:
            text += f", {_span(each_s * (of - step))} left at most"
        return f" ({text})"


def _span(seconds: float) -> str:
    """A duration in the unit that a person would choose."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * size or unit == "s":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError(seconds)


@dataclass(frozen=True)
class Trainer:
    """A trainer with what it declares about its hyperparameters.

    :ivar name: a standard model's name, or ``module:function``.
    :ivar defaults: the hyperparameters of a standard model; None: the user's own trainer, which takes any.
    :ivar search_space: what TuneModel searches by default.
    :ivar code: sha256 of its source.
    """

    name: str
    fit: Callable[..., Any]
    defaults: dict[str, Any] | None
    search_space: dict[str, dict[str, Any]]
    code: str

    def complete(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the defaults; raises BadConfiguration for an unknown name or a wrong type."""
        if self.defaults is None:
            return dict(hyperparameters)
        for name, value in hyperparameters.items():
            if name not in self.defaults:
                raise BadConfiguration(
                    f"hyperparameters: {self.name} has no {name!r}; {did_you_mean(name, self.defaults)}"
                )
            _check_type(name, value, self.defaults[name])
        chosen = {name: hyperparameters.get(name, default) for name, default in self.defaults.items()}
        whole = [name for name, d in self.defaults.items() if isinstance(d, int) and not isinstance(d, bool)]
        return chosen | {name: int(chosen[name]) for name in whole}


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise unless a value is of the type of its default; a default that is text or None allows any."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = ""
    if isinstance(default, bool):
        wanted = "" if isinstance(value, bool) else "true or false"
    elif isinstance(default, int | float) and not is_number:
        wanted = "a number"
    elif isinstance(default, int) and value != int(value):
        wanted = "a whole number"
    if wanted:
        raise BadConfiguration(
            f"hyperparameters: {name}={value!r} is not {wanted} (default {json.dumps(default)})."
        )


def _listed(value: Any) -> Any:
    """Numpy's numbers and arrays as Python's."""
    if not hasattr(value, "tolist"):
        raise TypeError
    return value.tolist()
