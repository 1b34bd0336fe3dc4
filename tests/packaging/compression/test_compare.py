"""The decision, on real models of real data and on measurements made up for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_airflow.errors import BadConfiguration, BadInput, Preempted
from lepton_airflow.packaging.compression import compare as comparing
from lepton_airflow.packaging.compression.compare import Candidate, Rules, Work, compare
from lepton_airflow.packaging.compression.convert import METHODS
from lepton_airflow.packaging.compression.latency import Latency
from lepton_airflow.packaging.compression.quality import Judge, Quality
from lepton_airflow.packaging.session import open_session


def test_trees_have_nothing_to_quantize_and_are_not_timed(
    trees: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(*_: Any) -> None:
        raise AssertionError("converted though there is nothing to convert")

    monkeypatch.setattr(comparing, "convert", converted)
    found = trees.compare()
    assert found.chosen == "fp32"
    assert found.reason.startswith("kept fp32, because there is nothing to quantize: no Conv, Gemm or MatMul")
    assert "TreeEnsembleClassifier" in found.reason
    assert [c.verdict for c in found.candidates] == ["original", *["no-op"] * 3]
    assert not any(c.latency for c in found.candidates)


def test_a_network_is_measured_in_every_format(mlp: Any) -> None:
    found = mlp.compare()
    assert [c.name for c in found.candidates] == ["fp32", *METHODS]
    original = found.candidates[0]
    assert original.quality is not None
    assert original.quality.value > 0.8
    for c in found.candidates[1:]:
        assert c.quality is not None
        assert c.quality.difference_low <= c.quality.difference <= c.quality.difference_high
        assert c.quality.difference == pytest.approx(c.quality.value - original.quality.value)
        assert c.difference is not None
        assert 0 < c.difference < 0.5
        assert [item.batch for item in c.latency] == [64]
        assert c.verdict in ("better", "worse", "slower", "no gain")
        assert c.reason
    assert found.chosen in {"fp32"} | {c.name for c in found.candidates if c.verdict == "better"}


def test_a_candidate_that_cannot_be_made_is_reported_beside_the_others(mlp: Any) -> None:
    work = Work(
        output="probabilities",
        calibration=lambda: iter(()),
        predict=mlp.predict,
        timing={1: list(mlp.batches(1))[:4]},
    )
    found = {c.name: c for c in mlp.compare(work=work).candidates}
    assert found["static_int8"].verdict == "failed"
    assert found["static_int8"].reason == "it cannot be made or run: No data is collected."
    assert found["dynamic_int8"].latency


def test_the_script_that_tries_a_model_opens_and_runs_it(mlp: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(mlp.model)
    feed = {name: values[:3] for name, values in mlp.feed.items()}

    def run(output: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", comparing._TRY, str(tmp_path / "model.onnx"), output],
            input=comparing._feed_as_json(feed),
            check=False,
            capture_output=True,
            text=True,
        )

    good, bad = run("probabilities"), run("no such output")
    assert good.returncode == 0, good.stderr
    assert bad.returncode == 1
    assert "no such output" in bad.stderr


def test_a_format_that_kills_onnxruntime_is_reported(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_TRY", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = mlp.compare(methods=["fp16"])
    assert found.candidates[1].verdict == "failed"
    assert found.reason.endswith(
        "fp16: it cannot be made or run: onnxruntime dies of signal 11 when it opens or runs it"
    )


def test_a_format_that_hangs_onnxruntime_is_reported(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_TRY", "import signal; signal.pause()")
    monkeypatch.setattr(comparing, "_TRY_S", 1)
    found = mlp.compare(methods=["fp16"])
    assert found.candidates[1].verdict == "failed"
    assert found.reason.endswith("onnxruntime has not run one batch of it within 1 s")


def test_a_format_that_overflows_is_worse(products: Callable[[int], bytes]) -> None:
    feed = {"x0": np.linspace(1, 9, 40 * 256, dtype=np.float32).reshape(40, 256) * 20_000}
    original = products(2)

    def predict(model: bytes) -> np.ndarray:
        predicted = open_session(model).run(["out"], feed)[0].max(axis=1)
        # As on a machine with 16-bit products; on this one they are made of 32 bits.
        with np.errstate(over="ignore"):
            return predicted if model == original else predicted.astype(np.float16)

    work = Work(output="out", calibration=lambda: iter([feed]), predict=predict, timing={40: [feed]})
    judge = Judge(y=feed["x0"].max(axis=1) * 1.01, metric="rmse", max_loss=100, resamples=100)
    found = compare(original, work, judge, ["fp16"], rounds=6, seconds=0.1).candidates[1]
    assert found.verdict == "worse"
    wrong = int((feed["x0"].max(axis=1) >= 65520).sum())
    assert found.reason == f"{wrong} of 40 predictions are missing or infinite"


JUDGE = Judge(y=[0, 1], metric="roc_auc", max_loss=0.01)
RULES = Rules(min_speedup=1.2, max_slowdown=0.05, min_shrink=2.0)


def quality(low: float) -> Quality:
    return Quality("roc_auc", 0.8, 0.7, 0.9, low + 0.01, low, low + 0.02)


@pytest.mark.parametrize(
    ("low", "speedups", "size", "verdict"),
    [
        (-0.005, [(1.2, 1.5), (1.0, 1.1)], 90, "better"),  # faster at one, nowhere slower
        # Smaller and faster, but perhaps slower at the other batch size.
        (-0.005, [(1.2, 1.5), (0.94, 1.1)], 25, "no gain"),
        (-0.005, [(1.2, 1.5), (0.5, 0.9)], 25, "slower"),
        (-0.005, [(0.96, 1.1), (1.0, 1.1)], 50, "better"),  # no faster, but half the size
        (-0.005, [(1.0, 1.1), (1.0, 1.1)], 51, "no gain"),
        (-0.011, [(3.0, 4.0), (3.0, 4.0)], 25, "worse"),
        (-0.01, [(3.0, 4.0), (3.0, 4.0)], 25, "worse"),  # at the margin is not above it
    ],
)
def test_verdicts(low: float, speedups: list[tuple[float, float]], size: int, verdict: str) -> None:
    latency = [Latency(b, 1.0, 1.0, (s + t) / 2, s, t) for b, (s, t) in zip((1, 64), speedups, strict=True)]
    found = Candidate("static_int8", "", "", size, None, quality(low))
    judged = comparing._judged(found, latency, 100, JUDGE, RULES)
    assert judged.verdict == verdict
    assert judged.reason
    assert judged.latency == latency


def test_the_fastest_is_chosen_and_without_one_the_smallest() -> None:
    def candidate(name: str, speedup: float, size: int, verdict: str = "better") -> Candidate:
        return Candidate(
            name, verdict, "", size, None, quality(0), [Latency(1, 1, 1, speedup, speedup, speedup)]
        )

    original = candidate("fp32", 1, 100, "original")
    fast, faster = candidate("a", 1.5, 20), candidate("b", 2.0, 80)
    small, smaller = candidate("c", 1.0, 40), candidate("d", 1.0, 30)
    choose: Callable[..., Candidate] = comparing._choose
    assert choose([original, small, fast, faster, smaller], RULES) is faster
    assert choose([original, small, smaller], RULES) is smaller
    assert choose([original, replace(faster, verdict="worse")], RULES) is original


def test_what_cannot_be_judged_is_one_sentence(mlp: Any) -> None:
    one_class = Judge(y=np.ones(len(mlp.y)), metric="roc_auc", max_loss=0.005)
    with pytest.raises(BadInput, match=r"roc_auc is not defined on these rows \(one class"):
        mlp.compare(judge=one_class)
    with pytest.raises(
        BadConfiguration, match=r"'static_int' is no number format; did you mean 'static_int8'\?"
    ):
        mlp.compare(methods=["static_int"])
    with pytest.raises(BadConfiguration, match="rounds=2"):
        mlp.compare(rounds=2)


def test_a_graph_that_cannot_be_prepared_stays_as_it_is(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: bytes) -> None:
        raise ValueError("no shape for tensor 'x'\nand a page of details")

    monkeypatch.setattr(comparing, "prepare", prepare)
    found = mlp.compare()
    assert found.chosen == "fp32"
    assert found.models == {"fp32": mlp.model}
    assert found.reason == "kept fp32, because onnxruntime cannot prepare the model: no shape for tensor 'x'"
    assert [c.verdict for c in found.candidates] == ["original", "failed", "failed", "failed"]


def test_a_conversion_that_changes_nothing_is_not_timed(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "convert", lambda prepared, *_: prepared)
    (_, candidate) = mlp.compare(methods=["dynamic_int8"]).candidates
    assert candidate.verdict == "no-op"
    assert candidate.reason == "the conversion changed none of the 3 Conv, Gemm and MatMul"
    assert not candidate.latency


def test_a_format_that_gives_no_probabilities_is_worse(mlp: Any) -> None:
    def predict(model: bytes) -> np.ndarray:
        return mlp.predict(model) * (1 if model == mlp.model else 1.5)

    work = Work(
        output="probabilities",
        calibration=mlp.batches,
        predict=predict,
        timing={64: list(mlp.batches(64))[:1]},
    )
    judge = Judge(y=mlp.y, metric="log_loss", max_loss=0.005, resamples=100)
    (_, candidate) = mlp.compare(work=work, judge=judge, methods=["dynamic_int8"]).candidates
    assert candidate.verdict == "worse"
    assert "expected a probability from 0 to 1" in candidate.reason


def test_nothing_asked_for_keeps_the_original_without_timing(mlp: Any) -> None:
    found = mlp.compare(methods=[])
    assert found.reason == "kept fp32, because no candidate was asked for"
    assert not found.candidates[0].latency


def test_it_stops_when_asked(mlp: Any) -> None:
    def stop() -> None:
        raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        mlp.compare(check_stop=stop)
