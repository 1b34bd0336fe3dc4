"""The Open Inference Protocol in JSON: what is read, what is refused and how, what an answer looks like."""

from __future__ import annotations

import json
import time
from collections import Counter
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lepton_airflow.data.features import Feature
from lepton_airflow.serving.protocol import Inference, Output, RequestError, parse, render, request_body

FEATURES = [
    Feature("hour", "number", "hour"),
    Feature("größe (mm)", "number", "gr__e__mm_"),
    Feature("carrier", "category", "carrier"),
]
OUTPUTS = ["probabilities", "label"]
NAN = float("nan")


def tensor(name: str, data: Any, datatype: str = "FP32", shape: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data), 1], "data": data, **more}


def whole(*tensors: dict[str, Any], **more: Any) -> bytes:
    """A request for one row, in which the given tensors take the place of good ones."""
    good = [tensor("hour", [1.5]), tensor("größe (mm)", [2]), tensor("carrier", ["AA"], "BYTES")]
    given = {t["name"]: t for t in tensors}
    inputs = [given.pop(t["name"], t) for t in good] + list(given.values())
    return json.dumps({"inputs": inputs, **more}).encode()


def read(body: bytes) -> Inference:
    return parse(body, FEATURES, OUTPUTS, max_rows=100)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (tensor("hour", [1.5]), 1.5),
        (tensor("hour", [[1.5]]), 1.5),
        (tensor("hour", [1.5], shape=[1]), 1.5),
        (tensor("hour", [2], "FP64"), 2.0),
        (tensor("hour", [-3], "INT64"), -3.0),
        (tensor("hour", [255], "UINT8"), 255.0),
        (tensor("hour", [True], "BOOL"), 1.0),
        (tensor("hour", [None]), NAN),
        (tensor("hour", [NAN]), NAN),  # json.dumps writes the token NaN
        (tensor("hour", [None], "INT32"), NAN),
    ],
)
def test_a_number_comes_in_many_forms(given: dict[str, Any], wanted: float) -> None:
    inference = read(whole(given))
    assert inference.rows == 1
    assert inference.feed["hour"].dtype == np.float32
    np.testing.assert_array_equal(inference.feed["hour"], [[np.float32(wanted)]])


