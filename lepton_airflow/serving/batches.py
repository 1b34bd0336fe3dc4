"""Requests that come within a few milliseconds, computed by one call of the model.

Each request is read, checked and answered by itself; only the computing is shared. A batch that the model fails on is computed
again request by request, so rows that it cannot compute fail the request that sent them and no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lepton_airflow.serving.protocol import Inference, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lepton_airflow.serving.model import ServedModel

Outcome = Any  # the values of the outputs of one request, or its RequestError
Run = Callable[[float, Callable[[], list[Outcome]], Callable[[list[Outcome]], None]], None]


@dataclass
class _Batch:
    model: ServedModel
    rows: int = 0
    members: list[tuple[Inference, Callable[[Outcome], None]]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Batches:
    """Collects requests of one version until there are enough rows, or the first has waited long enough.

    :param rows: of a batch at most.
    :param wait_s: for which the first request of a batch waits for others.
    :param run: computes a batch that should take so many seconds, and hands on what came of it in the loop's thread.
    """

    def __init__(self, rows: int, wait_s: float, run: Run) -> None:
        self.rows = rows
        self.wait_s = wait_s
        self._run = run
        self._open: dict[int, _Batch] = {}  # by the identity of the model, which the batch keeps alive

    def add(self, model: ServedModel, inference: Inference, done: Callable[[Outcome], None]) -> None:
        """Have a request computed with others; ``done`` gets the values of its outputs, or the error. In the loop's thread."""
        batch = self._open.get(id(model))
        if batch is not None and batch.rows + inference.rows > self.rows:
            self._close(batch)
            batch = None
        if batch is None:
            batch = self._open[id(model)] = _Batch(model)
            batch.timer = asyncio.get_running_loop().call_later(self.wait_s, self._close, batch)
        batch.members.append((inference, done))
        batch.rows += inference.rows
        if batch.rows >= self.rows:
            self._close(batch)

    def _close(self, batch: _Batch) -> None:
        """Compute a batch; what comes from now on goes into another."""
        if self._open.get(id(batch.model)) is not batch:
            return
        del self._open[id(batch.model)]
        if batch.timer is not None:
            batch.timer.cancel()
        inferences = [inference for inference, _ in batch.members]

        def done(outcomes: list[Outcome]) -> None:
            for (_, tell), outcome in zip(batch.members, outcomes, strict=True):
                tell(outcome)

        self._run(batch.model.seconds_of(batch.rows), lambda: together(batch.model, inferences), done)


def together(model: ServedModel, inferences: Sequence[Inference]) -> list[Outcome]:
    """The values of each request's outputs, by one call of the model where that is possible."""
    if len(inferences) > 1:
        try:
            return _by_one_call(model, inferences)
        except Exception:  # noqa: BLE001, S110 - whose rows it was shows below
            pass
    found: list[Outcome] = []
    for inference in inferences:
        try:
            found.append(model.run(inference))
        except RequestError as error:
            found.append(error.to_keep())
    return found


def _by_one_call(model: ServedModel, inferences: Sequence[Inference]) -> list[Outcome]:
    import numpy as np

    names = list(dict.fromkeys(name for inference in inferences for name in inference.outputs))
    feed = {name: np.concatenate([i.feed[name] for i in inferences]) for name in inferences[0].feed}
    whole: dict[str, NDArray[Any]] = dict(zip(names, model.session.run(names, feed), strict=True))
    rows = sum(inference.rows for inference in inferences)
    if any(len(values) != rows for values in whole.values()):
        raise ValueError("the model gives another number of rows than it was given")
    found, start = [], 0
    for inference in inferences:
        end = start + inference.rows
        found.append([whole[name][start:end] for name in inference.outputs])
        start = end
    return found
