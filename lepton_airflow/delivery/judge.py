"""What a canary does next: a pure function of its plan, its state and what was seen since the last look.

It reads no clock, no store and no server. So a trigger, a task and a test call the same function, and whoever takes a canary over
goes on from the state that was kept. Nothing calls it yet: the servers do not split traffic so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.statistics.sequential import Harm, Share, Shift, Units, in_buckets, tally

METRICS = ("errors", "slow", "predictions")
# Harms that an interval may end at, beside those asked for.
_FINE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a canary was asked to do.

    :ivar steps: shares of the units that the candidate gets, one after the other, each above 0 and below 1, rising.
    :ivar bake_s: how long each step lasts at least [seconds].
    :ivar min_units: units that the candidate has to get in each step at least.
    :ivar tolerance: for each metric the harm above which the candidate is rolled back, once that is certain.
    :ivar max_harm: for each metric the harm below which it is promoted, once that is certain.
    :ivar alpha: the probability of rolling a harmless candidate back, and of promoting a harmful one, over all looks and metrics.
    :ivar deadline_s: when it ends undecided [seconds since its first look].
    :ivar by_unit: whether units, each with many requests, were assigned; else each request by itself.
    :ivar buckets: of predictions; 0: they are not judged.
    """

    steps: tuple[float, ...]
    bake_s: float
    min_units: int
    tolerance: Mapping[str, float]
    max_harm: Mapping[str, float]
    alpha: float = 0.01
    deadline_s: float = 6 * 3600.0
    by_unit: bool = False
    buckets: int = 0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.steps), (*self.steps, 1.0), strict=True))
        if not self.steps or not rising:
            raise BadConfiguration(
                f"steps={list(self.steps)}: expected rising shares above 0 and below 1, such as [0.05, 0.25, 0.5]."
            )
        for metric in self.metrics:
            tolerated, largest = self.tolerance.get(metric), self.max_harm.get(metric)
            if tolerated is None or largest is None or not 0 <= tolerated < 1 or not 0 < largest < 1:
                raise BadConfiguration(
                    f"tolerance and max_harm of {metric} are {tolerated} and {largest}: expected shares, max_harm above 0."
                )
        if not 0 < self.alpha < 0.5:
            raise BadConfiguration(f"alpha={self.alpha}: expected a probability above 0 and below 0.5.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is judged."""
        return METRICS if self.buckets else METRICS[:2]


@dataclass(frozen=True)
class Seen:
    """What one track answered: requests, how many of them failed, answers slower than the SLO, predictions by bucket."""

    requests: int = 0
    errors: int = 0
    slow: int = 0
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen since the last look, at the weight of the present step.

    :ivar elapsed_s: since the canary's first look, and ``step_s`` since its present weight was seen at all servers.
    :ivar candidate: what it answered, and what it failed to answer, which stable did in its place.
    :ivar units: how many units, or requests, each track got, candidate's first.
    :ivar by_unit: all that each unit of a sample has done in this step, by the hash of its name, candidate's first.
    """

    elapsed_s: float
    step_s: float
    candidate: Seen = field(default_factory=Seen)
    stable: Seen = field(default_factory=Seen)
    units: tuple[int, int] = (0, 0)
    by_unit: tuple[Mapping[int, Seen], Mapping[int, Seen]] = ({}, {})


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a canary; plain JSON.

    :ivar step: the number of its step, from 0 on.
    :ivar units: that the candidate got in this step.
    :ivar judges: of each metric, and of the split, what its confidence sequence knows.
    :ivar intervals: of each metric the harm's lower and upper end; None where nothing is certain yet.
    """

    step: int = 0
    units: int = 0
    judges: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """What to do, and the sentence that says why."""

    what: Literal["wait", "next", "promote", "rollback", "inconclusive"]
    sentence: str


def advance(plan: Plan, state: State, evidence: Evidence) -> tuple[State, Action]:
    """The state after a look, and what to do now.

    A canary is rolled back once its harm in any metric is certainly above the tolerance, or its split is certainly not the one
    asked for. It goes to its next step when this one has lasted long enough and had enough units, and is promoted in the last
    one once its harm in every metric is certainly below the largest that is allowed. No traffic is no evidence of anything.
    """
    judges = _judges(plan, state)
    weight = plan.steps[state.step]
    # Each metric, and the split, has its share of alpha.
    alpha = plan.alpha / (len(plan.metrics) + 1)
    split = judges["split"]
    split.add(weight, *evidence.units)
    for metric in plan.metrics:
        _look(judges[metric], metric, plan, state, evidence)
    intervals = {
        metric: (judges[metric].lower(alpha), judges[metric].upper(alpha)) for metric in plan.metrics
    }
    after = replace(
        state,
        units=state.units + evidence.units[0],
        judges={name: judge.state() for name, judge in judges.items()},
        intervals={metric: (_finite(low), _finite(high)) for metric, (low, high) in intervals.items()},
    )
    for metric, (low, _) in intervals.items():
        if low >= plan.tolerance[metric]:
            return after, Action(
                "rollback",
                f"{metric}: the candidate's harm is certainly above {low:g}, {plan.tolerance[metric]:g} is tolerated.",
            )
    if split.differs(alpha):
        return after, Action(
            "rollback", f"the candidate was to get {weight:.0%} of the units, and certainly does not."
        )
    open_ = [metric for metric, (_, high) in intervals.items() if high > plan.max_harm[metric]]
    baked = evidence.step_s >= plan.bake_s and after.units >= plan.min_units
    if baked and state.step + 1 < len(plan.steps):
        share = plan.steps[state.step + 1]
        return replace(after, step=state.step + 1, units=0), Action(
            "next", f"the candidate gets {share:.0%} now."
        )
    if baked and not open_:
        return after, Action(
            "promote", "the candidate's harm is certainly below the largest allowed in every metric."
        )
    if evidence.elapsed_s >= plan.deadline_s:
        what = f"of {' and '.join(open_)} it is" if open_ else "the last step is"
        return after, Action(
            "inconclusive", f"at the deadline {what} still open whether the candidate does harm."
        )
    waits = f"for certainty about {', '.join(open_)}" if open_ and baked else f"at {weight:.0%}"
    return after, Action("wait", f"waits {waits}: {after.units} units of at least {plan.min_units}.")


def _judges(plan: Plan, state: State) -> dict[str, Any]:
    """The confidence sequences, with what they knew."""
    judges: dict[str, Any] = {"split": Share()}
    for metric in plan.metrics:
        points = sorted({*_FINE, *(-p for p in _FINE), plan.tolerance[metric], plan.max_harm[metric]})
        if metric == "predictions":
            # Each point is bet against for every set of buckets.
            new: Any = partial(Shift, plan.buckets, [plan.tolerance[metric], plan.max_harm[metric]])
        else:
            new = partial(Harm, points, cautious=metric == "slow" and not plan.by_unit)
        judges[metric] = Units(new) if plan.by_unit else new()
    for name, judge in judges.items():
        if name in state.judges:
            judge.restore(state.judges[name])
    return judges


def _look(judge: Any, metric: str, plan: Plan, state: State, evidence: Evidence) -> None:
    if plan.by_unit:
        candidate, stable = (
            {unit: counts for unit, seen in of.items() if sum(counts := _counts(metric, seen))}
            for of in evidence.by_unit
        )
        judge.look(candidate, stable, state.step)
        return
    ours, theirs = (_counts(metric, seen) for seen in (evidence.candidate, evidence.stable))
    if metric == "predictions":
        judge.add(in_buckets(ours), in_buckets(theirs), state.step)
    else:
        judge.add(tally(sum(ours), ours[1]), tally(sum(theirs), theirs[1]), state.step)


def _counts(metric: str, seen: Seen) -> Sequence[int]:
    """Good and bad requests, or predictions by bucket."""
    if metric == "predictions":
        return seen.buckets
    bad = seen.errors if metric == "errors" else seen.slow
    return seen.requests - bad, bad


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