@pytest.mark.parametrize(
    ("datatype", "bits"), [("FP16", "017c"), ("FP32", "0100807f"), ("FP64", "010000000000f07f")]
)
def test_a_nan_of_any_bits_is_a_missing_value(datatype: str, bits: str) -> None:
    blobs = [bytes.fromhex(bits), bytes.fromhex(bits), b"\x02\x00\x00\x00AA"]
    inputs = [
        {"name": f.name, "shape": [1, 1], "parameters": {"binary_data_size": len(blob)}}
        | {"datatype": "BYTES" if f.kind == "category" else datatype}
        for f, blob in zip(FEATURES, blobs, strict=True)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    found = parse(b"".join([head, *blobs]), FEATURES, OUTPUTS, 100, len(head))
    assert np.isnan(found.feed["hour"]).all()


def test_a_category_is_text_a_number_or_missing() -> None:
    for datatype, value, wanted in (
        ("BYTES", "é", "é"),
        ("BYTES", None, ""),
        ("BYTES", "", ""),
        ("INT64", 7, "7"),
        ("FP64", 7.0, "7"),
        ("FP64", 0.5, "0.5"),
        ("FP64", NAN, ""),
        ("BOOL", True, "True"),
    ):
        assert read(whole(tensor("carrier", [value], datatype))).feed["carrier"].tolist() == [[wanted]]


def test_rows_keep_their_order_and_inputs_their_safe_names() -> None:
    rows = [{"hour": i / 4, "größe (mm)": -i, "carrier": str(i)} for i in range(5)]
    inference = read(request_body(FEATURES, rows))
    assert list(inference.feed) == ["hour", "gr__e__mm_", "carrier"]
    assert inference.feed["gr__e__mm_"].ravel().tolist() == [0, -1, -2, -3, -4]
    assert inference.feed["carrier"].ravel().tolist() == list("01234")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "Expected object, got array"),
        (b"[]", 400, "Expected object, got array"),
        (b"{}", 400, "missing required field inputs"),
        (b'{"inputs": {}}', 400, "Expected array, got object - at $.inputs"),
        (b'{"inputs": [1]}', 400, "Expected object, got int - at $.inputs[0]"),
        (whole(id=7), 400, "got int - at $.id"),
        (whole(parameters=[1]), 400, "parameters of the request"),
        (whole(parameters={"a": {}}), 400, "parameters of the request"),
        (whole(parameters={"a": NAN}), 400, "parameters of the request"),
        (whole(tensor("huor", [1.0])), 400, "no input 'huor'; did you mean 'hour'?"),
        (json.dumps({"inputs": [tensor("hour", [1.0])]}).encode(), 400, "'größe (mm)', 'carrier' missing"),
        (json.dumps({"inputs": [tensor("hour", [1.0])] * 2}).encode(), 400, "inputs names 'hour' twice"),
        (
            whole(tensor("hour", [1.0], parameters={"binary_data_size": 4})),
            400,
            "both data and binary_data_size",
        ),
        (whole(tensor("hour", [1.0], "FP31")), 400, "datatype 'FP31' is unknown; did you mean 'FP32'?"),
        (whole(tensor("hour", [1.0], ["FP32"])), 400, "got array - at $.inputs[0].datatype"),  # type: ignore[arg-type]
        (whole(tensor("hour", [1.0], shape=[1, 2])), 400, "shape [1, 2] should be [N, 1] or [N]"),
        (whole(tensor("hour", [1.0], shape=[-1])), 400, "Expected int >= 0 - at $.inputs[0].shape[0]"),
        (whole(tensor("hour", [1.0], shape=[1.5])), 400, "Expected int, got float - at $.inputs[0].shape[0]"),
        (whole(tensor("hour", [1.0], shape=[True])), 400, "got bool - at $.inputs[0].shape[0]"),
        (whole(tensor("hour", [1.0], shape="1")), 400, "got str - at $.inputs[0].shape"),
        (whole(tensor("hour", [], shape=[0, 1])), 400, "has no rows"),
        (whole(tensor("hour", [1.0], shape=[101, 1])), 413, "101 rows, the limit is 100"),
        (whole(tensor("hour", [1.0], shape=[10**30, 1])), 413, "the limit is 100"),
        (whole(tensor("hour", [1.0, 2.0], shape=[1, 1])), 400, "2 values, its shape [1, 1] says 1"),
        (whole(tensor("hour", [1.0, 2.0])), 400, "has 1 rows, input 'hour' has 2"),
        (
            whole(tensor("hour", [[1.0]], shape=[1])),
            400,
            "row 0 is no FP32 such as 0.5: Expected int | float | null, got array",
        ),
        (
            whole(tensor("hour", [[[1.0]]])),
            400,
            "row 0 is no FP32 such as 0.5: Expected int | float | null, got array",
        ),
        (whole(tensor("hour", [[1.0], 2.0])), 400, "row 1 is no FP32 such as 0.5: Expected array, got float"),
        (whole(tensor("hour", [[1.0, 2.0]])), 400, "Expected array of length 1"),
        (
            whole(tensor("hour", "x", shape=[1])),
            400,
            "its data is no list of FP32 values: Expected array, got str",
        ),
        (
            whole(tensor("hour", ["1"])),
            400,
            "row 0 is no FP32 such as 0.5: Expected int | float | null, got str",
        ),
        (whole(tensor("hour", [True])), 400, "got bool"),
        (
            whole(tensor("hour", [1.5], "INT64")),
            400,
            "row 0 is no INT64 such as 7: Expected int | null, got float",
        ),
        (whole(tensor("hour", [300], "UINT8")), 400, "row 0 is no UINT8 such as 7: Expected int <= 255"),
        (whole(tensor("hour", [1e39])), 400, "row 0 is infinite or beyond float32"),
        (whole(tensor("hour", [10**400])), 400, "beyond float32"),
        (whole(tensor("hour", ["a"], "BYTES")), 400, "'hour' is a number"),
        (whole(tensor("carrier", ["\ud800"], "BYTES")), 400, "half of a surrogate pair"),
        (whole(outputs=[{"name": "labels"}]), 400, "no output 'labels'; did you mean 'label'?"),
        (whole(outputs=["label"]), 400, "Expected object, got str - at $.outputs[0]"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused_in_one_sentence(body: bytes, status: int, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(body)
    assert refused.value.status == status
    assert words in str(refused.value)
    assert len(str(refused.value)) < 300


def test_an_answer_is_strict_json_with_what_was_asked_and_said() -> None:
    inference = read(
        whole(id="17", parameters={"who": "x"}, outputs=[{"name": "label"}, {"name": "probabilities"}])
    )
    assert list(inference.outputs) == ["label", "probabilities"]
    outputs = {
        "probabilities": Output("probabilities", "FP32", [-1, 2], {"positive_class": "late"}),
        "label": Output("label", "INT64", [-1]),
    }
    values = [np.array([1]), np.array([[np.nan, 0.25]], dtype=np.float32)]

    def strict(token: str) -> None:
        raise AssertionError(token)

    answer = json.loads(render("late", "3", inference, outputs, values).content, parse_constant=strict)
    assert answer == {
        "model_name": "late",
        "model_version": "3",
        "id": "17",
        "parameters": {"who": "x"},
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [1], "data": [1]},
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [1, 2],
                "parameters": {"positive_class": "late"},
                "data": [None, 0.25],
            },
        ],
    }


