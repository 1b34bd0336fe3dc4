"""ONNX and native predictions are compared, and whatever goes wrong in that is one sentence that ends the task for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import RadiusNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import DO_NOT_RETRY, BadInput
from lepton_airflow.packaging.export.fitted import packaged
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.training.parity import check_parity
from lepton_airflow.training.rows import Rows


def rows(classes: list[Any]) -> Rows:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 2)).astype(np.float32).astype(float), columns=["x", "z"])
    frame["y"] = np.arange(60) % 2 if classes else frame["x"] - frame["z"]
    info = DatasetInfo(features=["x", "z"], target="y")
    return Rows(
        "train",
        info,
        Schema(features_of(info), "classification" if classes else "regression", classes),
        frame,
    )


class Nowhere(LinearRegression):
    def predict(self, x: Any) -> np.ndarray:
        return np.where(x["x"] > 0, super().predict(x), np.nan)


@pytest.mark.parametrize(
    ("model", "classes", "sentence"),
    [
        (
            GaussianProcessClassifier(),
            [0, 1],
            r"GaussianProcessClassifier was written as ONNX, but ONNX Runtime cannot open the model: .+Solve\(-1\) is not a registered",
        ),
        (
            make_pipeline(StandardScaler(), RadiusNeighborsRegressor(0.5)),
            [],
            r"StandardScaler > RadiusNeighborsRegressor was written as ONNX, but ONNX Runtime fails on rows with train, which the model itself takes: .+ Use other estimators",
        ),
        (
            KMeans(3, n_init=1),
            [],
            r"fails on rows with train.+: the ONNX model gives 3 numbers a row, expected 1",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_onnx_runtime_cannot_do_is_a_sentence(model: Any, classes: list[Any], sentence: str) -> None:
    train = rows(classes)
    fitted = SklearnModel(model.fit(train.frame[["x", "z"]], train.y), train.schema, "mine")
    with pytest.raises(BadInput, match=rf"^trainer mine: .*{sentence}") as caught:
        check_parity(fitted, packaged(fitted), train, None, 1e-4)
    assert caught.value.exit_code == DO_NOT_RETRY
    assert "\n" not in str(caught.value)


def test_predictions_that_are_no_numbers_are_counted() -> None:
    train = rows([])
    fitted = SklearnModel(LinearRegression().fit(train.frame[["x", "z"]], train.y), train.schema, "mine")
    model = packaged(fitted)
    fitted.estimator = Nowhere().fit(train.frame[["x", "z"]], train.y)
    wrong = int((train.frame["x"] <= 0).sum())
    with pytest.raises(
        BadInput, match=rf"predicts NaN or infinity in {wrong} of 60 rows of train, first at x=-"
    ):
        check_parity(fitted, model, train, None, 1e-4)


def test_equal_predictions_say_how_they_were_compared() -> None:
    train = rows([])
    fitted = SklearnModel(LinearRegression().fit(train.frame[["x", "z"]], train.y), train.schema, "mine")
    found = check_parity(fitted, packaged(fitted), train, None, 1e-4)
    assert found["difference"] < 1e-6
    assert (found["rows"], found["tried"]) == (60, ["train"])  # LinearRegression takes no missing value
