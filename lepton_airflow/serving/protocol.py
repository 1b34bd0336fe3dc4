"""Requests and answers of the Open Inference Protocol, version 2, in JSON.

The specification: https://github.com/kserve/open-inference-protocol (REST). What it leaves open is settled here:

- a missing value is ``null`` (or the token ``NaN``, which many clients write), for a category also ``""``;
- the values of an input mean what they mean in a column of a dataset (:mod:`lepton_airflow.data.features`), so a category may
  come as text or as a number, and infinite numbers are refused;
- an answer that is no number is ``null``, so that answers are strict JSON;
- every input has shape ``[N, 1]`` or ``[N]`` with the same N, its data flat or nested as the shape says;
- binary tensor data, an extension, is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import KINDS, Feature, UnfitValues
from lepton_airflow.errors import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INTEGERS = {f"{sign}INT{bits}": (sign, bits) for sign in ("", "U") for bits in (8, 16, 32, 64)}
_FLOATS = ("FP16", "FP32", "FP64")
DATATYPES = ("BOOL", *_INTEGERS, *_FLOATS, "BYTES")
# The types of Python's JSON values that a datatype admits. A bool is no int here.
_VALUES: dict[str, frozenset[type]] = {
    "BOOL": frozenset({bool, type(None)}),
    "BYTES": frozenset({str, type(None)}),
    **dict.fromkeys(_INTEGERS, frozenset({int, type(None)})),
    **dict.fromkeys(_FLOATS, frozenset({float, int, type(None)})),
}
_EXAMPLE = {
    "BOOL": "true",
    "BYTES": '"text"',
    **dict.fromkeys(_INTEGERS, "7"),
    **dict.fromkeys(_FLOATS, "0.5"),
}


class RequestError(Exception):
    """What is wrong with a request; the client gets its sentence as an error object, with this HTTP status and headers."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclass(frozen=True)
class Inference:
    """A request in the form that the model takes.

    :ivar feed: by ONNX input, ``[N, 1]``: float32, or text.
    :ivar outputs: names of the outputs asked for, in that order.
    """

    feed: dict[str, NDArray[Any]]
    rows: int
    outputs: list[str]
    id: str | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Output:
    """An output of the model as clients see it; ``shape`` has -1 for the number of rows.

    :ivar parameters: what else clients are told of it: of the probabilities of two classes ``positive_class``, the last column.
    """

    name: str
    datatype: str
    shape: list[int] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


def parse(body: bytes, features: Sequence[Feature], outputs: Sequence[str], max_rows: int) -> Inference:
    """Read the body of an inference request; raises :class:`RequestError` with one sentence about what is wrong."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON: {error}.") from None
    if not isinstance(request, dict):
        raise RequestError(400, f"the request is a JSON {_kind(request)}, expected an object with 'inputs'.")
    identifier, parameters = request.get("id"), request.get("parameters")
    if identifier is not None and not isinstance(identifier, str):
        raise RequestError(400, f"id={_short(identifier)} is not a string.")
    _check_parameters(parameters, "the request")
    tensors = _named(request.get("inputs"), "inputs")
    known = {f.name: f for f in features}
    for name in tensors:
        if name not in known:
            raise RequestError(400, f"the model has no input {name!r}; {did_you_mean(name, known)}")
    absent = [name for name in known if name not in tensors]
    if absent:
        raise RequestError(
            400,
            f"input {', '.join(map(repr, absent))} missing: send a tensor of every feature, with null where unknown.",
        )
    columns = {name: _column(name, tensor, max_rows) for name, tensor in tensors.items()}
    rows = {name: len(values) for name, (_, values) in columns.items()}
    first, count = next(iter(rows.items()))
    for name, number in rows.items():
        if number != count:
            raise RequestError(
                400, f"input {name!r} has {number} rows, input {first!r} has {count}: expected the same."
            )
    feed = {f.input: _array(f, *columns[f.name]) for f in features}
    return Inference(feed, count, _outputs_asked(request, outputs), identifier, parameters)


def render(
    endpoint: str,
    version: str,
    inference: Inference,
    outputs: Mapping[str, Output],
    values: Sequence[NDArray[Any]],
) -> bytes:
    """The JSON of an answer; the values come in the order of ``inference.outputs``."""
    answer: dict[str, Any] = {"model_name": endpoint, "model_version": version}
    if inference.id is not None:
        answer["id"] = inference.id
    if inference.parameters is not None:
        answer["parameters"] = inference.parameters
    answer["outputs"] = [
        {
            "name": name,
            "datatype": outputs[name].datatype,
            "shape": list(array.shape),
            **_with_parameters(outputs[name]),
            "data": _json_values(array),
        }
        for name, array in zip(inference.outputs, values, strict=True)
    ]
    # As ASCII, because a client's id may hold text that cannot be written as UTF-8.
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()


def request_body(features: Sequence[Feature], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The body of a request for rows of raw features, ``{column: value}`` each."""
    inputs = [
        {
            "name": f.name,
            "datatype": KINDS[f.kind].datatypes[0],
            "shape": [len(rows), 1],
            "data": [row[f.name] for row in rows],
        }
        for f in features
    ]
    return json.dumps({"inputs": inputs}, allow_nan=False).encode()


def metadata(
    endpoint: str, version: str, features: Sequence[Feature], outputs: Mapping[str, Output]
) -> dict[str, Any]:
    """What a model takes and gives, as the protocol describes a model."""
    return {
        "name": endpoint,
        "versions": [version],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": f.name, "datatype": KINDS[f.kind].datatypes[0], "shape": [-1, 1]} for f in features
        ],
        "outputs": [
            {"name": o.name, "datatype": o.datatype, "shape": o.shape, **_with_parameters(o)}
            for o in outputs.values()
        ],
    }


