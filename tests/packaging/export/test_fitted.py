"""What a trainer may return is recognised; anything else gets a sentence that says what it may."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.export.fitted import as_fitted
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.export.torch import TorchModel
from lepton_airflow.packaging.schema import Schema, features_of

SCHEMA = Schema(features_of(DatasetInfo(features=["x", "z"])), "classification", ["no", "yes"])


class WithExample(torch.nn.Linear):
    example_input = torch.zeros(1, 2)


def test_an_estimator_is_recognised() -> None:
    estimator = LogisticRegression().fit([[0, 1], [1, 0]], [0, 1])
    assert isinstance(as_fitted(estimator, SCHEMA, "mine"), SklearnModel)


@pytest.mark.parametrize(
    ("returned", "transformer"),
    [
        ((torch.nn.Linear(2, 2), torch.zeros(1, 2)), None),
        ((torch.zeros(1, 2), torch.nn.Linear(2, 2)), None),
        (WithExample(2, 2), None),
        ((StandardScaler(), torch.nn.Linear(2, 2)), StandardScaler),
    ],
    ids=["module, example", "example, module", "with example_input", "transformer, module"],
)
def test_a_module_comes_with_an_example_or_a_transformer(returned: Any, transformer: type | None) -> None:
    fitted = as_fitted(returned, SCHEMA, "mine")
    assert isinstance(fitted, TorchModel)
    assert fitted.transformer is None if transformer is None else isinstance(fitted.transformer, transformer)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, r"trainer mine: it returned NoneType; expected a fitted scikit-learn estimator"),
        ({"model": 1}, r"it returned dict; expected"),
        (LogisticRegression, r"it returned the class sklearn\..+\.LogisticRegression itself; expected"),
        ((LogisticRegression(), 0.9), r"it returned tuple; expected"),
        ((torch.nn.Linear(2, 2), torch.zeros(1, 2), 0.9), r"it returned tuple; expected"),
        (torch.nn.Linear(2, 2), r"it returned a torch module without an example input; expected \(module, example\)"),
        (onnx.GraphProto(), r"it returned onnx\.\w*\.?GraphProto; expected"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_its_type(returned: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        as_fitted(returned, SCHEMA, "mine")
