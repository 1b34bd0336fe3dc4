"""What a canary does next, over simulated traffic: promoted, rolled back, or left to a person."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from lepton_airflow.delivery.judge import Action, Evidence, Plan, Seen, State, advance
from lepton_airflow.errors import BadConfiguration

PLAN = Plan(
    steps=(0.1, 0.5),
    bake_s=60,
    min_units=500,
    tolerance={"errors": 0.0, "slow": 0.05, "predictions": 0.1},
    max_harm={"errors": 0.01, "slow": 0.1, "predictions": 0.2},
    deadline_s=3600,
    buckets=4,
)
EVEN = (0.25, 0.25, 0.25, 0.25)
GOOD: dict[str, Any] = {"errors": 0.01, "slow": 0.02, "predictions": EVEN}


def run(
    plan: Plan, candidate: dict[str, Any], per_look: float = 500, split: float = 1.0, seed: int = 1
) -> tuple[Action, float, State]:
    """Looks every 10 s until a decision falls; the state goes through JSON each time, as in the store."""
    rng = np.random.default_rng(seed)
    state, elapsed, began = State(), 0.0, 0.0

    def seen(n: int, rates: dict[str, Any]) -> Seen:
        errors = int(rng.binomial(n, rates["errors"]))
        return Seen(
            n,
            errors,
            int(rng.binomial(n, rates["slow"])),
            tuple(rng.multinomial(n - errors, rates["predictions"]).tolist()),
        )

    while True:
        elapsed += 10
        n = int(rng.poisson(per_look))
        ours = int(rng.binomial(n, plan.steps[state.step] * split))
        evidence = Evidence(
            elapsed_s=elapsed,
            step_s=elapsed - began,
            candidate=seen(ours, candidate),
            stable=seen(n - ours, GOOD),
            units=(ours, n - ours),
        )
        state, action = advance(plan, State(**json.loads(json.dumps(asdict(state)))), evidence)
        if action.what == "next":
            began = elapsed
        elif action.what != "wait":
            return action, elapsed, state


@pytest.mark.parametrize(
    ("candidate", "what", "words"),
    [
        (GOOD, "promote", "certainly below"),
        # A better model predicts otherwise, and may be a little slower.
        (GOOD | {"slow": 0.04, "predictions": (0.3, 0.24, 0.23, 0.23)}, "promote", "certainly below"),
        (GOOD | {"errors": 0.05}, "rollback", "errors: the candidate's harm is certainly above 0"),
        (GOOD | {"slow": 0.3}, "rollback", "slow: .* certainly above 0.0?5"),
        (GOOD | {"predictions": (1.0, 0, 0, 0)}, "rollback", "predictions: .* 0.1 is tolerated"),
    ],
)
def test_it_is_judged_by_its_harm(candidate: dict[str, Any], what: str, words: str) -> None:
    action, elapsed, state = run(PLAN, candidate)
    assert action.what == what
    assert re.search(words, action.sentence)
    if what == "promote":
        assert state.step == 1  # not before its last step
        assert elapsed >= 120
    else:
        assert elapsed <= 600


def test_no_traffic_is_no_failure_and_no_success() -> None:
    action, elapsed, state = run(PLAN, GOOD, per_look=0.0)
    assert (action.what, elapsed, state.step) == ("inconclusive", 3600, 0)


def test_what_cannot_be_told_within_the_time_is_inconclusive() -> None:
    action, _, _ = run(PLAN, GOOD | {"errors": 0.013}, per_look=15)
    assert action.what == "inconclusive"
    assert "errors" in action.sentence


@pytest.mark.parametrize("split", [0.0, 0.5, 1.6])
def test_a_split_that_does_not_happen_is_rolled_back(split: float) -> None:
    action, elapsed, _ = run(PLAN, GOOD, split=split)
    assert (action.what, elapsed <= 120) == ("rollback", True)
    assert "10% of the units, and certainly does not" in action.sentence


def test_units_are_judged_as_units() -> None:
    plan = replace(PLAN, by_unit=True, buckets=0, steps=(0.3,), min_units=50)
    rng = np.random.default_rng(1)

    def looks(harm: float) -> Action:
        users = rng.beta(0.3, 29.7, 1500)
        ours = rng.random(1500) < 0.3
        state, n, bad = State(), np.zeros(1500, int), np.zeros(1500, int)
        for look in range(1, 40):
            new = rng.poisson(5, 1500)
            n, bad = n + new, bad + rng.binomial(new, np.where(ours, users + harm, users).clip(0, 1))
            of = [
                {int(u): Seen(int(n[u]), int(bad[u])) for u in np.flatnonzero(arm & (n > 0))}
                for arm in (ours, ~ours)
            ]
            evidence = Evidence(elapsed_s=10 * look, step_s=10 * look, by_unit=(of[0], of[1]))
            # Each unit is counted once for the split.
            evidence = replace(evidence, units=(len(of[0]), len(of[1])) if look == 1 else (0, 0))
            state, action = advance(plan, state, evidence)
            if action.what not in ("wait", "next"):
                break
        return action

    assert looks(0.1).what == "rollback"
    assert looks(0.0).what != "rollback"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": ()}, "rising shares"),
        ({"steps": (0.0, 0.5)}, "rising shares"),
        ({"steps": (0.5, 0.2)}, "rising shares"),
        ({"steps": (0.5, 1.0)}, "rising shares"),
        ({"tolerance": {"errors": 0.0}}, "tolerance and max_harm of slow"),
        ({"alpha": 0.5}, "alpha=0.5"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfiguration, match=words):
        replace(PLAN, **change)
