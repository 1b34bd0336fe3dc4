from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lepton_airflow import models
from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.features import feature_frame
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.models import _columns
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, predict_onnx
from lepton_airflow.training.fit import deterministic
from lepton_airflow.training.search import distributions
from lepton_airflow.training.trainer import TrainerRun


@pytest.mark.parametrize("name", models.names())
def test_a_models_file_says_all_that_is_promised(name: str) -> None:
    module = models.load(name)
    documented = {
        line.split()[0] for line in (module.__doc__ or "").splitlines() if line and not line[0].isspace()
    }
    assert set(module.DEFAULTS) <= documented
    assert set(module.SEARCH_SPACE) <= set(module.DEFAULTS)
    for task in module.TASKS:
        trainer = models.find(name, task)
        assert set(distributions(trainer.search_space, trainer)) == set(module.SEARCH_SPACE)
        assert trainer.complete({}) == module.DEFAULTS


def test_an_unknown_model_gets_the_nearest_name() -> None:
    with pytest.raises(BadConfiguration, match="did you mean 'hist_gradient_boosting'"):
        models.load("hist_gradient_bosting")


def run_of(info: DatasetInfo) -> TrainerRun:
    return TrainerRun(
        info=info,
        features=info.features,
        target=str(info.target),
        task=str(info.task),
        classes=info.classes,
        seed=0,
        threads=1,
    )


def test_rare_and_unknown_categories_are_one() -> None:
    info = DatasetInfo(target="y", task="regression", features=["c"], categorical=["c"])
    train = pd.DataFrame({"c": ["a"] * 20 + ["b"] * 10 + ["rare"] * 3, "y": 0.0})
    encoder = _columns.scaled_and_one_hot(
        train, run_of(info), max_categories=5, min_frequency=5, sparse=False
    )
    shown = encoder.transform(pd.DataFrame({"c": ["a", "b", "rare", "never seen", ""]}))
    assert shown.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert _columns.frequent(train["c"], 1, 1) == ["a"]


def test_ranks_follow_the_mean_target() -> None:
    info = DatasetInfo(target="y", task="regression", features=["c"], categorical=["c"])
    train = pd.DataFrame({"c": ["a"] * 3 + ["b"] * 3 + ["z"] * 3, "y": [5.0] * 3 + [1.0] * 3 + [3.0] * 3})
    encoder = _columns.ordinal(train, run_of(info), max_categories=3, min_frequency=1)
    ranks = encoder.transform(pd.DataFrame({"c": ["b", "z", "a", "new"]}))[:, 0]
    np.testing.assert_array_equal(ranks, [0, 1, 2, np.nan])


def test_boosting_converts_exactly_where_values_lie_one_float_apart() -> None:
    """Adjacent float32 values have their midpoint, the split, between two floats: rounding it must not cross a value."""
    start = np.float32(1.0)
    values = [start]
    for _ in range(7):
        values.append(np.nextafter(values[-1], np.float32(2)))
    info = DatasetInfo(target="y", task="regression", features=["x"])
    raw = pd.DataFrame({"x": np.repeat(np.array(values, dtype=np.float32), 40)})
    features = features_of(info)
    frame = feature_frame(raw, features).astype(np.float64)
    frame["y"] = np.repeat(np.arange(8) % 2, 40).astype(float)
    module = models.load("hist_gradient_boosting")
    with deterministic(0, 1):
        model = module.fit(frame, None, module.DEFAULTS | {"min_samples_leaf": 5}, run_of(info))
    fitted = SklearnModel(model, Schema(features, "regression", []), "test")
    native = fitted.predict(frame)
    assert np.ptp(native) > 0.9  # it does split between neighbours
    session = open_session(fitted.to_onnx().SerializeToString())
    np.testing.assert_allclose(
        predict_onnx(session, Schema(features, "regression", []), raw), native, atol=1e-6
    )


@pytest.mark.parametrize("noise", [0.5, 50.0], ids=["many trees", "hardly one"])
def test_a_refit_makes_as_many_trees_as_had_the_least_loss(noise: float) -> None:
    info = DatasetInfo(target="y", task="regression", features=["x"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=600)
    frame = pd.DataFrame({"x": x.astype(np.float32), "y": np.sin(2 * x) + rng.normal(scale=noise, size=600)})
    train, valid = frame[:400], frame[400:]
    module, run = models.load("hist_gradient_boosting"), run_of(info)
    model = module.fit(train, valid, module.DEFAULTS, run)
    (told,) = run._told
    losses = [
        float(np.mean((stage - valid.y) ** 2))
        for stage in model[-1].staged_predict(model[0].transform(valid[["x"]]))
    ]
    assert told["max_iter"] == int(np.argmin(losses)) + 1
    assert len(losses) == min(told["max_iter"] + 10, 200) or told["max_iter"] == 1
    run.settled = told
    assert module.fit(frame, None, module.DEFAULTS, run)[-1].n_iter_ == told["max_iter"]
