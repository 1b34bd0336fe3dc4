"""The judge of canaries, by simulation: how often healthy releases are aborted, harmful ones promoted, and how soon either is seen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lepton_airflow.statistics.sequential import Harm, Share, Shift, Units, in_buckets, tally

ALPHA = 0.01
RUNS = 60


def constant(rate: float) -> Callable[[int], float]:
    return lambda _look: rate


class Traffic:
    """Requests that are assigned one by one, and fail at rates that may change."""

    def __init__(self, seed: int, per_look: float = 500, share: float = 0.1) -> None:
        self.rng = np.random.default_rng(seed)
        self.per_look, self.share = per_look, share

    def counts(self, share: float | None = None) -> tuple[int, int]:
        n = self.rng.poisson(self.per_look)
        ours = self.rng.binomial(n, share or self.share)
        return int(ours), int(n - ours)

    def bad(self, n: int, rate: float) -> dict[float, int]:
        return tally(n, int(self.rng.binomial(n, rate)))


def decided(judge: Harm | Shift | Units, tolerance: float, largest: float) -> str | None:
    if judge.lower(ALPHA) >= tolerance:
        return "rollback"
    return "promote" if judge.upper(ALPHA) <= largest else None


def judged(
    seed: int, candidate: Callable[[int], float], stable: Callable[[int], float], looks: int, **more: float
) -> tuple[str | None, int]:
    """The decision and the look at which it fell."""
    traffic = Traffic(seed, **more)
    harm = Harm([0.0, 0.008])
    for look in range(looks):
        n, m = traffic.counts()
        harm.add(traffic.bad(n, candidate(look)), traffic.bad(m, stable(look)))
        if decision := decided(harm, 0.0, 0.008):
            return decision, look + 1
    return None, looks


def decisions(runs: Iterator[tuple[str | None, int]]) -> tuple[dict[str | None, int], float]:
    found = list(runs)
    return {d: sum(x == d for x, _ in found) for d in {d for d, _ in found}}, float(
        np.median([k for _, k in found])
    )


@pytest.mark.parametrize("per_look", [50, 500])
def test_equal_rates_are_promoted_and_not_aborted(per_look: float) -> None:
    found, _ = decisions(
        judged(seed, constant(0.01), constant(0.01), 400, per_look=per_look) for seed in range(RUNS)
    )
    assert "rollback" not in found
    assert found["promote"] >= 0.9 * RUNS or per_look == 50


def test_the_largest_harm_is_not_promoted() -> None:
    found, _ = decisions(
        judged(seed, constant(0.0181), constant(0.01), 400, share=0.5) for seed in range(RUNS)
    )
    assert "promote" not in found


def test_a_rate_of_one_percent_that_doubles_is_seen_within_2_500_requests_of_the_candidate() -> None:
    found, look = decisions(judged(seed, constant(0.02), constant(0.01), 400) for seed in range(RUNS))
    assert found["rollback"] >= 0.97 * RUNS  # promoting it is an error, too, of at most ALPHA
    assert look * 50 < 2500


def test_errors_that_stable_does_not_have_count_from_the_first() -> None:
    found, look = decisions(judged(seed, constant(0.05), constant(0.0), 100) for seed in range(RUNS))
    assert set(found) == {"rollback"}
    assert look * 50 < 200  # ten errors


def test_rates_and_shares_that_change_over_a_day_make_no_harm() -> None:
    def runs() -> Iterator[tuple[str | None, int]]:
        for seed in range(RUNS // 2):
            traffic, harm = Traffic(seed, 1500), Harm([0.0])
            for look in range(120):
                share = (0.05, 0.25, 0.5)[look // 40]
                rate = (
                    0.005 + 0.02 * look / 120
                )  # pooled over the day, the candidate would look a third worse
                n, m = traffic.counts(share)
                harm.add(traffic.bad(n, rate), traffic.bad(m, rate), step=share)
            yield decided(harm, 0.0, -1.0), 0

    assert "rollback" not in decisions(runs())[0]


def test_the_interval_holds_the_truth() -> None:
    points = [k / 100 for k in range(-4, 9)]
    for seed in range(12):
        traffic, harm = Traffic(seed, 500, 0.3), Harm(points)
        for _ in range(60):
            n, m = traffic.counts()
            harm.add(traffic.bad(n, 0.052), traffic.bad(m, 0.03))
            assert harm.lower(ALPHA) <= 0.022 <= harm.upper(ALPHA)
        assert harm.lower(ALPHA) > -0.03
        assert harm.upper(ALPHA) < 0.08


@pytest.mark.parametrize("own", [False, True])
def test_times_that_depend_on_each_other_abort_no_healthy_release(own: bool) -> None:
    def runs() -> Iterator[tuple[str | None, int]]:
        for seed in range(RUNS):
            traffic, harm, load = Traffic(seed), Harm([0.01, 0.04], cautious=True), np.zeros(2)
            for _ in range(100):
                shock = traffic.rng.normal(0, 0.13 if own else 0.35, 2)
                load = 0.9 * load + (shock if own else shock[0])  # slow for ten looks at a time
                rates = 1 / (1 + np.exp(3 - load))
                n, m = traffic.counts()
                harm.add(traffic.bad(n, rates[0]), traffic.bad(m, rates[1]))
                if decision := decided(harm, 0.01, 0.04):
                    break
            yield decision, 0

    found, _ = decisions(runs())
    assert found.get("rollback", 0) <= 1
    assert found.get("promote", 0) > 0.9 * RUNS


# -- predictions ---------------------------------------------------------------------------------------------------------

EVEN = [1 / 6] * 6


@pytest.mark.parametrize(
    ("candidate", "wanted", "within"),
    [
        (EVEN, "promote", 3000),
        (
            [0.2, 0.18, 0.16, 0.16, 0.15, 0.15],
            "promote",
            3000,
        ),  # a better model predicts otherwise: a distance of 0.05
        ([0, 0, 1, 0, 0, 0], "rollback", 150),  # constant
        ([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], "rollback", 600),  # a distance of 0.27
    ],
)
def test_predictions_may_differ_as_much_as_they_should_and_no_more(
    candidate: list[float], wanted: str, within: int
) -> None:
    needed = []
    for seed in range(6):
        traffic, shift = Traffic(seed, 300), Shift(6, [0.1, 0.2])
        asked = 0
        while (decision := decided(shift, 0.1, 0.2)) is None and asked < 5000:
            n, m = traffic.counts()
            asked += n
            shift.add(
                in_buckets(traffic.rng.multinomial(n, candidate).tolist()),
                in_buckets(traffic.rng.multinomial(m, EVEN).tolist()),
            )
        assert decision == wanted
        needed.append(asked)
    assert np.median(needed) < within


def test_distances_at_the_tolerance_are_rarely_taken_for_larger_ones() -> None:
    aborted = 0
    for seed in range(RUNS // 2):
        traffic, shift = Traffic(seed, 1000, 0.3), Shift(3, [0.1])
        for _ in range(30):
            n, m = traffic.counts()
            shift.add(
                in_buckets(traffic.rng.multinomial(n, [0.43, 0.3, 0.27]).tolist()),
                in_buckets(traffic.rng.multinomial(m, [0.33, 0.3, 0.37]).tolist()),
            )
        aborted += shift.lower(ALPHA) >= 0.1
    assert aborted <= 1


# -- units ---------------------------------------------------------------------------------------------------------------


def by_unit(seed: int, harm: float, looks: int, users: int = 1000) -> tuple[Units, str | None]:
    """Users with very unequal numbers of requests and rates of errors; each stays with one track."""
    rng = np.random.default_rng(seed)
    often = rng.pareto(1.5, users) + 0.05
    often *= 3000 / often.sum()
    rates = rng.beta(0.3, 29.7, users)
    ours = rng.random(users) < 0.2
    rates = np.where(ours, np.minimum(1, rates + harm), rates)
    n, bad = np.zeros(users, int), np.zeros(users, int)
    units = Units(lambda: Harm([0.0, 0.05]))
    for _ in range(looks):
        new = rng.poisson(often)
        n, bad = n + new, bad + rng.binomial(new, rates)
        tracks = (
            {int(u): (int(n[u] - bad[u]), int(bad[u])) for u in np.flatnonzero((n > 0) & of)}
            for of in (ours, ~ours)
        )
        units.look(*tracks)
        if decision := decided(units, 0.0, 0.05):
            return units, decision
    return units, None


def test_users_count_once_however_often_they_ask() -> None:
    found = [by_unit(seed, 0.0, 30)[1] for seed in range(RUNS // 2)]
    assert "rollback" not in found
    assert [by_unit(seed, 0.1, 30)[1] for seed in range(10)] == ["rollback"] * 10


def test_requests_of_few_users_abort_healthy_releases_where_they_are_counted_as_such() -> None:
    """What the test above is for."""
    aborted = 0
    for seed in range(RUNS // 2):
        rng = np.random.default_rng(seed)
        rates, ours = rng.beta(0.3, 29.7, 300), rng.random(300) < 0.2
        harm = Harm([0.0])
        for _ in range(30):
            new = rng.poisson(10, 300)
            bad = rng.binomial(new, rates)
            harm.add(*(tally(int(new[of].sum()), int(bad[of].sum())) for of in (ours, ~ours)))
        aborted += harm.lower(ALPHA) >= 0
    assert aborted > 0.1 * RUNS // 2


# -- shares --------------------------------------------------------------------------------------------------------------


def test_a_split_that_happens_is_believed_and_one_that_does_not_is_found() -> None:
    wrong = 0
    for seed in range(RUNS):
        traffic, share = Traffic(seed, 50), Share()
        for look in range(100):
            asked = (0.1, 0.25, 0.5)[look // 34]
            share.add(asked, *traffic.counts(asked))
            wrong += share.differs(ALPHA)
    assert wrong == 0
    share = Share()
    for _ in range(20):  # weights that split nothing
        share.add(0.1, 0, 10)
    assert share.differs(ALPHA)


def test_nothing_is_said_of_a_share_of_nothing() -> None:
    share = Share()
    share.add(0.0, 100, 0)
    assert not share.differs(ALPHA)


# -- the bets ------------------------------------------------------------------------------------------------------------


def test_no_bet_can_be_expected_to_win_where_the_point_is_true() -> None:
    """The expected capital after one block, exactly, over all outcomes of 4 and 6 requests."""
    from lepton_airflow.statistics.sequential import _won

    for harm, sign in [(0.0, 1), (0.1, 1), (0.1, -1), (-0.2, 1), (0.05, -1)]:
        for theirs in (0.01, 0.3, 0.8):
            for ours in (theirs + harm + sign * 0.05, theirs + harm + sign * 0.3):
                if not 0 < ours < 1:
                    continue
                for b in (0.0, 0.05, 0.3, 0.7, 1.0):
                    for beyond in (0.0, 0.1):  # the truth lies on the border, or on the other side of it
                        a = b + harm - sign * beyond
                        if not 0 <= a <= 1:
                            continue
                        expected = sum(
                            stats.binom.pmf(x, 4, a)
                            * stats.binom.pmf(y, 6, b)
                            * math.exp(_won(tally(4, x), tally(6, y), ours, theirs, harm))
                            for x in range(5)
                            for y in range(7)
                        )
                        assert expected <= 1 + 1e-9


def _units_again(judge: Units, rng: np.random.Generator) -> None:
    judge.look(
        *({int(u): (int(rng.poisson(30)), 1) for u in rng.integers(0, 10**6, 50)} for _ in range(2)), step=1
    )


@pytest.mark.parametrize(
    ("make", "feed"),
    [
        (
            lambda: Harm([0.0, 0.1]),
            lambda j, r: j.add(tally(70, int(r.poisson(9))), tally(70, int(r.poisson(3))), 1),
        ),
        (
            lambda: Harm([0.0, 0.1], cautious=True),
            lambda j, r: j.add(tally(90, int(r.poisson(9))), tally(90, int(r.poisson(3))), 1),
        ),
        (
            lambda: Shift(3, [0.0, 0.1]),
            lambda j, r: j.add(
                in_buckets([40, int(r.poisson(9)), 3]), in_buckets([20, int(r.poisson(9)), 9]), 1
            ),
        ),
        (lambda: Units(lambda: Harm([0.0, 0.1])), _units_again),
        (Share, lambda j, r: j.add(0.3, int(r.poisson(9)), 7)),
    ],
    ids=["harm", "cautious", "shift", "units", "share"],
)
def test_who_goes_on_after_a_kill_comes_to_the_same(
    make: Callable[[], Any], feed: Callable[[Any, Any], Any]
) -> None:
    rng = np.random.default_rng(1)
    judge = make()
    for _ in range(15):
        feed(judge, rng)
    again = make()
    again.restore(json.loads(json.dumps(judge.state())))
    rngs = [np.random.default_rng(2) for _ in range(2)]
    for _ in range(10):
        feed(judge, rngs[0])
        feed(again, rngs[1])
    assert judge.state() == again.state()


def test_the_step_apart_is_not_compared_with_the_next() -> None:
    harm = Harm([0.0])
    harm.add(tally(0, 0), tally(1000, 0), step=0.0)
    harm.add(tally(1000, 500), {}, step=1.0)
    harm.finish()
    assert harm.lower(0.5) == -math.inf


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="seen -1 times"):
        Harm([0.0]).add(tally(1, 2), tally(1, 0))


def test_a_trigger_loads_the_standard_library_and_nothing_more() -> None:
    code = "import sys, lepton_airflow.statistics.sequential; print('numpy' in sys.modules, 'scipy' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["False", "False"]