def test_what_mlserver_leaves_unset_counts_as_absent() -> None:
    unset = {"content_type": "str", "headers": None}
    body = whole(
        tensor("carrier", ["AA"], "BYTES", parameters=unset), parameters=unset, outputs=None, id=None
    )
    inference = read(body)
    assert inference.feed["carrier"].tolist() == [["AA"]]
    assert inference.parameters == {"content_type": "str"}


def test_texts_of_json_are_what_they_mean_and_base64_is_refused() -> None:
    def of(*texts: Any, content_type: str = "pd_json") -> list[str]:
        rows = [{"hour": 1, "größe (mm)": 2, "carrier": text} for text in texts]
        request = json.loads(request_body(FEATURES, rows))
        request["inputs"][2]["parameters"] = {"content_type": content_type}
        return read(json.dumps(request).encode()).feed["carrier"].ravel().tolist()

    assert of('"AA"', "7", "7.0", "null", None, '"null"') == ["AA", "7", "7", "", "", "null"]
    for wrong in ("AA", "[1]", ""):
        with pytest.raises(RequestError, match="'carrier' is pd_json, but row 1 is no JSON of one value"):
            of('"AA"', wrong)
    with pytest.raises(RequestError, match="'carrier' is base64: expected plain text"):
        of("QUE=", content_type="base64")


# What a number may be written as, by datatype; and what that means as float32, in plain Python.
_INTEGERS = {f"{'U' * u}INT{bits}": (u, bits) for u in (0, 1) for bits in (8, 16, 32, 64)}


def _numbers(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BOOL":
        return st.booleans()
    if datatype in _INTEGERS:
        unsigned, bits = _INTEGERS[datatype]
        low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return st.integers(low, high)
    width = {"FP16": 16, "FP32": 32, "FP64": 32}[datatype]  # FP64 within what float32 can hold
    return st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]


