"""Torch modules as ONNX: equal predictions, dropout off, and what the exporter cannot follow."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.export.torch import TorchModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, predict_onnx


@pytest.fixture
def frame() -> pd.DataFrame:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    made = pd.DataFrame(rng.normal(size=(50, 2)).astype(np.float32).astype(float), columns=["a b", "z"])
    return made.assign(origin=rng.choice(["JFK", "EWR"], 50))


def schema(*features: str, task: str = "classification") -> Schema:
    info = DatasetInfo(features=list(features), categorical=[f for f in features if f == "origin"])
    return Schema(features_of(info), task, ["no", "yes"] if task == "classification" else [])


def packaged(fitted: TorchModel, frame: pd.DataFrame) -> np.ndarray:
    return predict_onnx(open_session(fitted.to_onnx().SerializeToString()), fitted.schema, frame)


def test_one_probability_is_that_of_the_second_class_and_dropout_is_off(
    frame: pd.DataFrame, capfd: pytest.CaptureFixture[str]
) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Sigmoid()).train()
    fitted = TorchModel(net, None, schema("a b", "z"), "mine")
    native = fitted.predict(frame)
    with torch.inference_mode():
        second = net(torch.tensor(frame[["a b", "z"]].to_numpy(np.float32))).numpy()[:, 0]
    np.testing.assert_array_equal(native[:, 1], second.astype(np.float64))
    np.testing.assert_array_equal(native, fitted.predict(frame))
    levels = logging.getLogger("torch.onnx").level
    np.testing.assert_allclose(packaged(fitted, frame), native, atol=1e-6)
    assert logging.getLogger("torch.onnx").level == levels
    assert capfd.readouterr().out == ""  # the exporter tells of its steps otherwise


def test_a_transformer_in_front_becomes_part_of_the_graph(frame: pd.DataFrame) -> None:
    parts = [("n", StandardScaler(), ["z", "a b"]), ("t", OneHotEncoder(handle_unknown="ignore"), ["origin"])]
    front = ColumnTransformer(parts).fit(frame)
    fitted = TorchModel(nn.Linear(4, 1), front, schema("a b", "origin", "z", task="regression"), "mine")
    frame.loc[0, "origin"] = "LGA"  # unseen, so 0 in each of its columns
    native = fitted.predict(frame)
    assert native.shape == (50,)
    np.testing.assert_allclose(packaged(fitted, frame), native, atol=1e-5)


class Branches(nn.Module):
    """Its way depends on the values of a batch, which no graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x if x.sum() > 0 else -x, dim=1)


@pytest.mark.parametrize(
    ("module", "features", "task", "sentence"),
    [
        (
            Branches(),
            ("a b", "z"),
            "classification",
            r"mine: torch\.onnx cannot export Branches for a \[rows, 2\] float32",
        ),
        (nn.Linear(2, 2), ("a b", "origin"), "classification", r"takes numbers, and 'origin' is a category"),
        (
            nn.Linear(2, 2),
            ("a b", "z"),
            "classification",
            r"which are no probabilities; end the network with softmax",
        ),
        (nn.Linear(2, 3), ("a b", "z"), "classification", r"gives 3 numbers a row, expected 2 probabilities"),
        (nn.Linear(2, 2), ("a b", "z"), "regression", r"gives 2 numbers a row, expected 1\."),
    ],
)
def test_what_is_no_model_of_these_rows_gets_a_sentence(
    frame: pd.DataFrame, module: Any, features: tuple[str, ...], task: str, sentence: str
) -> None:
    def package() -> None:
        fitted = TorchModel(module, None, schema(*features, task=task), "mine")
        fitted.predict(frame)
        fitted.to_onnx()

    with pytest.raises(BadInput, match=sentence):
        package()
