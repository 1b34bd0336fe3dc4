from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput, ContractError
from lepton_airflow.packaging.export.fitted import Schema, SklearnModel
from lepton_airflow.packaging.package import (
    OUTPUTS,
    ModelCard,
    ModelPackage,
    Touched,
    feature_frame,
    features_of,
    overlap,
    row_fingerprints,
    write_package,
)

INFO = DatasetInfo(
    target="late",
    task="classification",
    features=["dep hour", "carrier", "label"],
    categorical=["carrier"],
    classes=["no", "yes"],
    split="train",
    split_id="run 1",
)


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"dep hour": rng.normal(size=rows), "label": rng.normal(size=rows)}).astype(
        np.float32
    )
    frame["carrier"] = rng.choice(["AA", "UA", "ü b"], rows)
    frame["late"] = np.where(frame["dep hour"] + (frame["carrier"] == "AA") > 0.5, "yes", "no")
    return frame


def save(frame: pd.DataFrame, path: Path) -> Path:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=100)
    return path


@pytest.fixture(scope="session")
def fitted() -> Pipeline:
    frame = table(300)
    parts = [
        ("n", "passthrough", ["dep hour", "label"]),
        ("c", OneHotEncoder(handle_unknown="ignore"), ["carrier"]),
    ]
    model = make_pipeline(ColumnTransformer(parts), LogisticRegression())
    return model.fit(frame[INFO.features], (frame["late"] == "yes").astype(int))


def package(
    folder: Path, fitted: Pipeline, *touched: Touched, rows: np.ndarray | None = None
) -> ModelPackage:
    features = features_of(INFO)
    schema = Schema(features, "classification", INFO.classes)
    card = ModelCard(
        task="classification",
        target="late",
        classes=INFO.classes,
        features=features,
        outputs=OUTPUTS["classification"],
        trainer="logistic_regression",
        framework="scikit-learn",
        hyperparameters={"C": 1.0},
        seed=0,
        touched=list(touched),
    )
    write_package(folder, SklearnModel(fitted, schema, "test").to_onnx().SerializeToString(), card, rows=rows)
    return ModelPackage.open(folder)


def test_a_package_predicts_as_the_model_it_was_made_of(tmp_path: Path, fitted: Pipeline) -> None:
    model = package(tmp_path / "model", fitted)
    assert [f.input for f in model.card.features] == [
        "dep_hour",
        "carrier",
        "label_2",
    ]  # "label" is an output
    new = table(500, seed=1)
    new.loc[:5, "carrier"] = "unseen"
    native = fitted.predict_proba(new[INFO.features])
    np.testing.assert_allclose(model.predict(new.sample(frac=1, axis=1, random_state=0)), native, atol=1e-6)
    path = save(new, tmp_path / "new.parquet")
    np.testing.assert_array_equal(model.predict_parquet(path, batch_rows=70), model.predict(new))
    (labels,) = model.session.run(
        ["label"], {f.input: new[f.name].to_numpy().reshape(-1, 1) for f in model.card.features}
    )
    assert labels.tolist() == np.where(native[:, 1] > 0.5, "yes", "no").tolist()
    assert model.predict_parquet(save(new.head(0), tmp_path / "none.parquet")).shape == (0, 2)


def test_a_card_reads_back_and_a_newer_or_damaged_one_is_refused(tmp_path: Path, fitted: Pipeline) -> None:
    touched = Touched("train", "ab" * 32, "train", "run 1", "day", ["2013-01-01", "2013-01-31"], 300)
    model = package(tmp_path / "model", fitted, touched)
    assert model.card.touched == [touched]
    assert ModelCard.from_json(model.card.to_json()) == model.card
    newer = json.dumps(asdict(model.card) | {"format": 2})
    with pytest.raises(ContractError, match="has format 2, this lepton_airflow knows up to 1"):
        ModelCard.from_json(newer)
    for damaged in ("{", "[]", '{"format": 1}'):
        with pytest.raises(ContractError, match="damaged or no model card"):
            ModelCard.from_json(damaged)
    (tmp_path / "model" / "model.onnx").unlink()
    with pytest.raises(BadInput, match=r"has no model\.onnx"):
        ModelPackage.open(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.drop(columns="carrier"), "'carrier' is not among the columns"),
        (lambda f: f.assign(label=np.inf), "'label' is infinite .* in 20 of 20 rows, first in row 0"),
        (lambda f: f.assign(label=1e300), "beyond float32"),
        (lambda f: f.assign(label=pd.Timestamp("2013-01-01")), "a time is no number"),
        (lambda f: f.assign(label="x"), "'label' should hold numbers"),
        (lambda f: pd.concat([f, f[["label"]]], axis=1), "is there 2 times"),
    ],
)
def test_rows_a_model_cannot_read_get_a_sentence(
    tmp_path: Path, fitted: Pipeline, change, sentence: str
) -> None:
    model = package(tmp_path / "model", fitted)
    with pytest.raises(BadInput, match=sentence):
        model.predict(change(table(20)))