@st.composite
def _columns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Three inputs in any order, each in a datatype that its feature may have."""
    rows = draw(st.integers(1, 4))
    found = []
    for name in draw(st.permutations(["hour", "größe (mm)", "carrier"])):
        text = name == "carrier"
        datatype = "BYTES" if text else draw(st.sampled_from(["BOOL", *_INTEGERS, "FP16", "FP32", "FP64"]))
        value = st.text(st.characters(exclude_categories=["Cs"])) if text else _numbers(datatype)
        found.append(
            {"name": name, "datatype": datatype, "data": draw(st.lists(value, min_size=rows, max_size=rows))}
        )
    return found


@given(columns=_columns(), nested=st.booleans(), missing=st.integers(0, 3))
def test_any_good_request_means_what_its_values_mean_in_json_and_in_binary(
    columns: list[dict[str, Any]], *, nested: bool, missing: int
) -> None:
    rows = len(columns[0]["data"])
    wanted = {c["name"]: c["data"] for c in columns}
    safe = {"hour": "hour", "größe (mm)": "gr__e__mm_", "carrier": "carrier"}
    blobs = []
    in_json, in_binary = [], []
    for place, column in enumerate(columns):
        data = column["data"]
        frame = {"name": column["name"], "datatype": column["datatype"], "shape": [rows, 1]}
        with_gap = [None if missing == row and place == 0 else value for row, value in enumerate(data)]
        in_json.append(frame | {"data": [[v] for v in with_gap] if nested else with_gap})
        if column["datatype"] == "BYTES":
            blob = b"".join(len(v.encode()).to_bytes(4, "little") + v.encode() for v in data)
        else:
            kinds = {"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
            unsigned, bits = _INTEGERS.get(column["datatype"], (0, 0))
            dtype = kinds.get(column["datatype"]) or f"<{'u' if unsigned else 'i'}{bits // 8}"
            blob = np.array(data, dtype=dtype).tobytes()
        blobs.append(blob)
        in_binary.append(frame | {"parameters": {"binary_data_size": len(blob)}})

    head = json.dumps({"inputs": in_binary}).encode()
    binary = parse(b"".join([head, *blobs]), FEATURES, OUTPUTS, 100, len(head)).feed
    plain = read(json.dumps({"inputs": in_json}).encode()).feed
    for place, column in enumerate(columns):
        name, key = column["name"], safe[column["name"]]
        values = wanted[name]
        if name == "carrier":
            assert binary[key].ravel().tolist() == values
            expected: list[Any] = values
        else:
            expected = [np.float32(float(v)) for v in values]
            np.testing.assert_array_equal(binary[key].ravel(), np.array(expected, dtype=np.float32))
        if place == 0 and missing < rows:
            expected = list(expected)
            expected[missing] = "" if name == "carrier" else np.float32("nan")
        if name == "carrier":
            assert plain[key].ravel().tolist() == expected
        else:
            np.testing.assert_array_equal(plain[key].ravel(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("width", [2, 9, None])
@pytest.mark.parametrize("rows", [1, 100, 300])
@pytest.mark.parametrize(
    ("datatype", "dtype"), [("FP32", "<f4"), ("FP64", "<f8"), ("INT32", "<i4"), ("INT64", "<i8")]
)
def test_the_usual_form_is_read_in_one_pass_and_means_the_same(
    monkeypatch: pytest.MonkeyPatch, datatype: str, dtype: str, rows: int, width: int | None
) -> None:
    rng = np.random.default_rng(rows)
    numbers = rng.integers(-(2**31), 2**31, (2, rows)).astype(dtype)
    texts = ["".join(rng.choice(list("ABC"), width or rng.integers(0, 12))) for _ in range(rows)]
    texts[-1] = "Zürich" if width is None else texts[-1]
    columns = [*numbers.tolist(), texts]
    blobs = [column.tobytes() for column in numbers]
    blobs.append(b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in texts))
    inputs = [
        {"name": f.name, "datatype": "BYTES" if f.kind == "category" else datatype, "shape": [rows, 1]}
        | {"parameters": {"binary_data_size": len(blob)}}
        for f, blob in zip(FEATURES, blobs, strict=True)
    ]

    def binary(order: slice) -> Inference:
        head = json.dumps({"inputs": inputs[order]}).encode()
        return parse(b"".join([head, *blobs[order]]), FEATURES, OUTPUTS, 1000, len(head))

    other_order = binary(slice(None, None, -1))
    monkeypatch.setattr("lepton_airflow.serving.protocol._read", None)  # which reads all other forms
    found = [binary(slice(None))]
    if datatype[0] == "F":
        rows_of_json = [
            dict(zip([f.name for f in FEATURES], row, strict=True)) for row in zip(*columns, strict=True)
        ]
        found.append(parse(request_body(FEATURES, rows_of_json), FEATURES, OUTPUTS, 1000))
    for inference in found:
        for key, values in other_order.feed.items():
            assert inference.feed[key].dtype == values.dtype
            np.testing.assert_array_equal(inference.feed[key], values)
    np.testing.assert_array_equal(other_order.feed["hour"].ravel(), numbers[0].astype(np.float32))
    assert other_order.feed["carrier"].ravel().tolist() == texts


_ODD: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    2.5,
    1e39,
    2**64,
    "",
    "x",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    "FP32",
    "BYTES",
    "INT8",
]


@st.composite
def _nearly_usual(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A body of the usual form, a third in another order, in half of the cases with faults; and the length of its JSON."""
    rows, is_binary = draw(st.integers(1, 3)), draw(st.booleans())
    odd = st.sampled_from(_ODD).map(deepcopy)
    inputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for f in FEATURES:
        one: dict[str, Any] = {"name": f.name, "datatype": "BYTES", "shape": [rows, 1]}
        if f.kind == "category":
            texts = draw(st.lists(st.text("ABÜ", max_size=3), min_size=rows, max_size=rows))
            one["data"] = texts
            blobs.append(b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in texts))
        else:
            one["datatype"] = draw(st.sampled_from(["FP32", "FP64"]))
            numbers = draw(st.lists(st.floats(width=32, allow_infinity=False), min_size=rows, max_size=rows))
            one["data"] = [None if np.isnan(number) else number for number in numbers]
            blobs.append(np.array(numbers, {"FP32": "<f4", "FP64": "<f8"}[one["datatype"]]).tobytes())
        if is_binary:
            del one["data"]
            one["parameters"] = {"binary_data_size": len(blobs[-1])}
        inputs.append(one)
    if draw(st.sampled_from([False, False, True])):
        inputs, blobs = inputs[::-1], blobs[::-1]
    asked: dict[str, Any] = {"inputs": inputs}
    asked |= draw(
        st.sampled_from([{}, {"id": "7"}, {"outputs": [{"name": "label"}]}, {"parameters": {"a": 1}}])
    )
    faults = draw(st.sampled_from([0, 0, 1, 2]))
    places = [asked, *inputs]
    for _ in range(faults):
        place = draw(st.sampled_from(places))
        match draw(st.sampled_from(["value", "value", "item", "absent", "order", "twice", "more", "bytes"])):
            case "value":
                place[draw(st.sampled_from([*place, "parameters"]))] = draw(odd)
            case "item" if lists := [v for v in place.values() if isinstance(v, list) and v]:
                chosen = draw(st.sampled_from(lists))
                chosen[draw(st.integers(0, len(chosen) - 1))] = draw(odd)
            case "absent" if place:
                del place[draw(st.sampled_from(list(place)))]
            case "order" if isinstance(asked.get("inputs"), list):
                asked["inputs"] = asked["inputs"][::-1]
            case "twice" if isinstance(asked.get("inputs"), list):
                asked["inputs"] = [*asked["inputs"], inputs[0]]
            case "more":
                place["more"] = draw(odd)
            case "bytes" if blobs:
                blobs[-1] = blobs[-1][:-1]
    head = json.dumps(asked).encode()
    if faults == 2 and draw(st.booleans()):
        at = draw(st.integers(0, len(head)))
        head = head[:at] + draw(st.binary(max_size=2)) + head[at + draw(st.integers(0, 2)) :]
    return (head + b"".join(blobs), len(head)) if is_binary else (head, None)


