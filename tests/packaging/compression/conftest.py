"""Models trained on real flights, and a chain of matrix products whose work is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lepton_airflow.data.features import Feature
from lepton_airflow.packaging.compression.compare import Comparison, Work, compare
from lepton_airflow.packaging.compression.quality import Judge
from lepton_airflow.packaging.export.fitted import as_fitted
from lepton_airflow.packaging.schema import Schema
from lepton_airflow.packaging.session import open_session

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
        (predicted,) = open_session(model).run(["probabilities"], self.feed)
        return predicted

    def compare(self, **changes: Any) -> Comparison:
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


def _products(count: int) -> bytes:
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


@pytest.fixture
def products() -> Callable[[int], bytes]:
    """``products(count)``: a chain of so many matrix products of 256 by 256, from ``x0`` to ``out``."""
    return _products