def _with_parameters(output: Output) -> dict[str, Any]:
    return {"parameters": output.parameters} if output.parameters else {}


def _named(tensors: Any, what: str) -> dict[str, dict[str, Any]]:
    """The tensors of a request by name; raises RequestError for what is no list of tensors, or names one twice."""
    if not isinstance(tensors, list) or not tensors:
        raise RequestError(400, f"{what} is {_short(tensors)}, expected a list of at least one tensor.")
    found: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise RequestError(400, f"{what} holds {_short(tensor)}, expected objects with a 'name'.")
        if tensor["name"] in found:
            raise RequestError(400, f"{what} names {tensor['name']!r} twice.")
        parameters = tensor.get("parameters")
        _check_parameters(parameters, f"tensor {tensor['name']!r}")
        if parameters and any(key.startswith("binary_data") for key in parameters):
            raise RequestError(
                400, f"tensor {tensor['name']!r} asks for binary data, an extension not offered: send 'data'."
            )
        found[tensor["name"]] = tensor
    return found


def _check_parameters(parameters: Any, where: str) -> None:
    if parameters is None:
        return
    plain = isinstance(parameters, dict) and all(
        isinstance(v, str | bool | int) or (isinstance(v, float) and math.isfinite(v))
        for v in parameters.values()
    )
    if not plain:
        raise RequestError(
            400, f"parameters of {where}: expected an object of strings, numbers and booleans."
        )


def _column(name: str, tensor: Mapping[str, Any], max_rows: int) -> tuple[str, list[Any]]:
    """The datatype and values of an input, checked against its own shape and datatype."""
    datatype, shape, data = tensor.get("datatype"), tensor.get("shape"), tensor.get("data")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise RequestError(
            400,
            f"input {name!r}: datatype {_short(datatype)} is unknown; {did_you_mean(str(datatype), DATATYPES)}",
        )
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or not isinstance(shape, list) or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise RequestError(400, f"input {name!r}: shape {_short(shape)} should be [N, 1] or [N].")
    rows = shape[0]
    if rows > max_rows:
        raise RequestError(
            413, f"input {name!r} has {rows} rows, the limit is {max_rows}: send them in several requests."
        )
    if rows == 0:
        raise RequestError(400, f"input {name!r} has no rows: expected at least one.")
    if not isinstance(data, list):
        raise RequestError(400, f"input {name!r}: data is {_short(data)}, expected a list.")
    if any(isinstance(item, list) for item in data):
        if len(shape) == 1 or not all(isinstance(item, list) and len(item) == 1 for item in data):
            raise RequestError(
                400, f"input {name!r}: the nesting of its data does not follow its shape {shape}."
            )
        data = [item[0] for item in data]
    if len(data) != rows:
        raise RequestError(400, f"input {name!r} has {len(data)} values, its shape {shape} says {rows}.")
    return datatype, _checked(name, datatype, data)


def _checked(name: str, datatype: str, data: list[Any]) -> list[Any]:
    wrong = set(map(type, data)) - _VALUES[datatype]
    if wrong:
        row = next(i for i, value in enumerate(data) if type(value) in wrong)
        raise RequestError(
            400,
            f"input {name!r}: row {row} is {_short(data[row])}, which is no {datatype} such as {_EXAMPLE[datatype]}.",
        )
    if datatype in _INTEGERS:
        sign, bits = _INTEGERS[datatype]
        low, high = (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for row, value in enumerate(data):
            if value is not None and not low <= value <= high:
                raise RequestError(400, f"input {name!r}: row {row} is {_short(value)}, beyond {datatype}.")
    return data


def _array(feature: Feature, datatype: str, data: list[Any]) -> NDArray[Any]:
    """The values of a feature as the model takes them, ``[N, 1]``."""
    kind = KINDS[feature.kind]
    if datatype not in kind.datatypes:
        raise RequestError(
            400,
            f"input {feature.name!r} is a {feature.kind}: expected one of {', '.join(kind.datatypes)}, not {datatype}.",
        )
    try:
        return kind.read(_rounded(feature, datatype, data)).reshape(-1, 1)
    except UnfitValues as error:
        raise RequestError(
            400, f"input {feature.name!r}: row {error.row} is {error.why}; send null for a missing value."
        ) from None


def _rounded(feature: Feature, datatype: str, data: list[Any]) -> Any:
    """The values as FP16 holds them, where that is their datatype. The model takes float32, so FP32 needs no rounding here."""
    import numpy as np

    if datatype != "FP16":
        return data
    try:
        with np.errstate(over="ignore"):
            numbers = [math.nan if value is None else float(value) for value in data]
            return np.array(numbers, dtype=np.float64).astype(np.float16)
    except OverflowError:
        row = next(i for i, value in enumerate(data) if value is not None and abs(value) > 1e308)
        raise RequestError(400, f"input {feature.name!r}: row {row} is beyond {datatype}.") from None


def _outputs_asked(request: Mapping[str, Any], outputs: Sequence[str]) -> list[str]:
    if not request.get("outputs"):
        return list(outputs)
    asked = _named(request["outputs"], "outputs")
    for name in asked:
        if name not in outputs:
            raise RequestError(400, f"the model has no output {name!r}; {did_you_mean(name, outputs)}")
    return list(asked)


def _json_values(array: NDArray[Any]) -> list[Any]:
    """The values of an output row by row; what is no finite number is null."""
    import numpy as np

    flat: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in flat]
    return flat


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
