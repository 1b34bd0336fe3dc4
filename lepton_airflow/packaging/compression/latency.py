"""How many times as fast is a model in another number format?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.packaging.session import open_session

if TYPE_CHECKING:
    from lepton_airflow.packaging.compression.convert import Feed

_CONFIDENCE = 0.95
_FEWEST_CALLS, _MOST_CALLS = 5, 200  # of one model, one batch size and one round


@dataclass(frozen=True)
class Latency:
    """How long a call takes at one batch size, and how many times as fast it is as the original's.

    ``speedup`` is the median over rounds of the ratio of the fastest calls of a round: other processes can only make a call
    longer. Its interval holds the true median with at least 95% confidence, whatever the distribution.
    """

    batch: int  # rows a call
    p50_us: float
    p95_us: float
    speedup: float = 1.0
    speedup_low: float = 1.0
    speedup_high: float = 1.0


def time_side_by_side(
    models: Mapping[str, bytes],
    output: str,
    feeds: Mapping[int, Sequence[Feed]],
    *,
    rounds: int = 12,
    seconds: float = 30.0,
    threads: int = 1,
    seed: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, list[Latency]]:
    """Time models against the first of them, call by call in turns, so that a disturbance of the machine hits all alike.

    Each round opens fresh sessions in another order. Where a session lies in memory makes all of its calls faster or slower
    together, so the intervals count rounds, not calls.

    :param output: the output that is asked for.
    :param feeds: by batch size, the feeds that calls take in turn.
    :param seconds: about how long all of it takes [s].
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    names = list(models)
    taken: dict[tuple[str, int], list[list[float]]] = {(name, b): [] for name in names for b in feeds}
    calls: dict[int, int] = {}
    for _ in range(rounds):
        check_stop()
        sessions = {
            names[i]: open_session(models[names[i]], threads, spin=False) for i in rng.permutation(len(names))
        }

        def call(name: str, feed: Feed, sessions: Mapping[str, Any] = sessions) -> float:
            start = time.perf_counter()
            sessions[name].run([output], feed)
            return time.perf_counter() - start

        for batch, turns in feeds.items():
            for feed in turns[:2]:  # the first calls allocate
                warm = sum(call(name, feed) for name in names)
            if batch not in calls:
                share = seconds / rounds / len(feeds)
                calls[batch] = max(_FEWEST_CALLS, min(_MOST_CALLS, int(share / warm)))
            for name in names:
                taken[name, batch].append([])
            for number in range(calls[batch]):
                feed = turns[number % len(turns)]
                for i in rng.permutation(len(names)):
                    taken[names[i], batch][-1].append(call(names[i], feed))
    return {name: [_latency(taken[names[0], b], taken[name, b], b) for b in feeds] for name in names}


def _latency(original: list[list[float]], own: list[list[float]], batch: int) -> Latency:
    import numpy as np

    p50, p95 = np.quantile(np.concatenate(own), [0.5, 0.95]) * 1e6
    ratios = [min(a) / min(b) for a, b in zip(original, own, strict=True)]
    low, high = median_interval(ratios)
    return Latency(batch, float(p50), float(p95), statistics.median(ratios), low, high)


def median_interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Ends of an interval for the median of the distribution that these values come from; no assumption about it is made.

    It is the interval of the sign test. Raises BadConfiguration for fewer values than can have that confidence (6 for 95%).
    """
    n, below = len(values), 0.0
    outside = -1  # how many values lie beyond each end
    while (below := below + math.comb(n, outside + 1) / 2**n) <= (1 - confidence) / 2:
        outside += 1
    if outside < 0:
        raise BadConfiguration(
            f"rounds={n}: an interval of {100 * confidence:g}% needs at least "
            f"{math.ceil(1 - math.log2(1 - confidence))}."
        )
    ordered = sorted(values)
    return ordered[outside], ordered[-1 - outside]
