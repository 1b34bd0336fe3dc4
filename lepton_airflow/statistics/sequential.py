"""Is the candidate worse than what is in service, judged while requests come in? Confidence sequences that hold at every look.

A test that is made once has its error probability for one look. Here a small *harm*, the candidate's rate minus stable's, is
looked at every few seconds, and the probability that any look is wrong is at most ``alpha``. Each possible harm is bet
against: a capital of 1 grows where the counts speak against it and cannot be expected to grow where it is true, so by Ville's
inequality it ever reaches ``1 / alpha`` with a probability of at most ``alpha``.

- :class:`Harm`: of two rates, such as those of errors. The bets are those of Turner & Grünwald (2023, "Exact anytime-valid
  confidence intervals for contingency tables and beyond"), and of Waudby-Smith & Ramdas (2023, "Estimating means of bounded
  random variables by betting") for values between 0 and 1.
- :class:`Shift`: of two distributions over buckets, by their total variation distance.
- :class:`Units`: either of them where whole users were assigned, each with many requests.
- :class:`Share`: of a split, against the share that was asked for (Lindon & Malek 2022, arXiv 2011.03567).

Each takes what was seen since its last look. ``state()`` is what it knows, as JSON can hold it, and ``restore()`` takes that up, so
whoever goes on after a kill goes on with the same evidence. All of it needs the standard library only, because a trigger of Airflow
runs it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

# How far beyond the harm that is bet against the truth may lie; the capital is shared out among these and an estimate.
_EFFECTS = (0.002, 0.006, 0.02, 0.06, 0.2, 0.6)
_EDGE = 1e-5  # no rate is taken to be closer to 0 or 1
_BLOCK = 100  # observations that are bet on together, at least
_MEMORY = 20_000  # observations after which half of the estimate of a rate is forgotten, because rates change over a day
# An estimate before anything was seen, and how many observations it counts as.
_PRIOR_RATE, _PRIOR_WEIGHT = 0.01, 20.0
_GROWTH = 1.25  # by which the requests of units have grown before they are looked at again
_FEWEST_UNITS = 20

_Value = TypeVar("_Value", float, tuple[float, ...])


def tally(n: int, bad: int) -> dict[float, int]:
    """How often the event of a rate was seen in ``n`` observations, as :meth:`Harm.add` takes it."""
    return {1.0: bad, 0.0: n - bad}


class _Sequence(ABC, Generic[_Value]):
    """What the confidence sequences share: blocks of observations, and the points that they bet against."""

    def __init__(self, points: Iterable[float]) -> None:
        self.points = sorted(set(points))
        self._step: Hashable = None
        self._pending: tuple[Counter[_Value], Counter[_Value]] = (Counter(), Counter())

    def add(
        self, candidate: Mapping[_Value, int], stable: Mapping[_Value, int], step: Hashable = None
    ) -> None:
        """Take what was seen since the last call: values, and how often each was.

        :param step: another one for each share of the candidate, so that only what came at the same share is compared.
        """
        if step != self._step:
            self.finish()
            self._step = step
        for pending, seen in zip(self._pending, (candidate, stable), strict=True):
            for value, count in seen.items():
                if count < 0:
                    raise ValueError(f"value {value} was seen {count} times: expected 0 or more")
                if count:
                    pending[value] += count
        if sum(map(Counter.total, self._pending)) >= _BLOCK:
            self.finish()

    def finish(self) -> None:
        """Bet on what has come so far."""
        candidate, stable = self._pending
        if candidate and stable:  # else nothing can be compared
            self._settle(candidate, stable)
        self._pending = (Counter(), Counter())

    def lower(self, alpha: float) -> float:
        """The truth is certainly above this point, with an error probability of ``alpha`` over all looks; or ``-inf``."""
        return max(_reached(self.points, self.above, -math.log(alpha)), default=-math.inf)

    def upper(self, alpha: float) -> float:
        """The truth is certainly below this point, with an error probability of ``alpha`` over all looks; or ``inf``."""
        return min(_reached(self.points, self.below, -math.log(alpha)), default=math.inf)

    def state(self) -> dict[str, Any]:
        """All that it knows; the step has to be what JSON can hold."""
        return {
            "step": self._step,
            "pending": [[[value, count] for value, count in seen.items()] for seen in self._pending],
            "bets": [bets.state() for bets in self._all_bets()],
            "rates": [rate.state() for rate in self._all_rates()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what another one knew, which was made with the same arguments."""
        self._step = state["step"]
        self._pending = tuple(  # type: ignore[assignment]
            Counter({tuple(v) if isinstance(v, list) else v: count for v, count in seen})
            for seen in state["pending"]
        )
        for bets, known in zip(self._all_bets(), state["bets"], strict=True):
            bets.restore(known)
        for rate, known in zip(self._all_rates(), state["rates"], strict=True):
            rate.restore(known)

    @abstractmethod
    def _all_bets(self) -> Iterator[_Bets]: ...

    @abstractmethod
    def _all_rates(self) -> Iterator[_Rate]: ...

    @property
    @abstractmethod
    def above(self) -> list[float]:
        """Of each point the highest logarithm of the capital that was bet on a truth above it."""

    @property
    @abstractmethod
    def below(self) -> list[float]:
        """Of each point the highest logarithm of the capital that was bet on a truth below it."""

    @abstractmethod
    def _settle(self, candidate: Counter[_Value], stable: Counter[_Value]) -> None: ...