def _outcome(body: bytes, header: int | None) -> Any:
    try:
        found = parse(body, FEATURES, OUTPUTS, 100, header)
    except RequestError as error:
        return error.status, str(error)
    feed = {name: (values.dtype, values.shape, values.tolist()) for name, values in found.feed.items()}
    return repr(feed), found.rows, found.outputs, found.id, found.parameters


def test_the_usual_form_is_read_as_any_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read in one pass means what the general way makes of the same bytes, and is not refused by it."""
    from lepton_airflow.serving import protocol

    usual = protocol._read_usual
    ways: Counter[str] = Counter()

    @settings(max_examples=300)
    @given(sent=_nearly_usual())
    def compare(sent: tuple[bytes, int | None]) -> None:
        found: list[Any] = []
        monkeypatch.setattr(protocol, "_read_usual", lambda *args: found.append(usual(*args)) or found[-1])
        outcome = _outcome(*sent)
        monkeypatch.setattr(protocol, "_read_usual", lambda *_: None)
        assert outcome == _outcome(*sent)
        assert len(outcome) > 2 or (outcome[0] in (400, 413) and len(outcome[1]) < 600)
        ways["refused" if len(outcome) == 2 else "usual" if any(found) else "general"] += 1

    compare()
    assert min(ways[way] for way in ("usual", "general", "refused")) > 0.05 * ways.total(), ways
    assert ways["usual"] > 0.2 * ways.total(), ways


@given(body=st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["inputs", "outputs", "id", "parameters", "name", "datatype", "shape", "data"]), inner
    ),
).map(lambda value: json.dumps(value).encode()), header=st.none() | st.integers(-1, 300))  # fmt: skip
def test_whatever_is_sent_is_read_or_refused_in_a_short_sentence(body: bytes, header: int | None) -> None:
    refused: list[RequestError] = []
    try:
        parse(body, FEATURES, OUTPUTS, 100, header)
    except RequestError as error:
        refused.append(error)
    assert all(error.status in (400, 413) and len(str(error)) < 600 for error in refused)


def test_a_model_of_many_inputs_is_asked_in_any_form() -> None:
    features = [Feature(f"n{number}", "number", f"n{number}") for number in range(2500)]
    inputs = [tensor(f.name, [number]) for number, f in enumerate(features)]
    for form in (inputs, inputs[::-1], [{**each, "datatype": "INT64"} for each in inputs]):
        inference = parse(json.dumps({"inputs": form}).encode(), features, OUTPUTS, max_rows=100)
        assert [inference.feed[f.input].item() for f in features] == list(range(2500))
    with pytest.raises(RequestError, match="Expected array of length <= 2000"):
        read(json.dumps({"inputs": inputs}).encode())


def test_the_input_that_is_named_twice_is_found_among_many_at_once() -> None:
    names = [f"n{number}" for number in range(1999)]
    body = json.dumps({"inputs": [tensor(name, [1]) for name in [*names, names[-1]]]}).encode()
    started = time.thread_time()
    with pytest.raises(RequestError, match="inputs names 'n1998' twice"):
        read(body)
    assert time.thread_time() - started < 0.03


def test_a_text_without_an_end_beside_a_nan_takes_no_longer_than_its_bytes() -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match="not JSON"):
        read(b'{"a":"NaN' + b'\\"' * 2**19)
    assert time.monotonic() - started < 5
