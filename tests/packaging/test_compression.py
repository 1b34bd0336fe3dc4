"""Conversion, timing and the decision, on real models of real data."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from lepton_airflow.errors import BadConfiguration, BadInput, Preempted
from lepton_airflow.packaging.compression import quantize as quantization
from lepton_airflow.packaging.compression.quantize import (
    METHODS,
    Candidate,
    Judge,
    Latency,
    Quality,
    Work,
    compare,
    convert,
    inspect,
    median_interval,
    open_session,
    prepare,
    time_side_by_side,
)
from lepton_airflow.packaging.export.fitted import Schema, as_fitted
from lepton_airflow.packaging.package import Feature

NUMBERS, TEXTS = ["hour", "distance", "dep_delay"], ["carrier", "origin"]
FEATURES = [Feature(n, "number", n) for n in NUMBERS] + [Feature(n, "category", n) for n in TEXTS]


@dataclass
class Trained:
    """A model as ONNX bytes, and the rows that it can be judged and calibrated on."""

    model: bytes
    feed: dict[str, np.ndarray]
    y: np.ndarray

    def batches(self, size: int = 256) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.y), size):
            yield {name: values[start : start + size] for name, values in self.feed.items()}

    def predict(self, model: bytes) -> np.ndarray:
        (predicted,) = open_session(model, 1).run(["probabilities"], self.feed)
        return predicted

    def compare(self, **changes: Any) -> quantization.Comparison:
        work = Work(
            output="probabilities",
            calibration=self.batches,
            predict=self.predict,
            timing={64: list(self.batches(64))[:4]},
        )
        judge = Judge(y=self.y, metric="roc_auc", max_loss=0.005, resamples=100)
        return compare(
            self.model,
            changes.pop("work", work),
            changes.pop("judge", judge),
            **{"rounds": 6, "seconds": 0.2} | changes,
        )


def flights(raw_flights: Path) -> pd.DataFrame:
    frame = pd.read_csv(raw_flights / "flights" / "2013-01.csv").dropna(subset=["arr_delay"]).iloc[::8]
    frame["late"] = (frame["arr_delay"] > 15).astype(int)
    return frame.reset_index(drop=True)


def pipeline(last: Any) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    texts = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_pipeline(ColumnTransformer([("n", numbers, NUMBERS), ("t", texts, TEXTS)]), last)


def trained(frame: pd.DataFrame, last: Any) -> Trained:
    estimator = pipeline(last).fit(frame[NUMBERS + TEXTS], frame["late"])
    model = as_fitted(estimator, Schema(FEATURES, "classification", [0, 1]), "test").to_onnx()
    feed = {n: frame[n].to_numpy(np.float32).reshape(-1, 1) for n in NUMBERS}
    feed |= {n: frame[n].to_numpy(object).reshape(-1, 1) for n in TEXTS}
    return Trained(model.SerializeToString(), feed, frame["late"].to_numpy())


@pytest.fixture(scope="module")
def mlp(raw_flights: Path) -> Trained:
    """A network behind imputation, scaling and one-hot encoding, over real flights with text and missing numbers."""
    from sklearn.neural_network import MLPClassifier

    frame = flights(raw_flights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few passes will do
        found = trained(frame, MLPClassifier((64, 64), max_iter=8, random_state=0))
    found.feed["dep_delay"][::50] = np.nan
    return found


@pytest.fixture(scope="module")
def trees(raw_flights: Path) -> Trained:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return trained(flights(raw_flights), HistGradientBoostingClassifier(max_iter=5, random_state=0))


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_only_the_products_change_and_text_still_goes_in(mlp: Trained, method: str) -> None:
    prepared = prepare(mlp.model)
    before = inspect(prepared)
    made = convert(prepared, method, mlp.batches)
    after = inspect(made)
    assert (before.linear, before.lowered, after.lowered) == (3, 0, 3)
    for operator in ("OneHotEncoder", "Imputer", "Scaler"):
        assert before.ops[operator] == after.ops[operator] == 1 + (operator == "OneHotEncoder"), operator
    onnx.checker.check_model(made)
    assert len(made.SerializeToString()) < 0.7 * len(mlp.model)
    original, predicted = (mlp.predict(m) for m in (mlp.model, made.SerializeToString()))
    assert predicted.dtype == np.float32
    assert np.corrcoef(original[:, 1], predicted[:, 1])[0, 1] > 0.98
    assert inspect(prepared) == before  # left as it was, for the next candidate


def test_raw_features_too_large_for_16_bits_stay_exact(mlp: Trained) -> None:
    far = replace(mlp, feed=mlp.feed | {"distance": mlp.feed["distance"] * 100})
    assert far.feed["distance"].max() > 65504
    made = convert(prepare(far.model), "fp16", far.batches).SerializeToString()
    original, predicted = far.predict(far.model), far.predict(made)
    assert np.isfinite(predicted).all()
    assert np.abs(original - predicted).max() < 0.01


def test_ranges_do_not_depend_on_the_batches_of_calibration(mlp: Trained) -> None:
    prepared = prepare(mlp.model)
    whole, small = (
        convert(prepared, "static_int8", lambda size=size: mlp.batches(size)).SerializeToString(
            deterministic=True
        )
        for size in (len(mlp.y), 100)
    )
    assert whole == small


def test_equal_conversions_give_equal_bytes_in_every_process(mlp: Trained, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(mlp.model)
    np.savez(
        tmp_path / "rows.npz", **{n: v.astype(str) if v.dtype == object else v for n, v in mlp.feed.items()}
    )
    code = (
        "import hashlib, numpy as np; from lepton_airflow.packaging.compression.quantize import *\n"
        "rows = {n: v.astype(object) if v.dtype.kind == 'U' else v for n, v in np.load('rows.npz').items()}\n"
        "model = prepare(open('model.onnx', 'rb').read())\n"
        "for method in METHODS:\n"
        "    made = convert(model, method, lambda: iter([rows])).SerializeToString(deterministic=True)\n"
        "    print(hashlib.sha256(made).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert len(set(runs[0])) == 3
    assert runs[0] == runs[1]


# -- timing ------------------------------------------------------------------------------------------------------------


def products(count: int) -> bytes:
    """A chain of matrix products of 256 by 256."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"]) for i in range(count)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 256]) for n in ("x0", f"x{count}")]
    nodes.append(helper.make_node("Identity", [f"x{count}"], ["out"]))
    ends[1].name = "out"
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [weights])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()


