"""What a trainer declares, and what it is told and stopped by while it fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, Preempted
from lepton_airflow.training.trainer import Trainer, TrainerRun

DEFAULTS = {"rate": 0.1, "trees": 100, "warm": False, "weights": None, "kind": "l2"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, DEFAULTS),
        ({"rate": 1, "trees": 5.0}, DEFAULTS | {"rate": 1, "trees": 5}),
        ({"warm": True, "weights": "balanced", "kind": None}, DEFAULTS | {"warm": True, "weights": "balanced", "kind": None}),
    ],
)  # fmt: skip
def test_defaults_are_filled_in(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = Trainer("m", print, DEFAULTS, {}, "").complete(given)
    assert found == wanted
    assert list(found) == list(DEFAULTS)
    assert type(found["trees"]) is int
    assert Trainer("mine:fit", print, None, {}, "").complete({"any": object}) == {"any": object}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rat": 1}, "hyperparameters: m has no 'rat'; did you mean 'rate'"),
        ({"rate": "fast"}, r"rate='fast' is not a number \(default 0.1\)"),
        ({"rate": True}, r"rate=True is not a number \(default 0.1\)"),
        ({"trees": 1.5}, r"trees=1.5 is not a whole number \(default 100\)"),
        ({"trees": "5"}, r"trees='5' is not a number \(default 100\)"),
        ({"warm": 1}, r"warm=1 is not true or false \(default false\)"),
    ],
)
def test_a_wrong_hyperparameter_gets_a_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfiguration, match=message):
        Trainer("m", print, DEFAULTS, {}, "").complete(given)


def run_of(**about: Any) -> TrainerRun:
    info = DatasetInfo(target="y", task="regression", features=["x", "c"], categorical=["c"])
    return TrainerRun(info, ["x", "c"], "y", "regression", [], seed=0, threads=1, **about)


def test_a_trainer_knows_which_features_are_which() -> None:
    assert (run_of().categorical, run_of().numbers) == (["c"], ["x"])


def test_a_trainer_without_checkpoints_is_stopped_at_its_next_report() -> None:
    with pytest.raises(Preempted, match="at epoch 3; the next try starts this fit again"):
        run_of(should_stop=lambda: True).report(3, unit="epoch", loss=1.0)


def test_what_is_settled_is_kept_as_json_and_each_name_once() -> None:
    assert run_of().decided is None
    run = run_of()
    run.settle()
    assert run.decided == {}
    run.settle(trees=np.int64(57), rates=[0.5, 0.25])
    run.settle(trees=57)
    assert run.decided == {"trees": 57, "rates": [0.5, 0.25]}
    for number in (float("nan"), np.float64("inf"), [1.0, float("nan")], np.array([np.nan])):
        with pytest.raises(BadConfiguration, match="expected a finite number"):
            run.settle(rate=number)
    with pytest.raises(
        BadConfiguration, match=r"^run.settle\(stop=<object .*: expected a finite number, a text"
    ):
        run.settle(stop=object())
    run.settle(trees=58)
    with pytest.raises(BadConfiguration, match=r"^run.settle\(trees=58\): it was 57 before in the same fit"):
        _ = run.decided


def test_a_report_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run = run_of(say=said.append)
    clock = [run._pace[0][0]]
    monkeypatch.setattr("lepton_airflow.training.trainer.time.monotonic", lambda: clock[0])
    clock[0] += 600.0
    run.report(5, of=65, unit="epoch", train_loss=0.123456789)
    assert said.pop() == "epoch 5 of 65 train_loss=0.12346 (2 min per epoch, 2 h left at most)"
    for step in range(6, 66):  # faster from now on
        clock[0] += 0.001
        run.report(step, of=65, unit="epoch")
    assert said[-2:] == [
        "epoch 64 of 65 (1,000 epochs per s, 0.001 s left at most)",
        "epoch 65 of 65 (1,000 epochs per s)",
    ]
