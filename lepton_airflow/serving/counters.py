"""What all workers of a server count, in memory that they share, so that every page shows the sum and no worker's end loses any."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

STATUSES = (200, 400, 404, 405, 408, 413, 415, 422, 431, 500, 503)
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # upper limits [seconds]
_SUM = len(STATUSES) + len(BUCKETS) + 1
_ROWS, _IN_FLIGHT, _WIDTH = _SUM + 1, _SUM + 2, _SUM + 3


class Counters:
    """Counters of each worker and endpoint; each worker writes its own, all can read.

    They are float64 side by side in shared memory: whole numbers up to 2^53, each written at once.
    """

    def __init__(self, context: BaseContext, workers: int, endpoints: int) -> None:
        self._workers, self._endpoints = workers, endpoints
        self._cells: Any = context.RawArray("d", workers * endpoints * _WIDTH)
        self._connections: Any = context.RawArray("d", [math.inf] * workers)  # infinity: it takes none

    def add(
        self, worker: int, endpoint: int, status: int, seconds: float | None = None, rows: int = 0
    ) -> None:
        """Count a request that was answered with a status; seconds and rows are those of a 200."""
        at = self._at(worker, endpoint)
        cells = self._cells
        cells[at + (STATUSES.index(status) if status in STATUSES else STATUSES.index(500))] += 1
        if seconds is not None:
            cells[at + len(STATUSES) + bisect_left(BUCKETS, seconds)] += 1
            cells[at + _SUM] += seconds
            cells[at + _ROWS] += rows

    def set_in_flight(self, worker: int, endpoint: int, number: int) -> None:
        """Say how many requests a worker has admitted and not answered."""
        self._cells[self._at(worker, endpoint) + _IN_FLIGHT] = number

    def has_more_connections(self, worker: int, number: int) -> bool:
        """Say how many connections a worker has; whether another one has fewer."""
        self._connections[worker] = number
        return number > min(self._connections)

    def forget(self, worker: int) -> None:
        """A worker has ended with its connections and what it had admitted."""
        self._connections[worker] = math.inf
        for endpoint in range(self._endpoints):
            self.set_in_flight(worker, endpoint, 0)

    def requests(self, endpoint: int) -> Iterator[tuple[int, float]]:
        """Each status and its number of requests, of those that occurred."""
        sums = self._sums(endpoint)
        yield from ((status, count) for status, count in zip(STATUSES, sums, strict=False) if count)

    def seconds(self, endpoint: int) -> tuple[list[tuple[str, float]], float]:
        """The cumulative buckets of the histogram, and the sum."""
        sums = self._sums(endpoint)
        found, total = [], 0.0
        for limit, count in zip((*BUCKETS, None), sums[len(STATUSES) : _SUM], strict=True):
            total += count
            found.append(("+Inf" if limit is None else repr(limit), total))
        return found, sums[_SUM]

    def rows(self, endpoint: int) -> float:
        """Rows answered."""
        return self._sums(endpoint)[_ROWS]

    def in_flight(self, endpoint: int) -> float:
        """Requests admitted and not answered."""
        return self._sums(endpoint)[_IN_FLIGHT]

    def _at(self, worker: int, endpoint: int) -> int:
        return (worker * self._endpoints + endpoint) * _WIDTH

    def _sums(self, endpoint: int) -> list[float]:
        parts = []
        for worker in range(self._workers):
            at = self._at(worker, endpoint)
            parts.append(self._cells[at : at + _WIDTH])
        return [sum(column) for column in zip(*parts, strict=True)]