def test_a_model_of_an_eighth_of_the_work_is_faster_and_its_twin_is_not() -> None:
    feeds = {32: [{"x0": np.ones((32, 256), np.float32)}]}
    models = {"original": products(16), "twin": products(16), "short": products(2)}
    found = {name: item[0] for name, item in time_side_by_side(models, "out", feeds, seconds=1).items()}
    assert 4 < found["short"].speedup_low <= found["short"].speedup <= found["short"].speedup_high
    assert found["twin"].speedup_low < 1.1
    assert found["twin"].speedup_high > 0.9
    assert found["original"].speedup_low == found["original"].speedup_high == 1
    assert found["short"].p50_us < found["original"].p50_us <= found["original"].p95_us


def test_median_interval_is_that_of_the_sign_test() -> None:
    from scipy.stats import binom

    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    for n in (7, 12, 25, 60):
        low, high = median_interval(list(range(n)))
        assert low + high == n - 1
        outside = int(low)
        assert 2 * binom.cdf(outside, n, 0.5) <= 0.05 < 2 * binom.cdf(outside + 1, n, 0.5), n
    with pytest.raises(BadConfiguration, match=r"rounds=5: an interval of 95% needs at least 6\."):
        median_interval([1.0] * 5)


# -- decision ----------------------------------------------------------------------------------------------------------


