"""A package on disk: it predicts as its model, its card reads back, and rows it cannot read get a sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
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
from lepton_airflow.packaging.card import ModelCard, Touched
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.package import ModelPackage, write_package
from lepton_airflow.packaging.schema import OUTPUTS, Schema, features_of

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


def package(folder: Path, fitted: Pipeline, *touched: Touched) -> ModelPackage:
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
    write_package(folder, SklearnModel(fitted, schema, "test").to_onnx().SerializeToString(), card)
    return ModelPackage.open(folder)


def test_a_package_predicts_as_the_model_it_was_made_of(tmp_path: Path, fitted: Pipeline) -> None:
    model = package(tmp_path / "model", fitted)
    # "label" is an output, so the feature of that name has another input.
    assert [f.input for f in model.card.features] == ["dep_hour", "carrier", "label_2"]
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
    assert json.loads(model.card.to_json())["positive_class"] == model.card.classes[1] == "yes"
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
