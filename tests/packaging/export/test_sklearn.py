"""Estimators as ONNX: equal predictions, classes that a fold lacked, tables of one kind, and what cannot be converted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, predict_onnx

NUMBERS, TEXTS = ["hour", "wind"], ["origin", "carrier"]


def schema(features: list[str], classes: list[Any], task: str = "classification") -> Schema:
    categorical = [name for name in features if name in TEXTS]
    return Schema(features_of(DatasetInfo(features=features, categorical=categorical)), task, classes)


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    made = pd.DataFrame(rng.normal(size=(300, 2)).astype(np.float32).astype(float), columns=NUMBERS)
    return made.assign(origin=rng.choice(["JFK", "EWR"], 300), carrier=rng.choice(["AA", "UA", "ü"], 300))


def packaged(fitted: SklearnModel, frame: pd.DataFrame) -> np.ndarray:
    return predict_onnx(open_session(fitted.to_onnx().SerializeToString()), fitted.schema, frame)


@pytest.mark.parametrize("features", [NUMBERS, TEXTS])
def test_a_table_of_one_kind_needs_no_column_transformer(frame: pd.DataFrame, features: list[str]) -> None:
    first = StandardScaler() if features is NUMBERS else OneHotEncoder(handle_unknown="ignore")
    model = make_pipeline(first, LogisticRegression()).fit(frame[features], np.arange(300) % 3)
    fitted = SklearnModel(model, schema(features, ["a", "b", "c"]), "mine")
    inputs = [i.name for i in fitted.to_onnx().graph.input]
    assert inputs == features
    np.testing.assert_allclose(packaged(fitted, frame), fitted.predict(frame), atol=1e-6)


def test_a_regression_gives_one_number_a_row(frame: pd.DataFrame) -> None:
    model = LinearRegression().fit(frame[NUMBERS], 3 * frame["hour"] - frame["wind"] + 2)
    fitted = SklearnModel(model, schema(NUMBERS, [], "regression"), "mine")
    expected = 3 * frame["hour"] - frame["wind"] + 2
    np.testing.assert_allclose(fitted.predict(frame), expected, atol=1e-6)
    np.testing.assert_allclose(packaged(fitted, frame), expected, atol=1e-5)


def test_a_class_that_a_fold_did_not_hold_has_probability_0_and_cannot_be_packaged(
    frame: pd.DataFrame,
) -> None:
    model = LogisticRegression().fit(frame[NUMBERS], 2 * (np.arange(300) % 2))
    fitted = SklearnModel(model, schema(NUMBERS, ["a", "b", "c"]), "mine")
    predicted = fitted.predict(frame)
    np.testing.assert_array_equal(predicted[:, [0, 2]], model.predict_proba(frame[NUMBERS]))
    assert (predicted[:, 1] == 0).all()
    with pytest.raises(
        BadInput, match=r"knows 2 of the 3 classes \['a', 'b', 'c'\]; train has no row of the others"
    ):
        fitted.to_onnx()


def test_an_estimator_over_the_names_of_classes_is_refused(frame: pd.DataFrame) -> None:
    model = LogisticRegression().fit(frame[NUMBERS], np.where(frame["hour"] > 0, "yes", "no"))
    with pytest.raises(
        BadInput, match=r"knows the classes \['no', 'yes'\], expected the class numbers 0 to 1"
    ):
        SklearnModel(model, schema(NUMBERS, ["no", "yes"]), "mine").predict(frame)


class Mine(ClassifierMixin, BaseEstimator):
    """An estimator that skl2onnx has never heard of."""

    classes_ = np.array([0, 1])

    def predict_proba(self, x: Any) -> np.ndarray:
        return np.full((len(x), 2), 0.5)


@pytest.mark.parametrize(
    ("model", "features", "sentence"),
    [
        (LinearSVC(), NUMBERS, r"LinearSVC has no predict_proba, and classification needs probabilities"),
        (Mine(), NUMBERS, r"trainer mine: skl2onnx cannot convert Mine: .+ return an onnx\.ModelProto"),
        (
            GaussianMixture(2),
            NUMBERS,
            r"GaussianMixture has no classes_: it is no classifier, or it was not fitted",
        ),
        (
            make_pipeline(StandardScaler(), Mine()),
            NUMBERS,
            r"skl2onnx cannot convert StandardScaler > Mine: ",
        ),
        (Mine(), NUMBERS + TEXTS, r"Mine gets numbers and categories in one table, which ONNX cannot hold"),
    ],
)
def test_what_cannot_be_converted_gets_a_sentence(model: Any, features: list[str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        SklearnModel(model, schema(features, ["no", "yes"]), "mine").to_onnx()


def test_columns_may_be_named_in_any_order(frame: pd.DataFrame) -> None:
    columns = ColumnTransformer(
        [("t", OneHotEncoder(), ["carrier", "origin"]), ("n", StandardScaler(), ["wind"])]
    )
    model = make_pipeline(columns, LogisticRegression()).fit(frame, np.arange(300) % 2)
    fitted = SklearnModel(model, schema(["wind", "origin", "carrier"], [0, 1]), "mine")
    np.testing.assert_allclose(packaged(fitted, frame), fitted.predict(frame), atol=1e-6)


class Broken(Mine):
    def predict_proba(self, x: Any) -> np.ndarray:
        raise KeyError("no such\nthing")


class Short(Mine):
    def predict_proba(self, x: Any) -> np.ndarray:
        return super().predict_proba(x)[1:]


class Words(Mine):
    def predict_proba(self, x: Any) -> np.ndarray:
        return np.full((len(x), 2), "half")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Broken(),
            r"trainer mine: predict_proba of Broken fails on the raw feature columns: KeyError: 'no such",
        ),
        (Short(), r"predict_proba of Short gives the shape \(299, 2\), expected 300 rows and 2 columns"),
        (Words(), r"predict_proba of Words fails on .+: ValueError: could not convert string to float"),
        (
            MultiOutputClassifier(LogisticRegression()),
            r"knows the classes \[\[0, 1\]\], expected the class numbers 0 to 1",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_estimator_that_fails_or_gives_something_else_gets_a_sentence(
    frame: pd.DataFrame, model: Any, sentence: str
) -> None:
    if isinstance(model, MultiOutputClassifier):
        model.fit(frame[NUMBERS], (np.arange(300) % 2)[:, None])
    with pytest.raises(BadInput, match=sentence):
        SklearnModel(model, schema(NUMBERS, ["no", "yes"]), "mine").predict(frame)


def test_text_is_made_lower_case_without_a_locale_that_small_images_lack() -> None:
    texts = pd.DataFrame({"origin": ["New York", "NEW york", "ÜBER New", "Elsewhere"] * 30})
    model = make_pipeline(
        ColumnTransformer([("t", CountVectorizer(analyzer="char"), "origin")]), LogisticRegression()
    )
    fitted = SklearnModel(model.fit(texts, np.arange(120) % 2), schema(["origin"], [0, 1]), "mine")
    normalizers = [n for n in fitted.to_onnx().graph.node if n.op_type == "StringNormalizer"]
    assert [a.s for n in normalizers for a in n.attribute if a.name == "locale"] == [b"C.UTF-8"]
    np.testing.assert_allclose(packaged(fitted, texts), fitted.predict(texts), atol=1e-6)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("numbers", [[], NUMBERS])
def test_text_is_weighed_by_its_words(frame: pd.DataFrame, numbers: list[str]) -> None:
    # skl2onnx takes the vectorizer apart into two steps of its class: each was taken apart again, without an end.
    frame["origin"] = [
        f"{word} of the {other}" for word, other in zip(frame.origin, frame.carrier, strict=True)
    ]
    steps = [("t", TfidfVectorizer(), "origin"), ("n", StandardScaler(), numbers)]
    model = make_pipeline(ColumnTransformer(steps[: 1 + bool(numbers)]), LogisticRegression())
    features = [*numbers, "origin"]
    model.fit(frame[features], (frame.carrier == "AA") | (frame.hour > 1))
    fitted = SklearnModel(model, schema(features, [False, True]), "mine")
    np.testing.assert_allclose(packaged(fitted, frame), fitted.predict(frame), atol=1e-6)