def test_missing_values_may_be_null_of_any_kind(tmp_path: Path, fitted: Pipeline) -> None:
    model = package(tmp_path / "model", fitted)
    rows = table(3).astype({"carrier": object})
    rows["carrier"] = [None, np.nan, ""]
    rows["dep hour"], rows["label"] = pd.array([1, 1, 1], dtype="Int64"), 0.0
    predicted = model.predict(rows)
    assert (predicted == predicted[0]).all()
    rows["dep hour"] = pd.array([None, None, None], dtype="Int64")
    assert np.isnan(model.predict(rows)).all()


def test_a_category_of_digits_is_the_same_beside_a_missing_one() -> None:
    (feature,) = features_of(replace(INFO, features=["carrier"]))
    whole, with_missing = pd.DataFrame({"carrier": [7, 8]}), pd.DataFrame({"carrier": [7, 8, None, 0.5]})
    assert feature_frame(whole, [feature])["carrier"].tolist() == ["7", "8"]
    assert feature_frame(with_missing, [feature])["carrier"].tolist() == ["7", "8", "", "0.5"]


JANUARY = Touched("train", "a" * 64, "train", "run 1", "day", ["2013-01-01", "2013-01-31"], 300)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"time_range": ["2013-02-01", "2013-02-28"], "split_id": "run 2"}, None),
        (
            {"time_range": ["2013-01-31", "2013-02-28"], "split_id": "run 2"},
            "train rows span 2013-01-01 to 2013-01-31",
        ),
        ({"time_range": ["2013-01-31T12:00:00", "2013-02-28T00:00:00"], "split_id": "run 2"}, "overlaps"),
        ({"time_range": ["2013-01-31T19:00:00-05:00", "2013-02-28T00:00:00Z"], "split_id": "run 2"}, None),
        ({"time_range": ["2012-01-01", "2014-01-01"], "split_id": "run 2"}, "overlaps"),
        (
            {"time_range": ["2013-01-10", "2013-01-20"], "split": "test"},
            None,
        ),  # disjoint rows by random split
        ({"time_range": ["2013-01-10", "2013-01-20"]}, "the same split ('train' of run 1)"),
        ({"time_range": None, "split_id": "run 2"}, "cannot be told"),
    ],
)
def test_overlap_by_split_and_by_time(
    tmp_path: Path, fitted: Pipeline, changes: dict[str, object], expected: str | None
) -> None:
    model = package(tmp_path / "model", fitted, JANUARY)
    said = overlap(model, tmp_path / "not read", replace(INFO, time_column="day", **changes))
    assert (said is None) if expected is None else (said is not None and expected in said)


def test_overlap_by_equal_rows_without_a_time_column(tmp_path: Path, fitted: Pipeline) -> None:
    seen, unseen = table(300), table(40, seed=9)
    path = save(seen, tmp_path / "train.parquet")
    rows = row_fingerprints(path, features_of(INFO), "late")
    assert len(rows) == 300
    touched = replace(JANUARY, time_column=None, time_range=None)
    model = package(tmp_path / "model", fitted, touched, rows=rows)
    other = replace(INFO, split_id="run 2", split="test")
    assert overlap(model, save(unseen, tmp_path / "new.parquet"), other) is None
    mixed = save(pd.concat([unseen, seen.iloc[[3, 7, 7]]]), tmp_path / "mixed.parquet")
    said = overlap(model, mixed, other)
    assert said is not None
    assert said.startswith("2 of 42 distinct rows equal rows that the model has touched")
    assert overlap(model, mixed, replace(INFO, split="test")) is None  # a split of the same run shares no row
