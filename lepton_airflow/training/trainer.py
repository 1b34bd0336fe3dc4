"""What a trainer gets and calls (:class:`TrainerRun`), and a trainer with what it declares (:class:`Trainer`)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, Preempted, did_you_mean
from lepton_airflow.store.checkpoints import Checkpoint, Checkpoints
from lepton_airflow.training.curves import Curves

# So many reports count for the rate: the beginning, and what else the machine did, are soon forgotten.
_PACE_REPORTS = 20


def silent(_text: str) -> None:
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
    say: Callable[[str], None] = silent  # where progress is told
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