class Harm(_Sequence[float]):
    """A confidence sequence of the candidate's rate minus stable's. Values are from 0 to 1, where 1 is bad.

    :param points: the harms that are bet against, such as the one that is tolerated and the largest that may be promoted;
        ``lower`` and ``upper`` are among them.
    :param cautious: whether the values of a track depend on each other over time, as the times of answers do. The
        capital then grows by the power ``1 / caution``. Caution is how many times more than with independent requests the
        difference of the tracks varies, on the time scale on which that is most; it is measured, so this is asymptotic.
    """

    def __init__(self, points: Iterable[float], *, cautious: bool = False) -> None:
        super().__init__(points)
        self._above = [_Bets(point, 1, _EFFECTS) for point in self.points]
        self._below = [_Bets(point, -1, _EFFECTS) for point in self.points]
        self._rates = (_Rate(_PRIOR_RATE), _Rate(_PRIOR_RATE))
        self._scores: list[float] | None = [] if cautious else None

    @staticmethod
    def value(counts: Sequence[int]) -> float:
        """The value of a unit with so many good and bad requests."""
        good, bad = counts
        return bad / (good + bad)

    @property
    def above(self) -> list[float]:
        return [bets.highest for bets in self._above]

    @property
    def below(self) -> list[float]:
        return [bets.highest for bets in self._below]

    def state(self) -> dict[str, Any]:
        return super().state() | {"scores": self._scores}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._scores = state["scores"]

    def _all_bets(self) -> Iterator[_Bets]:
        yield from (*self._above, *self._below)

    def _all_rates(self) -> Iterator[_Rate]:
        yield from self._rates

    def _settle(self, candidate: Counter[float], stable: Counter[float]) -> None:
        caution = 1.0 if self._scores is None else _caution(self._scores)
        ours, theirs = (rate.value for rate in self._rates)
        for bets in (*self._above, *self._below):
            bets.settle(candidate, stable, ours, theirs, caution)
        if self._scores is not None:
            self._scores.extend(_score(candidate, stable))
        for rate, seen in zip(self._rates, (candidate, stable), strict=True):
            rate.add(seen.total(), sum(y * count for y, count in seen.items()))


