"""The stage: what becomes of a package, what the report says, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.contract import Receipt, split_pin
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput, Preempted
from lepton_airflow.packaging.card import ModelCard, Touched
from lepton_airflow.packaging.compression import compare as comparing
from lepton_airflow.packaging.compression.latency import Latency
from lepton_airflow.packaging.export.fitted import as_fitted
from lepton_airflow.packaging.package import ModelPackage, write_package
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session
from lepton_airflow.packaging.touched import overlap
from lepton_airflow.stages import Result, RunInfo
from lepton_airflow.stages.quantize_model import QuantizeModel

pytestmark = pytest.mark.slow

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "distance", "dep_delay", "origin"],
    categorical=["origin"],
    classes=["no", "yes"],
    time_column="day",
    cluster_column="day",
    split_id="s",
)


def flights(raw_flights: Path, days: range) -> pd.DataFrame:
    frame = pd.read_csv(raw_flights / "flights" / "2013-01.csv").dropna(subset=["arr_delay"])
    frame = frame[frame["day"].isin(days)].iloc[::4].reset_index(drop=True)
    frame["late"] = np.where(frame["arr_delay"] > 15, "yes", "no")
    frame["day"] = [f"2013-01-{day:02}" for day in frame["day"]]
    return frame[[*INFO.features, "day", "late"]]


def network(frame: pd.DataFrame, info: DatasetInfo, last: Any) -> bytes:
    """ONNX of a scikit-learn estimator behind scaling and one-hot encoding."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    texts = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    numbers = [n for n in info.features if n not in info.categorical]
    parts = [("n", StandardScaler(), numbers), ("t", texts, info.categorical)]
    y = frame[info.target].map(info.classes.index) if info.classes else frame[info.target]
    model = make_pipeline(ColumnTransformer(parts[: 1 + bool(info.categorical)]), last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few steps of training will do
        model.fit(frame[info.features], y)
    schema = Schema(features_of(info), info.task or "", info.classes)
    return as_fitted(model, schema, "test").to_onnx().SerializeToString()


class Bench:
    """A store with a package and its splits; ``bench(**fields)`` runs the stage on them."""

    def __init__(self, folder: Path, write_dataset: Callable[..., DatasetInfo]) -> None:
        self.run = RunInfo.local(folder)
        self.folder = folder
        self.write_dataset = write_dataset
        self.fields: dict[str, Any] = {
            "rounds": 6,
            "timing_s": 0.3,
            "batch_rows": [1, 64],
            "calibration_rows": 300,
        }

    def put(self, name: str, frame: pd.DataFrame, info: DatasetInfo) -> tuple[str, DatasetInfo]:
        info = self.write_dataset(self.folder / f"{name}.parquet", frame, replace(info, split=name))
        return self.run.store.put(f"{name}.parquet", self.folder / f"{name}.parquet").uri, info

    def prepare(
        self,
        train: pd.DataFrame,
        valid: pd.DataFrame,
        info: DatasetInfo,
        model: bytes,
        rows: Any = None,
        refit: dict[str, Any] | None = None,
    ) -> None:
        self.train = self.put("train", train, info)
        self.valid = self.put("valid", valid, info)
        folder = self.folder / "package"
        card = ModelCard(
            task=info.task or "",
            target=info.target or "",
            classes=info.classes,
            features=features_of(info),
            outputs=[],
            trainer="mlp",
            framework="scikit-learn",
            hyperparameters={},
            seed=0,
            touched=[
                Touched.by(name, split_pin(uri)[1] or "", info)
                for name, (uri, info) in {"train": self.train, "valid": self.valid}.items()
            ][: 2 if refit else 1],
            refit=refit,
        )
        (self.folder / "profile.json").write_text('{"columns": {}}')
        write_package(folder, model, card, profile=self.folder / "profile.json", rows=rows)
        self.model = self.run.store.put("model", folder)

    def __call__(self, **fields: Any) -> Result:
        given = {"model": self.model.uri, "calibration": self.train[0], "dataset": self.valid[0]}
        return QuantizeModel(**given | self.fields | fields).run(self.run)

    def package(self, result: Result) -> ModelPackage:
        return ModelPackage.open(self.run.fetch(result.artifacts["model"].uri))

    def report(self, result: Result) -> dict[str, Any]:
        folder = self.run.fetch(result.artifacts["report"].uri)
        found: dict[str, Any] = json.loads((folder / "quantization.json").read_bytes())
        return found | {"page": (folder / "report.html").read_text()}


def mlp(*layers: int, regression: bool = False) -> Any:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind = MLPRegressor if regression else MLPClassifier
    return kind(hidden_layer_sizes=layers, solver="lbfgs", max_iter=15, random_state=0)


@pytest.fixture(scope="module")
def flights_mlp(raw_flights: Path) -> bytes:
    return network(flights(raw_flights, range(1, 22)), INFO, mlp(48, 48))


@pytest.fixture
def bench(tmp_path: Path, write_dataset, raw_flights: Path, flights_mlp: bytes) -> Bench:
    """A network over January's flights, trained on three weeks, with the rest as valid."""
    found = Bench(tmp_path, write_dataset)
    found.prepare(flights(raw_flights, range(1, 22)), flights(raw_flights, range(22, 32)), INFO, flights_mlp)
    return found


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Speedups by candidate instead of measured ones: decisions must not hang on what else this machine does."""
    speedups = {"fp32": 1.0, "dynamic_int8": 0.5, "static_int8": 2.0, "fp16": 0.4}

    def timed(models: Any, output: str, feeds: Any, **_: Any) -> dict[str, list[Latency]]:
        for model in models.values():  # each feed must fit each model
            for turns in feeds.values():
                open_session(model).run([output], turns[0])
        return {n: [Latency(b, 9 / speedups[n], 9, *[speedups[n]] * 3) for b in feeds] for n in models}

    monkeypatch.setattr(comparing, "time_side_by_side", timed)
    return speedups


def test_a_faster_format_that_is_no_worse_becomes_a_new_package(
    bench: Bench, fast, raw_flights: Path
) -> None:
    result = bench(max_loss=0.02)
    assert result.values["chosen"] == "static_int8"
    assert result.summary.startswith("Chose static_int8: 2.00 times as fast [2.00, 2.00] at batch 1, ")
    package, original = bench.package(result), ModelPackage.open(bench.folder / "package")
    january = flights(raw_flights, range(22, 32))
    predicted, before = package.predict(january), original.predict(january)
    assert predicted.shape == (len(january), 2)
    assert np.abs(predicted - before).max() == pytest.approx(package.card.parity["difference"], rel=1e-3)
    assert 0 < package.card.parity["difference"] < 0.3
    assert (package.path / "profile.json").read_text() == '{"columns": {}}'
    assert (package.path / "model.onnx").stat().st_size < (original.path / "model.onnx").stat().st_size
    record = package.card.quantization
    assert record is not None
    assert record["method"] == "static_int8"
    assert record["of"] == bench.model.sha256
    assert record["calibration_rows"] == 300
    assert record["ops_before"]["OneHotEncoder"] == record["ops_after"]["OneHotEncoder"] == 1
    assert record["ops_after"]["QuantizeLinear"] > 0
    assert result.metrics["speedup"] == 2
    assert result.metrics["size_ratio"] < 1
    assert result.metrics["difference_low"] > -0.02
    assert result.metrics["roc_auc"] - result.metrics["fp32_roc_auc"] == pytest.approx(
        result.metrics["difference"]
    )
    assert result.metrics["p50_us_batch_64"] == 4.5
    Receipt(
        "QuantizeModel", "k", None, "done", result.summary, result.artifacts, result.values, result.metrics
    ).to_json()


def test_the_rows_it_was_chosen_on_are_touched(bench: Bench, fast) -> None:
    package = bench.package(bench(max_loss=0.02))
    roles = [(t.role, t.split, t.sha256) for t in package.card.touched]
    train, valid = split_pin(bench.train[0])[1], split_pin(bench.valid[0])[1]
    assert roles == [
        ("train", "train", train),
        ("calibration", "train", train),
        ("calibration", "valid", valid),
    ]
    before = ModelPackage.open(bench.folder / "package")
    assert overlap(before, bench.folder / "valid.parquet", bench.valid[1]) is None
    assert "calibration rows are the same split ('valid'" in str(
        overlap(package, bench.folder / "valid.parquet", bench.valid[1])
    )
    june = replace(bench.valid[1], split="test", time_range=["2013-06-01", "2013-06-30"], split_id="another")
    assert overlap(package, bench.folder / "valid.parquet", june) is None


def test_equal_runs_give_an_equal_package_and_worse_ones_none(bench: Bench, fast) -> None:
    first, second = bench(max_loss=0.02), bench(max_loss=0.02)
    assert first.artifacts["model"] == second.artifacts["model"]
    assert first.artifacts["model"] != bench.model
    strict = bench(max_loss=0.0, candidates=["static_int8"])
    assert strict.artifacts["model"] == bench.model
    assert strict.values["chosen"] == "fp32"
    assert strict.summary.startswith("Kept fp32, because static_int8: roc_auc differs by ")


def test_rows_without_time_are_touched_by_their_values(tmp_path: Path, write_dataset, fast) -> None:
    from sklearn.datasets import load_diabetes

    from lepton_airflow.packaging.touched import row_fingerprints

    data = load_diabetes(as_frame=True).frame.rename(columns={"target": "progression"})
    names = [n for n in data if n != "progression"]
    info = DatasetInfo(target="progression", task="regression", features=names)
    bench = Bench(tmp_path, write_dataset)
    train, valid, test = data[:250], data[250:350], data[350:]
    write_dataset(tmp_path / "all.parquet", train, info)
    rows = row_fingerprints(tmp_path / "all.parquet", features_of(info), "progression")
    bench.prepare(train, valid, info, network(train, info, mlp(32, regression=True)), rows=rows)
    result = bench(max_loss=5.0)
    assert result.values["chosen"] == "static_int8"
    assert result.metrics["fp32_rmse"] > 0
    package = bench.package(result)
    assert package.rows is not None
    assert len(package.rows) == 350
    test_info = write_dataset(tmp_path / "test.parquet", test, info)
    assert overlap(package, tmp_path / "test.parquet", test_info) is None
    assert "100 of 100 distinct rows" in str(overlap(package, tmp_path / "valid.parquet", bench.valid[1]))
    assert "standard deviations" in package.card.parity["unit"]
    predicted = package.predict(test)
    assert predicted.shape == (len(test),)
    assert 0 < package.card.parity["difference"] < 0.5


def test_several_classes_are_measured_for_real(tmp_path: Path, write_dataset) -> None:
    from sklearn.datasets import load_digits

    data = load_digits(as_frame=True).frame
    names = [n for n in data if n != "target"]
    info = DatasetInfo(target="target", task="classification", features=names, classes=list(range(10)))
    bench = Bench(tmp_path, write_dataset)
    bench.prepare(data[:1200], data[1200:], info, network(data[:1200], info, mlp(64, 64)))
    result = bench()
    report = bench.report(result)
    assert result.metrics["roc_auc"] > 0.9
    by_name = {c["name"]: c for c in report["candidates"]}
    assert list(by_name) == ["fp32", "dynamic_int8", "static_int8", "fp16"]
    for c in by_name.values():
        assert [item["batch"] for item in c["latency"]] == [1, 64]
        assert all(
            0 < item["speedup_low"] <= item["speedup"] <= item["speedup_high"] for item in c["latency"]
        )
        assert 0 < c["quality"]["low"] <= c["quality"]["value"] <= c["quality"]["high"] <= 1
    assert {n: c["graph"]["lowered"] for n, c in by_name.items()} == {"fp32": 0} | dict.fromkeys(
        list(by_name)[1:], 3
    )
    assert by_name[result.values["chosen"]]["verdict"] in ("original", "better")
    assert (result.artifacts["model"] == bench.model) == (result.values["chosen"] == "fp32")
    assert bench.package(result).predict(data[1200:]).shape == (597, 10)
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cpu"]
    assert report["rules"]["max_loss"] == 0.005
    for text in (*by_name, "<svg", "MatMulInteger", "Times as fast as the original"):
        assert text in report["page"], text


def test_trees_stay_as_they_are(tmp_path: Path, write_dataset, raw_flights: Path) -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier

    bench = Bench(tmp_path, write_dataset)
    train, valid = flights(raw_flights, range(1, 22)), flights(raw_flights, range(22, 32))
    bench.prepare(train, valid, INFO, network(train, INFO, HistGradientBoostingClassifier(max_iter=5)))
    result = bench()
    assert result.artifacts["model"] == bench.model
    assert result.values["chosen"] == "fp32"
    assert result.summary.startswith(
        "Kept fp32, because there is nothing to quantize: no Conv, Gemm or MatMul"
    )
    assert "TreeEnsembleClassifier" in result.summary
    assert result.metrics["speedup"] is None
    report = bench.report(result)
    assert {c["verdict"] for c in report["candidates"][1:]} == {"no-op"}
    assert report["dataset"]["cluster_column"] == "day"
    assert "<svg" not in report["page"]
    unpinned = bench(model=split_pin(bench.model.uri)[0])
    assert unpinned.artifacts["model"] == bench.model
    assert "fitted again" not in result.summary


def test_rows_that_a_refit_learned_from_are_named(tmp_path: Path, write_dataset, raw_flights: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    bench = Bench(tmp_path, write_dataset)
    train, valid = flights(raw_flights, range(1, 22)), flights(raw_flights, range(22, 32))
    model = network(train, INFO, LogisticRegression())
    bench.prepare(train, valid, INFO, model, refit={"rows": "train+valid", "settled": {}})
    result = bench(candidates=[], metric="recall", threshold=0.3)
    assert (
        " The positive class is 'yes'. The model was fitted again on rows that this was judged on, so on "
        in result.summary
    )
    page = bench.report(result)["page"]
    assert "fitted again on rows" in page
    assert "<dd>yes, predicted from a probability of 0.3 on</dd>" in page


def test_what_cannot_work_is_refused_in_one_sentence(bench: Bench, fast, raw_flights: Path) -> None:
    test, _ = bench.put("test", flights(raw_flights, range(22, 32)), INFO)
    quantized = bench(max_loss=0.02).artifacts["model"].uri
    one_class = flights(raw_flights, range(22, 32)).query("late == 'no'")
    only_no, _ = bench.put("valid", one_class, replace(INFO, split_id="t"))
    for fields, kind, message in (
        (
            {"dataset": test},
            BadConfiguration,
            r"dataset is the test split: .* Pass prepare\.output\['valid'\]\.",
        ),
        (
            {"calibration": test},
            BadConfiguration,
            r"calibration is the test split: .* prepare\.output\['train'\]\.",
        ),
        ({"model": quantized}, BadConfiguration, r"the model is quantized already \(static_int8\)"),
        (
            {"candidates": ["static_int"]},
            BadConfiguration,
            r"candidates: 'static_int' is no number format; did you mean",
        ),
        ({"metric": "roc_au"}, BadConfiguration, r"metric='roc_au' .* did you mean 'roc_auc'\?"),
        ({"metric": "rmse"}, BadConfiguration, r"metric='rmse' is not one of classification"),
        ({"batch_rows": []}, BadConfiguration, r"batch_rows=\[\]: expected some batch sizes"),
        ({"batch_rows": [0, 8]}, BadConfiguration, r"batch_rows=\[0, 8\]"),
        ({"max_loss": -0.1}, BadConfiguration, r"max_loss=-0\.1: expected at least 0\."),
        ({"min_speedup": 0.9}, BadConfiguration, r"min_speedup=0\.9"),
        ({"rounds": 5}, BadConfiguration, r"rounds=5"),
        ({"threads": 0}, BadConfiguration, r"threads=0"),
        ({"dataset": only_no}, BadInput, r"roc_auc is not defined on these rows \(one class"),
    ):
        with pytest.raises(kind, match=message):
            bench(**fields)


def test_it_stops_between_candidates(bench: Bench) -> None:
    bench.run.should_stop = lambda: True
    with pytest.raises(Preempted):
        bench()
