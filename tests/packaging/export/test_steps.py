"""What an estimator computes before a threshold falls on the same side of it in scikit-learn and in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    PolynomialFeatures,
    PowerTransformer,
    RobustScaler,
    StandardScaler,
    TargetEncoder,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.packaging.export.sklearn import SklearnModel
from lepton_airflow.packaging.schema import Schema, features_of
from lepton_airflow.packaging.session import open_session, predict_onnx

NUMBERS, TEXTS = ["price", "rate", "share"], ["origin", "carrier"]
ROWS, NEAR = 600, 5000
BOOSTED_REGRESSION = HistGradientBoostingRegressor(max_iter=10)
BOOSTED, FOREST = HistGradientBoostingClassifier(max_iter=10), RandomForestClassifier(10, random_state=0)


def frame(rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    made = pd.DataFrame(
        {
            "price": np.round(rng.normal(12, 4, rows), 2),
            "rate": np.round(rng.lognormal(0, 1, rows), 3),
            "share": np.round(rng.uniform(0, 1, rows), 1),
        }
    )
    made = made.astype(np.float32).astype(float)
    return made.assign(
        origin=rng.choice(["JFK", "EWR", "ü"], rows), carrier=rng.choice(["AA", "UA", ""], rows)
    )


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return frame(ROWS, 1)


@pytest.fixture(scope="module")
def near(train: pd.DataFrame) -> pd.DataFrame:
    """Rows of training values, of the float32 beside them and of those half-way to the next: where thresholds are."""
    rng = np.random.default_rng(2)
    rows = frame(NEAR, 3)
    for column in NUMBERS:
        values = np.unique(train[column]).astype(np.float32)
        ways = [np.nextafter(values, np.float32(way)) for way in (-np.inf, np.inf)]
        middle = ((values[1:].astype(float) + values[:-1]) / 2).astype(np.float32)
        rows[column] = rng.choice(np.concatenate([values, *ways, middle]), NEAR).astype(float)
    return pd.concat([train, rows], ignore_index=True)


def differing(
    model: Any, train: pd.DataFrame, near: pd.DataFrame, features: list[str], task: str
) -> tuple[int, Any]:
    """How many rows get another prediction by more than rounding, and the graph."""
    score = (
        train["price"].fillna(12) / 4
        + np.log(train["rate"].fillna(1).clip(0.01))
        + train["share"].fillna(0)
        + (train["origin"] == "JFK")
    )
    classes = [0, 1] if task == "classification" else []
    model.fit(train[features], (score > score.median()).astype(int) if classes else score)
    categorical = [name for name in features if name in TEXTS]
    schema = Schema(features_of(DatasetInfo(features=features, categorical=categorical)), task, classes)
    fitted = SklearnModel(model, schema, "mine")
    graph = fitted.to_onnx()
    onnx = predict_onnx(open_session(graph.SerializeToString()), schema, near)
    return int((np.abs(onnx - fitted.predict(near)) > 1e-5).reshape(len(near), -1).any(axis=1).sum()), graph


@pytest.mark.parametrize(
    "first",
    [
        StandardScaler(),
        RobustScaler(),
        MinMaxScaler(),
        Binarizer(threshold=0.3),
        Binarizer(threshold=0.5),  # which float32 equals, and so do rows
        PolynomialFeatures(3),
        KBinsDiscretizer(encode="ordinal", quantile_method="averaged_inverted_cdf"),
        KBinsDiscretizer(encode="onehot-dense", strategy="uniform"),
        make_union(StandardScaler(), FunctionTransformer()),
        make_pipeline(StandardScaler(), PCA(2)),
    ],
    ids=lambda step: str(step)[:40],
)
@pytest.mark.parametrize(
    ("last", "task"),
    [
        (BOOSTED, "classification"),
        (BOOSTED_REGRESSION, "regression"),
        (FOREST, "classification"),
        (GradientBoostingRegressor(n_estimators=10), "regression"),
        (DecisionTreeRegressor(), "regression"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_row_near_a_threshold_changes_its_side(
    train: pd.DataFrame, near: pd.DataFrame, first: Any, last: Any, task: str
) -> None:
    assert differing(make_pipeline(first, last), train, near, NUMBERS, task)[0] == 0


@pytest.mark.parametrize(
    "options", [{"strategy": "median"}, {"strategy": "mean"}, {"add_indicator": True}], ids=str
)
@pytest.mark.parametrize("last", [BOOSTED, FOREST], ids=lambda value: type(value).__name__)
def test_what_fills_a_gap_is_the_same_number(
    train: pd.DataFrame, near: pd.DataFrame, options: dict[str, Any], last: Any
) -> None:
    gaps, others = train.copy(), near.copy()
    for rows in (gaps, others):
        for place, column in enumerate(NUMBERS):
            rows.loc[place :: 5 + place, column] = np.nan
    model = make_pipeline(SimpleImputer(**options), last)
    assert differing(model, gaps, others, NUMBERS, "classification")[0] == 0


@pytest.mark.parametrize("first", [StandardScaler(), PowerTransformer()], ids=str)
def test_a_split_between_missing_values_and_all_others(
    train: pd.DataFrame, near: pd.DataFrame, first: Any
) -> None:
    gaps, others = train.copy(), near.copy()
    for rows in (gaps, others):
        rows.loc[rows["origin"] == "JFK", "share"] = np.nan
        rows.loc[rows["origin"] != "JFK", "share"] = 0.5
    columns = ColumnTransformer([("s", first, ["share"])])
    assert differing(make_pipeline(columns, BOOSTED), gaps, others, NUMBERS, "classification")[0] == 0


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Skipping features")
def test_an_empty_column_is_left_out_as_the_imputer_does(train: pd.DataFrame, near: pd.DataFrame) -> None:
    model = make_pipeline(SimpleImputer(), BOOSTED)
    assert differing(model, train.assign(rate=np.nan), near, NUMBERS, "classification")[0] == 0


@pytest.mark.parametrize("numbers", [StandardScaler(), "passthrough", PowerTransformer()], ids=str)
@pytest.mark.parametrize("texts", [TargetEncoder(), OneHotEncoder(handle_unknown="ignore")], ids=str)
def test_columns_of_both_kinds(train: pd.DataFrame, near: pd.DataFrame, numbers: Any, texts: Any) -> None:
    near = near.copy()
    near.loc[::7, "origin"] = "never seen"
    columns = ColumnTransformer([("t", texts, TEXTS), ("n", numbers, NUMBERS)], sparse_threshold=0)
    last = FOREST if isinstance(numbers, PowerTransformer) else BOOSTED
    assert differing(make_pipeline(columns, last), train, near, NUMBERS + TEXTS, "classification")[0] == 0


def test_numbers_that_are_encoded_by_the_target(train: pd.DataFrame, near: pd.DataFrame) -> None:
    columns = ColumnTransformer([("t", TargetEncoder(), ["share"]), ("n", StandardScaler(), ["price"])])
    near = near.assign(share=train["share"].sample(len(near), replace=True, random_state=0).to_numpy())
    assert differing(make_pipeline(columns, FOREST), train, near, NUMBERS, "classification")[0] == 0


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (BaggingClassifier(make_pipeline(StandardScaler(), BOOSTED), 2, random_state=0), "classification"),
        (StackingRegressor([("a", Ridge()), ("b", make_pipeline(StandardScaler(), Ridge()))], BOOSTED_REGRESSION), "regression"),
    ],
    ids=["bagging of pipelines", "trees over linear models"],
)  # fmt: skip
def test_estimators_of_estimators(train: pd.DataFrame, near: pd.DataFrame, model: Any, task: str) -> None:
    assert differing(model, train, near, NUMBERS, task)[0] == 0


@pytest.mark.parametrize("in_training", [True, False], ids=["gaps in training", "none in training"])
@pytest.mark.parametrize(
    ("model", "task"),
    [
        (FOREST, "classification"),
        (ExtraTreesClassifier(10, random_state=0), "classification"),
        (BaggingClassifier(DecisionTreeClassifier(random_state=0), random_state=0), "classification"),
        (DecisionTreeRegressor(random_state=0), "regression"),
        (RandomForestRegressor(10, random_state=0), "regression"),
        (make_pipeline(StandardScaler(), FOREST), "classification"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_trees_send_a_missing_value_where_scikit_learn_sends_it(
    train: pd.DataFrame, near: pd.DataFrame, model: Any, task: str, *, in_training: bool
) -> None:
    gaps, others = train.copy(), near.copy()
    for rows in [others, *([gaps] if in_training else [])]:
        for place, column in enumerate(NUMBERS):
            rows.loc[place :: 5 + place, column] = np.nan
    assert differing(clone(model), gaps, others, NUMBERS, task)[0] == 0


@pytest.mark.parametrize(
    "first", [[], [ColumnTransformer([("n", "passthrough", NUMBERS)])]], ids=["", "passed through"]
)
def test_trees_on_raw_columns_stay_in_float32(
    train: pd.DataFrame, near: pd.DataFrame, first: list[Any]
) -> None:
    wrong, graph = differing(make_pipeline(*first, BOOSTED), train, near, NUMBERS, "classification")
    assert wrong == 0
    assert not any(a.name.endswith("_as_tensor") for node in graph.graph.node for a in node.attribute)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_layers_of_a_network_stay_in_float32_so_that_they_can_be_quantized(
    train: pd.DataFrame, near: pd.DataFrame
) -> None:
    from lepton_airflow.packaging.compression.convert import inspect

    model = make_pipeline(StandardScaler(), PCA(2), MLPClassifier((4,), max_iter=5, random_state=0))
    wrong, graph = differing(model, train, near, NUMBERS, "classification")
    assert wrong == 0
    assert inspect(graph).linear == 2  # the layers; not the components, which are float64