class Shift(_Sequence[tuple[float, ...]]):
    """A confidence sequence of the distance between the two tracks' distributions over a few buckets.

    The total variation distance is the largest difference of any set of buckets. That it is above a point is bet on the set that
    looked worst before; that it is below one has to be won for every set. A value is a share of each bucket.

    :param buckets: how many there are, at most 8, because all sets of them are looked at.
    """

    def __init__(self, buckets: int, points: Iterable[float]) -> None:
        super().__init__(points)
        self._sets = [tuple(b for b in range(buckets) if mask >> b & 1) for mask in range(1, 2**buckets - 1)]
        self._above = [_Bets(point, 1, _EFFECTS) for point in self.points]
        # What these win by is a distance of almost nothing.
        self._below = [[_Bets(point, -1, (point / 2, point)) for _ in self._sets] for point in self.points]
        self._rates = tuple([_Rate(1 / buckets) for _ in range(buckets)] for _ in range(2))

    @staticmethod
    def value(counts: Sequence[int]) -> tuple[float, ...]:
        """The value of a unit with so many predictions in each bucket."""
        n = sum(counts)
        return tuple(count / n for count in counts)

    @property
    def above(self) -> list[float]:
        return [bets.highest for bets in self._above]

    @property
    def below(self) -> list[float]:
        return [min(bets.highest for bets in of_sets) for of_sets in self._below]

    def _all_bets(self) -> Iterator[_Bets]:
        yield from self._above
        for of_sets in self._below:
            yield from of_sets

    def _all_rates(self) -> Iterator[_Rate]:
        for rates in self._rates:
            yield from rates

    def _settle(self, candidate: Counter[tuple[float, ...]], stable: Counter[tuple[float, ...]]) -> None:
        ours, theirs = ([rate.value for rate in rates] for rates in self._rates)
        worst = tuple(b for b, (a, c) in enumerate(zip(ours, theirs, strict=True)) if a > c)
        for number, chosen in enumerate((*self._sets, worst)):
            sides = [of_sets[number] for of_sets in self._below] if number < len(self._sets) else self._above
            seen = _within(chosen, candidate), _within(chosen, stable)
            rates = sum(ours[b] for b in chosen), sum(theirs[b] for b in chosen)
            for bets in sides if chosen else ():
                bets.settle(*seen, *rates)
        for rates_of, values in zip(self._rates, (candidate, stable), strict=True):
            for bucket, rate in enumerate(rates_of):
                rate.add(values.total(), sum(shares[bucket] * count for shares, count in values.items()))


def in_buckets(counts: Sequence[int]) -> dict[tuple[float, ...], int]:
    """Counts of predictions by bucket as :meth:`Shift.add` takes them."""
    return {
        tuple(float(b == bucket) for b in range(len(counts))): count for bucket, count in enumerate(counts)
    }


