"""Evaluation: numbers that agree with scikit-learn, slices, the report, and rows that cannot be judged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError
from lepton_airflow.packaging.card import Touched
from lepton_airflow.packaging.package import ModelPackage
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.evaluate_model import EvaluateModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from lepton_airflow.stages import Result

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["hour", "wind", "origin"],
    categorical=["origin"],
    classes=["no", "yes"],
    time_column="day",
    cluster_column="day",
)
TRAINED = [Touched("train", "0" * 64, "train", "s", "day", ["2013-01-01", "2013-03-31"], 9)]


def rows(n: int = 2000) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"hour": rng.normal(size=n), "wind": rng.normal(size=n)})
    frame["origin"] = rng.choice(["JFK", "EWR", "LGA", None], n, p=[0.5, 0.3, 0.15, 0.05])
    frame["day"] = [f"2013-05-{d:02}" for d in rng.integers(1, 32, n)]
    frame["late"] = np.where(rng.random(n) < 1 / (1 + np.exp(-frame.hour)), "yes", "no")
    return frame


@pytest.fixture
def evaluate(tmp_path: Path, write_dataset, put_model) -> Callable[..., Result]:
    """``evaluate(frame, info, weights, **fields)``: the result on that frame; ``evaluate.run`` is its RunInfo."""
    run = RunInfo.local(tmp_path)

    def call(
        frame: pd.DataFrame | None = None,
        info: DatasetInfo = INFO,
        weights: Any = (1.0, 0.2),
        touched: list[Touched] = TRAINED,
        data: DatasetInfo | None = None,
        **fields: Any,
    ) -> Result:
        path = tmp_path / "test.parquet"
        write_dataset(path, rows() if frame is None else frame, data or info)
        dataset = run.store.put("test.parquet", path)
        model = put_model(run.store, info, list(weights), touched=touched)
        return EvaluateModel(
            **{"model": model.uri, "dataset": dataset.uri, "bootstrap_resamples": 100} | fields
        ).run(run)

    call.run = run  # type: ignore[attr-defined]
    return call


def report(evaluate: Any, result: Result) -> Path:
    folder: Path = evaluate.run.fetch(result.artifacts["report"].uri)
    return folder


def contents(evaluate: Any, result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((report(evaluate, result) / "metrics.json").read_bytes())
    return found


def test_metrics_are_those_of_scikit_learn(evaluate) -> None:
    from sklearn import metrics

    frame = rows()
    result = evaluate(frame)
    y = (frame.late == "yes").to_numpy()
    p = 1 / (1 + np.exp(-(frame.hour + 0.2 * frame.wind).to_numpy()))
    expected = {
        "accuracy": metrics.accuracy_score(y, p >= 0.5),
        "precision": metrics.precision_score(y, p >= 0.5),
        "recall": metrics.recall_score(y, p >= 0.5),
        "f1": metrics.f1_score(y, p >= 0.5),
        "roc_auc": metrics.roc_auc_score(y, p),
        "log_loss": metrics.log_loss(y, p),
        "brier": metrics.brier_score_loss(y, p),
    }
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-5), name
        assert result.metrics[f"{name}_low"] < result.metrics[name] < result.metrics[f"{name}_high"], name
    assert result.metrics["rows"] == 2000
    assert result.summary.startswith(f"ROC AUC {expected['roc_auc']:.3f} [")
    assert result.summary.endswith("on 2,000 rows, 2013-05-01 to 2013-05-31; the positive class is 'yes'.")


def test_intervals_by_cluster_are_wider_where_days_differ(evaluate) -> None:
    frame = rows()
    bad_days = frame.day < "2013-05-16"  # the model says the opposite on half of the days
    frame.loc[bad_days, "late"] = np.where(frame.loc[bad_days, "late"] == "yes", "no", "yes")
    by_day = evaluate(frame).metrics
    by_row = evaluate(frame, replace(INFO, cluster_column=None)).metrics
    assert by_day["roc_auc"] == by_row["roc_auc"]
    width = {k: m["roc_auc_high"] - m["roc_auc_low"] for k, m in (("day", by_day), ("row", by_row))}
    assert width["day"] > 2 * width["row"]


def test_metrics_are_about_the_model_s_positive_class_and_every_place_says_so(evaluate, read_html) -> None:
    from sklearn import metrics

    frame, info = rows(), replace(INFO, classes=["yes", "no"])
    result = evaluate(frame, info, weights=(-1.0, -0.2), threshold=0.6)
    said_no = 1 / (1 + np.exp((frame.hour + 0.2 * frame.wind).to_numpy())) >= 0.6
    predicted = np.where(said_no, "no", "yes")
    for name, function in (("precision", metrics.precision_score), ("recall", metrics.recall_score)):
        wanted = function(frame.late, predicted, pos_label="no")
        assert result.metrics[name] == pytest.approx(wanted, abs=1e-3), name
    assert result.summary.endswith("2013-05-01 to 2013-05-31; the positive class is 'no'.")
    assert contents(evaluate, result)["positive_class"] == "no"
    page = str(read_html((report(evaluate, result) / "report.html").read_text()))
    assert "Recall of no" in page
    assert "Positive classno, predicted from a probability of 0.6 on" in page


def test_a_dataset_with_another_positive_class_is_named(evaluate) -> None:
    result = evaluate(rows(), data=replace(INFO, classes=["yes", "no"]))
    assert result.summary.endswith(
        "the positive class is 'yes' (the dataset says 'no': train on it to change the model's)."
    )


def test_threshold_moves_what_depends_on_it(evaluate) -> None:
    low, high = (evaluate(threshold=t).metrics for t in (0.2, 0.8))
    assert low["recall"] > high["recall"]
    assert low["precision"] < high["precision"]
    assert low["roc_auc"] == high["roc_auc"]


def test_slices_by_value_by_quarter_and_missing(evaluate) -> None:
    from sklearn.metrics import roc_auc_score

    frame = rows()
    slices = contents(evaluate, evaluate(frame, slices=["origin", "wind"]))["slices"]
    assert [s["slice"] for s in slices["origin"]] == ["JFK", "EWR", "LGA", "(missing)"]
    assert [s["rows"] for s in slices["wind"]] == [500, 500, 500, 500]
    assert sum(s["rows"] for s in slices["origin"]) == 2000
    jfk = frame[frame.origin == "JFK"]
    assert slices["origin"][0]["metrics"]["roc_auc"] == pytest.approx(
        roc_auc_score(jfk.late == "yes", jfk.hour + 0.2 * jfk.wind), abs=1e-6
    )
    interval = slices["origin"][0]["interval"]
    assert interval["low"] < slices["origin"][0]["metrics"]["roc_auc"] < interval["high"]


def test_a_hundred_thousand_categories_make_a_short_table(evaluate) -> None:
    frame = pd.concat([rows(50_000), rows(50_000)], ignore_index=True)
    frame["tail"] = [f"N{i}" for i in range(len(frame))]
    frame.loc[:99, "tail"] = "N-often"
    slices = contents(evaluate, evaluate(frame, slices=["tail"]))["slices"]["tail"]
    assert len(slices) == 21
    assert slices[0]["slice"] == "N-often"
    assert slices[1]["interval"] is None  # one row
    assert slices[1]["metrics"]["roc_auc"] is None
    assert slices[-1]["slice"] == "99,881 others"


def test_one_class_leaves_the_area_undefined_and_says_so(evaluate) -> None:
    result = evaluate(rows().assign(late="no"))
    assert result.metrics["roc_auc"] is None
    assert result.metrics["roc_auc_low"] is None
    assert result.metrics["log_loss"] is not None
    assert result.summary.startswith("Log loss")


def test_a_single_row_has_metrics_and_no_intervals(evaluate) -> None:
    metrics = evaluate(rows(1)).metrics
    assert metrics["brier"] is not None
    assert metrics["brier_low"] is None


def test_several_classes_are_averaged(evaluate) -> None:
    from sklearn import metrics

    info = replace(INFO, classes=["early", "on time", "late"])
    frame = rows()
    frame["late"] = np.select([frame.hour < -0.5, frame.hour < 0.7], ["early", "on time"], "late")
    weights = [[-1.0, 0.0, 1.0], [0.0, 0.1, 0.0]]
    result = evaluate(frame, info, weights)
    y = frame.late.map({"early": 0, "on time": 1, "late": 2})
    scores = frame[["hour", "wind"]].to_numpy() @ np.array(weights)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert result.metrics["roc_auc"] == pytest.approx(
        metrics.roc_auc_score(y, p, multi_class="ovr"), abs=1e-5
    )
    assert result.metrics["f1"] == pytest.approx(
        metrics.f1_score(y, p.argmax(axis=1), average="macro"), abs=1e-5
    )
    assert {p.name for p in report(evaluate, result).glob("*.png")} >= {"roc.png", "confusion.png"}


def test_a_regression(evaluate) -> None:
    from sklearn import metrics

    info = replace(INFO, task="regression", classes=[])
    frame = rows()
    frame["late"] = frame.hour + np.random.default_rng(1).normal(size=len(frame))
    result = evaluate(frame, info)
    predicted = frame.hour + 0.2 * frame.wind
    assert result.metrics["mae"] == pytest.approx(
        metrics.mean_absolute_error(frame.late, predicted), abs=1e-5
    )
    assert result.metrics["r2"] == pytest.approx(metrics.r2_score(frame.late, predicted), abs=1e-5)
    assert {p.name for p in report(evaluate, result).glob("*.png")} == {
        "predicted.png",
        "residuals.png",
        "residuals_by_prediction.png",
    }


def test_the_report_is_one_page_with_real_pictures(evaluate) -> None:
    folder = report(evaluate, evaluate(slices=["origin"]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    for picture in ("roc", "precision_recall", "calibration", "confusion"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f'alt="{picture.replace("_", " ")}" src="data:image/png;base64,' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "By origin" in page


def test_names_from_the_data_cannot_write_html(evaluate) -> None:
    frame = rows().rename(columns={"origin": "<b>&origin"})
    frame["<b>&origin"] = "<script>alert(1)</script>"
    info = replace(INFO, features=["hour", "wind"], categorical=[])
    page = (report(evaluate, evaluate(frame, info, slices=["<b>&origin"])) / "report.html").read_text()
    assert "<script>" not in page
    assert "<b>&" not in page


def test_equal_inputs_give_an_equal_report(evaluate) -> None:
    first, second = (evaluate(slices=["origin"]).artifacts["report"].sha256 for _ in range(2))
    assert first == second
    assert evaluate(slices=["origin"], seed=1).artifacts["report"].sha256 != first


def test_a_missed_gate_fails_after_the_report_is_stored(evaluate) -> None:
    assert evaluate(gate={"roc_auc": 0.5, "log_loss": 1.0}).metrics["roc_auc"] > 0.5
    with pytest.raises(
        BadInput, match=r"roc_auc_low is 0\.\d+, required at least 0\.99; brier is .* at most"
    ) as error:
        evaluate(gate={"roc_auc_low": 0.99, "brier": 0.01, "accuracy": 0.1})
    assert error.value.exit_code == 80
    uri = re.search(r"report\.html in (\S+)\.$", str(error.value))
    assert uri
    assert (evaluate.run.fetch(uri[1]) / "report.html").is_file()


def test_rows_the_model_has_touched_are_refused_by_name(evaluate) -> None:
    seen = [Touched("train", "0" * 64, "train", "s", "day", ["2013-01-01", "2013-05-02"], 9)]
    with pytest.raises(BadConfiguration, match="2013-01-01 to 2013-05-02"):
        evaluate(touched=seen)
    allowed = evaluate(touched=seen, allow_overlap=True)
    assert "may flatter the model" in allowed.summary
    assert "2013-05-02" in contents(evaluate, allowed)["overlap"]


@pytest.mark.parametrize(
    ("change", "fields", "sentence"),
    [
        (lambda f: f, {"slices": ["orign"]}, "column 'orign' is not in .*did you mean 'origin'"),
        (lambda f: f, {"cluster_column": "week"}, "column 'week' is not in"),
        (lambda f: f, {"gate": {"auc": 0.5}}, "gate: 'auc' is not a metric of this model; did you mean"),
        (lambda f: f, {"gate": {"rmse": 0.5}}, "'rmse' is not a metric"),
        (lambda f: f, {"gate": {"roc_auc": "high"}}, "roc_auc='high' is not a number"),
        (lambda f: f, {"threshold": 50.0}, "threshold=50.0: expected a probability"),
        (lambda f: f, {"bootstrap_resamples": 3}, "n_resamples=3"),
        (
            lambda f: f.drop(columns="wind"),
            {},
            "the model needs the column 'wind', which test.parquet does not",
        ),
        (lambda f: f.drop(columns="late"), {}, "column 'late' is not in"),
        (
            lambda f: f.assign(late=f.late.where(f.hour < 1)),
            {},
            r"target 'late' is missing in \d+ of 2,000 rows",
        ),
        (
            lambda f: f.assign(late="cancelled"),
            {},
            "has the values 'cancelled', which the model does not know",
        ),
        (lambda f: f.assign(wind=np.inf), {}, "'wind' is infinite"),
        (lambda f: f.assign(hour="early"), {}, "'hour' should hold numbers"),
        (lambda f: f.head(0), {}, "0 rows"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_sentence(change, fields, sentence, evaluate) -> None:
    with pytest.raises(LeptonError, match=sentence) as error:
        evaluate(change(rows()), **fields)
    assert error.value.exit_code == 80


def test_a_dataset_for_another_target_is_refused(evaluate) -> None:
    with pytest.raises(BadConfiguration, match="the model's target is 'late', the dataset's is 'cancelled'"):
        evaluate(rows().assign(cancelled=0), data=replace(INFO, target="cancelled"))


def test_a_category_that_became_a_number_is_refused(evaluate) -> None:
    data = replace(INFO, categorical=[])
    with pytest.raises(
        BadInput, match="'origin' is a number in the dataset, the model was trained on it as a category"
    ):
        evaluate(rows().assign(origin=7), data=data)


def test_the_onnx_model_is_what_is_run(evaluate, monkeypatch) -> None:
    """Scores come from the package in batches of rows, in the order of the file."""
    calls = []
    predict = ModelPackage.predict_parquet
    monkeypatch.setattr(
        ModelPackage, "predict_parquet", lambda *a, **k: calls.append(a[1].name) or predict(*a, **k)
    )
    evaluate()
    assert calls == ["test.parquet"]