def test_trees_have_nothing_to_quantize_and_are_not_timed(
    trees: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(*_: Any) -> None:
        raise AssertionError("converted though there is nothing to convert")

    monkeypatch.setattr(quantization, "convert", converted)
    found = trees.compare()
    assert found.chosen == "fp32"
    assert found.reason.startswith("kept fp32, because there is nothing to quantize: no Conv, Gemm or MatMul")
    assert "TreeEnsembleClassifier" in found.reason
    assert [c.verdict for c in found.candidates] == ["original", *["no-op"] * 3]
    assert not any(c.latency for c in found.candidates)


def test_a_network_is_measured_in_every_format(mlp: Trained) -> None:
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


def test_a_candidate_that_cannot_be_made_is_reported_beside_the_others(mlp: Trained) -> None:
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


def test_a_format_that_kills_onnxruntime_is_reported(mlp: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_TRY", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = mlp.compare(methods=["fp16"])
    assert found.candidates[1].verdict == "failed"
    assert found.reason.endswith(
        "fp16: it cannot be made or run: onnxruntime dies of signal 11 when it opens or runs it"
    )


def test_a_format_that_hangs_onnxruntime_is_reported(mlp: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_TRY", "import signal; signal.pause()")
    monkeypatch.setattr(quantization, "_TRY_S", 1)
    found = mlp.compare(methods=["fp16"])
    assert found.candidates[1].verdict == "failed"
    assert found.reason.endswith("onnxruntime has not run one batch of it within 1 s")


def test_a_format_that_overflows_is_worse() -> None:
    feed = {"x0": np.linspace(1, 9, 40 * 256, dtype=np.float32).reshape(40, 256) * 20_000}
    original = products(2)

    def predict(model: bytes) -> np.ndarray:
        predicted = open_session(model, 1).run(["out"], feed)[0].max(axis=1)
        with np.errstate(
            over="ignore"
        ):  # a machine with 16-bit products; on this one they are made of 32 bits
            return predicted if model == original else predicted.astype(np.float16)

    work = Work(output="out", calibration=lambda: iter([feed]), predict=predict, timing={40: [feed]})
    judge = Judge(y=feed["x0"].max(axis=1) * 1.01, metric="rmse", max_loss=100, resamples=100)
    found = compare(original, work, judge, ["fp16"], rounds=6, seconds=0.1).candidates[1]
    assert found.verdict == "worse"
    wrong = int((feed["x0"].max(axis=1) >= 65520).sum())
    assert found.reason == f"{wrong} of 40 predictions are missing or infinite"


JUDGE = Judge(y=[0, 1], metric="roc_auc", max_loss=0.01)


def quality(low: float) -> Quality:
    return Quality("roc_auc", 0.8, 0.7, 0.9, low + 0.01, low, low + 0.02)


@pytest.mark.parametrize(
    ("low", "speedups", "size", "verdict"),
    [
        (-0.005, [(1.2, 1.5), (1.0, 1.1)], 90, "better"),  # faster at one, nowhere slower
        (
            -0.005,
            [(1.2, 1.5), (0.94, 1.1)],
            25,
            "no gain",
        ),  # smaller and faster, but perhaps slower at the other
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
    judged = quantization._judged(found, latency, 100, JUDGE, 1.2, 0.05, 2.0)
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
    choose: Callable[..., Candidate] = quantization._choose
    assert choose([original, small, fast, faster, smaller], 1.2) is faster
    assert choose([original, small, smaller], 1.2) is smaller
    assert choose([original, replace(faster, verdict="worse")], 1.2) is original


def test_what_cannot_be_judged_is_one_sentence(mlp: Trained) -> None:
    one_class = Judge(y=np.ones(len(mlp.y)), metric="roc_auc", max_loss=0.005)
    with pytest.raises(BadInput, match=r"roc_auc is not defined on these rows \(one class"):
        mlp.compare(judge=one_class)
    with pytest.raises(
        BadConfiguration, match=r"'static_int' is no number format; did you mean 'static_int8'\?"
    ):
        mlp.compare(methods=["static_int"])
    with pytest.raises(BadConfiguration, match="rounds=2"):
        mlp.compare(rounds=2)


def test_it_stops_when_asked(mlp: Trained) -> None:
    def stop() -> None:
        raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        mlp.compare(check_stop=stop)