class Units:
    """A confidence sequence where whole units, such as users, were assigned, each with many requests; of the average unit.

    A unit's requests depend on each other, and the same units come again, so a look is no new evidence beside the one before
    it. Each look bets anew on all that the units of the present step have done, in the order of their hashes; it is made when
    their requests have grown by a quarter, and the k-th one has the share 6 / (k pi)^2 of ``alpha``.

    :param new: makes what judges, such as ``lambda: Harm([0.0, 0.01])``.
    """

    def __init__(self, new: Callable[[], Harm | Shift]) -> None:
        self.points = new().points
        self._looks: list[tuple[list[float], list[float]]] = []  # above and below of each
        self._new = new
        self._step: Hashable = None
        self._next = 0.0

    def look(
        self,
        candidate: Mapping[int, Sequence[int]],
        stable: Mapping[int, Sequence[int]],
        step: Hashable = None,
    ) -> bool:
        """Look at all units that a step has had, by hash, if it is time to; says whether it was.

        :param candidate: the counts of each unit: good and bad requests for :class:`Harm`, predictions by bucket for :class:`Shift`.
        """
        if step != self._step:
            self._step, self._next = step, 0.0
        requests = sum(sum(counts) for track in (candidate, stable) for counts in track.values())
        if requests < self._next or min(len(candidate), len(stable)) < _FEWEST_UNITS:
            return False
        self._next = requests * _GROWTH
        judge = self._new()
        for unit in sorted({*candidate, *stable}):
            ours, theirs = (
                {judge.value(track[unit]): 1} if sum(track.get(unit, ())) else {}
                for track in (candidate, stable)
            )
            judge.add(ours, theirs)  # type: ignore[arg-type]
        judge.finish()
        self._looks.append((judge.above, judge.below))
        return True

    def state(self) -> dict[str, Any]:
        """See :meth:`Harm.state`."""
        return {"step": self._step, "next": self._next, "looks": self._looks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Harm.restore`."""
        self._step, self._next = state["step"], state["next"]
        self._looks = [(above, below) for above, below in state["looks"]]

    def lower(self, alpha: float) -> float:
        """The truth is certainly above this point, with an error probability of ``alpha`` over all looks; or ``-inf``."""
        return max(self._best(alpha, 0), default=-math.inf)

    def upper(self, alpha: float) -> float:
        """The truth is certainly below this point, with an error probability of ``alpha`` over all looks; or ``inf``."""
        return min(self._best(alpha, 1), default=math.inf)

    def _best(self, alpha: float, side: int) -> Iterator[float]:
        for k, capitals in enumerate(self._looks, 1):
            yield from _reached(self.points, capitals[side], -math.log(alpha * 6 / (k * math.pi) ** 2))


class Share:
    """Tests whether a split is the one that was asked for, at every look.

    The likelihood of a share between 0 and 1, averaged over a beta distribution around the one asked for, against that one's own.
    A new share begins a new test; the k-th has the share 6 / (k pi)^2 of ``alpha``.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        self._tests = 0
        self._seen = (0, 0)
        self.highest = 0.0

    def add(self, asked: float, candidate: int, stable: int) -> None:
        """Take how many units each track got since the last call, while the candidate should have had the share ``asked``."""
        if not 0 < asked < 1:
            return  # nothing is split
        if asked != self._asked:
            self._asked, self._seen, self.highest = asked, (0, 0), 0.0
            self._tests += 1
        ours, theirs = self._seen = (self._seen[0] + candidate, self._seen[1] + stable)
        a, b = 2 * asked, 2 * (1 - asked)
        capital = _log_beta(a + ours, b + theirs) - _log_beta(a, b)
        capital -= ours * math.log(asked) + theirs * math.log1p(-asked)
        self.highest = max(self.highest, capital)

    def state(self) -> dict[str, Any]:
        """See :meth:`Harm.state`."""
        return {"asked": self._asked, "tests": self._tests, "seen": self._seen, "highest": self.highest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Harm.restore`."""
        self._asked, self._tests, self.highest = state["asked"], state["tests"], state["highest"]
        self._seen = tuple(state["seen"])

    def differs(self, alpha: float) -> bool:
        """Whether the present split is certainly another one, with an error probability of ``alpha`` over all looks and shares."""
        return self._tests > 0 and self.highest >= -math.log(alpha * 6 / (self._tests * math.pi) ** 2)


class _Bets:
    """Capital against one point, shared out among bets on truths at several distances from it and on an estimate.

    :param sign: 1 bets that the truth is above the point, -1 that it is below.
    """

    def __init__(self, harm: float, sign: int, effects: tuple[float, ...]) -> None:
        self.harm = harm
        self.sign = sign
        self.effects = effects
        self.capitals = [0.0] * (len(effects) + 1)  # logarithms
        self.highest = 0.0  # of the logarithm of their average

    def state(self) -> list[Any]:
        """What has been won so far."""
        return [self.highest, self.capitals]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on with what was won."""
        self.highest, self.capitals = state[0], list(state[1])

    def settle(
        self,
        candidate: Mapping[float, int],
        stable: Mapping[float, int],
        ours: float,
        theirs: float,
        caution: float = 1.0,
    ) -> None:
        """Settle the bets on one block; ``ours`` and ``theirs`` are estimates of the rates from the blocks before it."""
        for place, effect in enumerate((*self.effects, None)):
            rate = ours if effect is None else theirs + self.harm + self.sign * effect
            rate = min(max(rate, _EDGE), 1 - _EDGE)
            if self.sign * (rate - theirs - self.harm) > 0:  # else there is nothing to win
                self.capitals[place] += _won(candidate, stable, rate, theirs, self.harm) / caution
        top = max(self.capitals)
        average = top + math.log(sum(math.exp(c - top) for c in self.capitals) / len(self.capitals))
        self.highest = max(self.highest, average)


def _won(
    candidate: Mapping[float, int], stable: Mapping[float, int], ours: float, theirs: float, harm: float
) -> float:
    """Logarithm of what a bet on the rates ``ours`` and ``theirs``, against rates that are ``harm`` apart, wins on a block.

    With rates ``a`` and ``b = a - harm``, a value ``y`` of the candidate multiplies the capital by ``1 + (y - a) * stake``, one of
    stable by ``1 - (y - b) * stake * n / m``, where ``n`` and ``m`` count the values of the two. If the true rates are less than
    ``harm`` apart (and ``stake`` is positive), the product is expected to be at most
    ``exp(n * stake * (difference of the true rates - harm)) <= 1``, whatever they are.
    """
    low, high = max(_EDGE, _EDGE - harm), min(1 - _EDGE, 1 - _EDGE - harm)
    if low > high:
        return 0.0
    n, m = sum(candidate.values()), sum(stable.values())
    # The rates on the border that are nearest to those bet on, in Kullback-Leibler divergence: there the capital grows fastest.
    a, b = ours, theirs
    for _ in range(4):
        weight_a, weight_b = n / (a * (1 - a)), m / (b * (1 - b))
        b = (weight_a * (ours - harm) + weight_b * theirs) / (weight_a + weight_b)
        b = min(max(b, low), high)
        a = b + harm
    stake = (ours - a) / (a * (1 - a))
    # No value may take all of the capital.
    loss = abs(stake) * max(a if stake > 0 else 1 - a, (1 - b if stake > 0 else b) * n / m)
    if loss > 0.98:
        stake *= 0.98 / loss
    other = stake * n / m
    return sum(count * math.log1p((y - a) * stake) for y, count in candidate.items()) + sum(
        count * math.log1p((b - y) * other) for y, count in stable.items()
    )


class _Rate:
    """A rate that may change slowly, estimated from what has come."""

    def __init__(self, prior: float) -> None:
        self.n = _PRIOR_WEIGHT
        self.total = prior * _PRIOR_WEIGHT

    def add(self, n: int, total: float) -> None:
        """Count more."""
        keep = _MEMORY / (_MEMORY + n)
        self.n, self.total = self.n * keep + n, self.total * keep + total

    def state(self) -> list[float]:
        """What was counted."""
        return [self.n, self.total]

    def restore(self, state: Sequence[float]) -> None:
        """Count on."""
        self.n, self.total = state

    @property
    def value(self) -> float:
        """The estimate."""
        return min(max(self.total / self.n, _EDGE), 1 - _EDGE)


def _within(chosen: Sequence[int], seen: Mapping[tuple[float, ...], int]) -> dict[float, int]:
    """How much of each value is in some buckets."""
    found: dict[float, int] = {}
    for shares, count in seen.items():
        y = min(1.0, sum(shares[b] for b in chosen))
        found[y] = found.get(y, 0) + count
    return found


def _reached(points: Sequence[float], capitals: Sequence[float], needed: float) -> list[float]:
    return [point for point, capital in zip(points, capitals, strict=True) if capital >= needed]


def _caution(scores: Sequence[float]) -> float:
    """How many times more than by chance the difference of the tracks varies, on the time scale that is worst."""
    worst, width = 1.0, 1
    while width == 1 or len(scores) // width >= 4:
        groups = [
            sum(scores[i : i + width]) / math.sqrt(width) for i in range(0, len(scores) - width + 1, width)
        ]
        middle = sum(groups) / max(1, len(groups))
        # Before anything is known it is taken to be 2, as if 4 groups had said so.
        spread = (8.0 + sum((g - middle) ** 2 for g in groups)) / (4 + max(0, len(groups) - 1))
        worst = max(worst, spread)
        width *= 2
    return worst


def _score(candidate: Mapping[float, int], stable: Mapping[float, int]) -> list[float]:
    """The difference of the tracks in a block, in standard errors; nothing where all values are equal."""
    n, m = sum(candidate.values()), sum(stable.values())
    ours, theirs = (sum(y * c for y, c in seen.items()) for seen in (candidate, stable))
    pooled = (ours + theirs) / (n + m)
    variance = pooled * (1 - pooled) * (1 / n + 1 / m)
    return [(ours / n - theirs / m) / math.sqrt(variance)] if variance > 0 else []


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
