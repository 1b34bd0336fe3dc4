"""Raw values become the same bits in training and in the server, or are refused there and here for the same row."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.features import KINDS, Feature, feature_frame, kind_of, read_batches
from lepton_airflow.errors import BadInput
from lepton_airflow.serving.protocol import DATATYPES, RequestError, parse

NAN, INF = float("nan"), float("inf")
LARGEST = float(np.finfo(np.float32).max)
BEYOND = 2.0**128 - 2.0**103  # the first float64 that float32 rounds to infinity
WHOLE = [0, 7, -7, 2**24 + 1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]
FLOATS = [
    0.1,
    7.0,
    -0.0,
    1e-50,
    1e-40,
    2.0**53,
    LARGEST,
    float(np.nextafter(BEYOND, 0)),
    0.1 + 0.2,
    1e16,
    NAN,
]
TEXTS = ["", "7", "7.0", "AA", "ü b", "😀", "a\0b", "nan", "None", " ", "-0.0", "True"]

# Values to send through both paths, by kind of feature and by the datatype that a request may send them in. A new kind adds
# its own here.
VALUES: dict[str, dict[str, list[Any]]] = {
    "number": {
        "FP32": [*FLOATS, *WHOLE, None],
        "FP64": [*FLOATS, *WHOLE, 10**30, None],
        "INT64": [*WHOLE, None],
        "UINT64": [0, 7, 2**53 + 1, 2**64 - 1, None],
        "BOOL": [True, False, None],
    },
    "category": {
        "BYTES": [*TEXTS, None],
        "FP64": [*FLOATS, *WHOLE, INF, 1e39, 10**30, None],
        "INT64": [*WHOLE, None],
        "BOOL": [True, False, None],
    },
}
REFUSED: dict[str, dict[str, list[Any]]] = {
    "number": {"FP32": [BEYOND, -BEYOND, 1e39, INF, -INF, 10**400], "FP64": [BEYOND, 1e300, 10**39]},
    "category": {"BYTES": ["\ud800", "a\udfffb"]},
}
CASES = [(kind, datatype) for kind, values in VALUES.items() for datatype in values]


def bits(array: Any) -> Any:
    """An array as something that is equal only to the same bits of the same type."""
    return array.tolist() if array.dtype == object else (array.dtype, array.tobytes())


def through_training(kind: str, column: Any) -> Any:
    """What a trainer and a package get of a column, or the sentence about the values that are refused."""
    try:
        return bits(feature_frame(pd.DataFrame({"x": column}), [Feature("x", kind, "x")])["x"].to_numpy())
    except BadInput as error:
        return str(error)


def through_the_server(kind: str, datatype: str, values: list[Any]) -> Any:
    """What a served model gets of the same values in a request, or the sentence about those that are refused."""
    tensor = {"name": "x", "datatype": datatype, "shape": [len(values), 1], "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    try:
        feed = parse(body, [Feature("x", kind, "x")], ["label"], 1000).feed["x"]
    except RequestError as error:
        return str(error)
    return bits(feed.reshape(len(values)))


@pytest.mark.parametrize(("kind", "datatype"), CASES)
def test_training_and_the_server_get_the_same_bits(kind: str, datatype: str) -> None:
    pool = VALUES[kind][datatype]
    rng = np.random.default_rng(7)
    columns = [pool, *([value] for value in pool)]
    columns += [[pool[i] for i in rng.integers(0, len(pool), rng.integers(1, 30))] for _ in range(50)]
    for values in columns:
        expected = through_training(kind, pd.Series(values, dtype=object))
        assert not isinstance(expected, str), expected
        assert through_the_server(kind, datatype, values) == expected, values


@pytest.mark.parametrize(("kind", "datatype"), [(k, d) for k, values in REFUSED.items() for d in values])
def test_training_and_the_server_refuse_the_same_row_in_the_same_words(kind: str, datatype: str) -> None:
    good = VALUES[kind][datatype][0]
    for wrong in REFUSED[kind][datatype]:
        values = [good, None, wrong, good, wrong]
        said = through_training(kind, pd.Series(values, dtype=object))
        why = re.match(r"feature 'x' is (.+) in 2 of 5 rows, first in row 2: ", said)
        assert why, said
        answered = through_the_server(kind, datatype, values)
        if datatype == "BYTES":  # which is no JSON already
            assert "half of a surrogate pair" in answered
            continue
        assert answered == f"input 'x': row 2 is {why[1]}; send null for a missing value."


@pytest.mark.parametrize(
    "column",
    [
        *(pd.Series([7, 0, 100], dtype=dtype) for dtype in ("float64", "float32", "int64", "int8", "uint64")),
        *(pd.Series([7, None, 100], dtype=dtype) for dtype in ("float64", "Float64", "Int64")),
        pd.Series([0.1, None, -0.0], dtype="float32"),
        pd.Series([True, False]),
        pd.Series([True, None], dtype="boolean"),
    ],
    ids=lambda column: str(column.dtype),
)
def test_a_typed_column_gives_what_its_values_give(column: Any) -> None:
    values = [None if value is pd.NA else value for value in column.tolist()]
    for kind in KINDS:
        assert through_training(kind, column) == through_training(kind, pd.Series(values, dtype=object))


def test_random_numbers_survive_parquet_arrow_and_json_alike() -> None:
    rng = np.random.default_rng(11)
    exponents = rng.uniform(-60, 38, 2000)
    numbers = rng.choice([-1, 1], 2000) * 10.0**exponents
    values = [None if i % 9 == 0 else float(x) for i, x in enumerate(numbers)]
    from_arrow = pa.table({"x": pa.array(values, pa.float64())}).to_pandas()["x"]
    found = through_training("number", from_arrow)
    for start in range(0, 2000, 500):
        part = values[start : start + 500]
        assert through_the_server("number", "FP64", part)[1] == found[1][4 * start : 4 * (start + 500)]


def test_numbers_are_rounded_to_float32_once_each_and_keep_their_sign() -> None:
    read = KINDS["number"].read
    assert read([2**24 + 1, 0.1, None, True]).tolist()[:2] == [2.0**24, float(np.float32(0.1))]
    assert np.signbit(read([-0.0]))[0]
    assert np.isnan(read([1, None, NAN])).tolist() == [False, True, True]
    # 2**53 + 1 is no float64; float64 comes first in both paths, so both round down
    assert read([2**53 + 1]) == read(np.array([2**53 + 1])) == np.float32(2**53)


def test_categories_are_text_and_a_whole_number_has_one_spelling() -> None:
    read = KINDS["category"].read
    assert read([7, 7.0, "7", "7.0", 0.5, True, -0.0, None, NAN, ""]).tolist() == [
        *("7", "7", "7", "7.0", "0.5", "True", "0", "", "", ""),
    ]
    frame = pd.DataFrame({"whole": [7, 8, 9], "with_missing": [7, None, 9]})
    features = [Feature(n, "category", n) for n in frame]
    assert feature_frame(frame, features).to_numpy().tolist() == [["7", "7"], ["8", ""], ["9", "9"]]


def test_what_read_gives_is_missing_where_nothing_was() -> None:
    for kind in KINDS.values():
        given = kind.read([None, kind.blank if kind.blank != "" else "x"])
        assert kind.is_missing(given).tolist() == [True, False]
        assert given.dtype == kind.dtype


def test_every_kind_has_values_above_and_datatypes_of_the_protocol() -> None:
    assert set(VALUES) == set(KINDS)
    for kind in KINDS.values():
        assert set(kind.datatypes) <= set(DATATYPES)


def test_onnx_runtime_takes_what_read_gives() -> None:
    from onnx import TensorProto, helper

    from lepton_airflow.packaging.session import open_session

    for kind in KINDS.values():
        element = TensorProto.DataType.Value(kind.tensor.upper())
        ends = [helper.make_tensor_value_info(name, element, [None]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        session = open_session(model.SerializeToString())
        assert session.get_inputs()[0].type == f"tensor({kind.tensor})"
        given = kind.read([kind.blank, None])
        np.testing.assert_array_equal(session.run(["y"], {"x": given})[0], given)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (
            pd.Series(pd.to_datetime(["2013-01-01"])),
            r"'x' should hold numbers, .*datetime64.* \(a time is no number\)",
        ),
        (
            pd.Series(["a"]),
            r"'x' should hold numbers, it has dtype object \(could not convert string to float: 'a'\)",
        ),
        (
            pd.Series([1.0, INF, -INF]),
            r"in 2 of 3 rows, first in row 1: inf; mend these values or make them missing",
        ),
    ],
)
def test_a_column_that_holds_no_numbers_is_refused_in_a_sentence(column: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        feature_frame(pd.DataFrame({"x": column}), [Feature("x", "number", "x")])


def test_a_frame_keeps_the_order_of_the_features_and_its_index() -> None:
    frame = pd.DataFrame({"b": [1.5, 2.5], "unused": [0, 0], "a": ["x", None]}, index=[5, 3])
    found = feature_frame(frame, [Feature("a", "category", "a"), Feature("b", "number", "b")])
    assert list(found) == ["a", "b"]
    assert found.index.tolist() == [5, 3]
    assert found.to_numpy().tolist() == [["x", 1.5], ["", 2.5]]


def test_a_dataset_says_which_features_are_categories() -> None:
    info = DatasetInfo(features=["a", "b"], categorical=["b"])
    assert [kind_of(info, name) for name in info.features] == ["number", "category"]


def test_batches_hold_so_many_rows_in_the_order_of_the_file(tmp_path: Any) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": range(250), "y": range(250)}), path, row_group_size=100)
    batches = list(read_batches(path, ["x"], 70))
    assert max(map(len, batches)) == 70
    assert pd.concat(batches)["x"].tolist() == list(range(250))
    with pytest.raises(BadInput, match=r"column 'z' is not in rows\.parquet"):
        list(read_batches(path, ["z"]))


@pytest.mark.parametrize("datatype", ["FP16", "FP32"])
def test_a_category_is_not_taken_from_a_type_that_rounds_it(datatype: str) -> None:
    assert through_training("category", pd.Series([0.1])) == ["0.1"]
    assert through_training("category", pd.Series([0.1], dtype="float32")) == ["0.10000000149011612"]
    refused = through_the_server("category", datatype, [0.1])
    assert re.search(f"is a category: expected one of BYTES, .*, not {datatype}", str(refused))


def test_half_precision_is_rounded_before_it_is_read() -> None:
    expected = through_training("number", pd.Series([0.1, None], dtype="float16"))
    assert through_the_server("number", "FP16", [0.1, None]) == expected
