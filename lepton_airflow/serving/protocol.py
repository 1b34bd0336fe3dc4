"""Requests and answers of the Open Inference Protocol, version 2, in JSON and in its binary extension.

The specifications: https://github.com/kserve/open-inference-protocol (REST) and, of binary tensors,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. What they leave open is
settled here:

- a missing value is ``null`` (or the token ``NaN``, which many clients write), for a category also ``""``;
- the values of an input mean what they mean in a column of a dataset (:mod:`lepton_airflow.data.features`), so a category may
  come as text or as a number, and infinite numbers are refused;
- an answer that is no number is ``null``, so that answers are strict JSON;
- every input has shape ``[N, 1]`` or ``[N]`` with the same N, its data flat or nested as the shape says.

A body is read by msgspec against the types below, in two steps: first all but the data of the tensors, then each tensor's
data as values of its datatype. So what does not belong into a request is never made into Python objects, and 8 MB of
``[[],[],…`` cost milliseconds. All numbers of a request become one array and are checked as one.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Raw, Struct

from lepton_airflow.data.features import KINDS, Feature, UnfitValues
from lepton_airflow.errors import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"  # of the JSON before binary tensors, both ways

_BITS = {f"{sign}INT{bits}": (sign, bits) for sign in ("", "U") for bits in (8, 16, 32, 64)}
_FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_NUMPY = {
    "BOOL": "|b1",
    **{name: f"<{'u' if sign else 'i'}{bits // 8}" for name, (sign, bits) in _BITS.items()},
    **_FLOATS,
}
DATATYPES = (*_NUMPY, "BYTES")
_EXAMPLE = {"BOOL": "true", "BYTES": '"text"', **dict.fromkeys(_BITS, "7"), **dict.fromkeys(_FLOATS, "0.5")}
_SHORT = 1000  # characters of a name or an id
_PARAMETERS = 16 * 1024  # bytes of an object of parameters
_TENSORS = 2000  # inputs and outputs that are worth reading, if the model does not have more


class RequestError(Exception):
    """What is wrong with a request; the client gets its sentence as an error object, with this HTTP status and headers."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def to_keep(self) -> Self:
        """Itself without its frames: they lead to those of its callers, so to itself, and hold the request until Python's
        collector comes, which may be minutes."""
        self.__context__ = None
        return self.with_traceback(None)


_Name = Annotated[str, Meta(max_length=_SHORT)]
_Parameters = dict[_Name, str | int | float | bool | None]
_NOTHING = Raw()


class _Tensor(Struct):
    name: _Name
    datatype: _Name
    shape: list[Annotated[int, Meta(ge=0)]]
    data: Raw = _NOTHING
    parameters: Raw = _NOTHING


class _Asked(Struct):
    name: _Name
    parameters: Raw = _NOTHING


class _Rest(Struct, kw_only=True):
    outputs: Annotated[list[_Asked], Meta(max_length=_TENSORS)] | None = None
    id: Annotated[str, Meta(max_length=_SHORT)] | None = None
    parameters: Raw = _NOTHING


@dataclass(frozen=True)
class Inference:
    """A request in the form that the model takes.

    :ivar feed: by ONNX input, ``[N, 1]``: float32, or text.
    :ivar outputs: the outputs asked for, in that order, and whether each is to come as binary data.
    """

    feed: dict[str, NDArray[Any]]
    rows: int
    outputs: dict[str, bool]
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


@dataclass(frozen=True)
class Answer:
    """The body of an answer.

    :ivar header_length: the length of its JSON where binary tensors follow.
    :ivar encoding: how it is compressed.
    """

    content: bytes
    rows: int
    header_length: int | None = None
    encoding: str | None = None


def parse(
    body: bytes,
    features: Sequence[Feature],
    outputs: Sequence[str],
    max_rows: int,
    header_length: int | None = None,
) -> Inference:
    """Read the body of an inference request; raises :class:`RequestError` with one sentence about what is wrong.

    :param header_length: of the JSON at the start of the body, where binary tensors follow it.
    """
    head, binary = body, memoryview(b"")
    if header_length is not None:
        if not 0 <= header_length <= len(body):
            raise RequestError(400, f"{HEADER_LENGTH} is {header_length}, the body has {len(body)} bytes.")
        head, binary = body[:header_length], memoryview(body)[header_length:]
    request: Any
    usual = _read_usual(head, binary if header_length is not None else None, features, max_rows)
    if usual is not None:
        request, feed, rows = usual
    else:
        request, with_infinity = _read(head, max(_TENSORS, len(features)))
        feed, rows = _read_tensors(request.inputs, features, max_rows, binary, with_infinity=with_infinity)
    parameters = _parameters(request.parameters, "the request")
    return Inference(feed, rows, _asked(request, outputs, parameters), request.id, parameters)


def render(
    endpoint: str,
    version: str,
    inference: Inference,
    outputs: Mapping[str, Output],
    values: Sequence[NDArray[Any]],
) -> Answer:
    """An answer; the values come in the order of ``inference.outputs``."""
    answer: dict[str, Any] = {"model_name": endpoint, "model_version": version}
    if inference.id is not None:
        answer["id"] = inference.id
    if inference.parameters is not None:
        answer["parameters"] = inference.parameters
    blobs: list[bytes] = []
    answer["outputs"] = []
    for (name, binary), array in zip(inference.outputs.items(), values, strict=True):
        told = dict(outputs[name].parameters)
        if binary:
            blobs.append(_to_binary(array))
            told["binary_data_size"] = len(blobs[-1])
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": outputs[name].datatype,
            "shape": list(array.shape),
        }
        if told:
            tensor["parameters"] = told
        if not binary:
            tensor["data"] = array.ravel().tolist()  # what is no finite number becomes null
        answer["outputs"].append(tensor)
    head = msgspec.json.encode(answer)
    if not blobs:
        return Answer(head, inference.rows)
    return Answer(b"".join([head, *blobs]), inference.rows, len(head))


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
    return msgspec.json.encode({"inputs": inputs})


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
            {"name": o.name, "datatype": o.datatype, "shape": o.shape}
            | ({"parameters": o.parameters} if o.parameters else {})
            for o in outputs.values()
        ],
    }


def configuration(
    endpoint: str, features: Sequence[Feature], outputs: Mapping[str, Output], max_rows: int
) -> dict[str, Any]:
    """A model as Triton describes its configuration, where the shapes are those of one row."""

    def tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
        found = {"name": name, "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"}
        # It has no shape without sizes: what clients see of one is that after "reshape".
        return found | ({"dims": shape} if shape else {"dims": [1], "reshape": {"shape": []}})

    return {
        "name": endpoint,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_rows,
        "input": [tensor(f.name, KINDS[f.kind].datatypes[0], [1]) for f in features],
        "output": [tensor(o.name, o.datatype, o.shape[1:]) for o in outputs.values()],
    }


class _UsualNumbers(Struct):
    name: _Name
    datatype: Literal["FP32", "FP64"]
    shape: list[Annotated[int, Meta(ge=0)]]
    data: list[float | None]
    parameters: Raw = _NOTHING


class _UsualTexts(Struct):
    name: _Name
    datatype: Literal["BYTES"]
    shape: list[Annotated[int, Meta(ge=0)]]
    data: list[str | None]
    parameters: Raw = _NOTHING


class _Size(Struct, forbid_unknown_fields=True):
    binary_data_size: Annotated[int, Meta(ge=0)]


class _UsualBinaryNumbers(Struct, forbid_unknown_fields=True):
    name: _Name
    datatype: Literal["FP32", "FP64", "INT64", "INT32"]
    shape: list[Annotated[int, Meta(ge=0)]]
    parameters: _Size


class _UsualBinaryTexts(Struct, forbid_unknown_fields=True):
    name: _Name
    datatype: Literal["BYTES"]
    shape: list[Annotated[int, Meta(ge=0)]]
    parameters: _Size


@lru_cache(maxsize=64)
def _usual(kinds: tuple[str, ...], *, is_binary: bool) -> msgspec.json.Decoder[Any]:
    """Of a request that sends numbers and texts in one form and in the model's order, as most do: it is decoded in one pass."""
    numbers, texts = (_UsualBinaryNumbers, _UsualBinaryTexts) if is_binary else (_UsualNumbers, _UsualTexts)
    inputs = tuple(numbers if kind == "number" else texts for kind in kinds)
    made = msgspec.defstruct("_UsualRequest", [("inputs", tuple[inputs])], bases=(_Rest,))  # type: ignore[valid-type]
    return msgspec.json.Decoder(made)


def _read_usual(
    head: bytes, binary: memoryview | None, features: Sequence[Feature], max_rows: int
) -> tuple[Any, dict[str, NDArray[Any]], int] | None:
    """A request of the usual form, its feed and its rows; None for all others, and for those in which anything is wrong."""
    try:
        request = _usual(tuple([f.kind for f in features]), is_binary=binary is not None).decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    inputs = request.inputs
    shape = inputs[0].shape
    if shape[1:] not in ([], [1]) or not shape or not 0 < shape[0] <= max_rows:
        return None
    rows = shape[0]
    for tensor, feature in zip(inputs, features, strict=True):
        if tensor.name != feature.name or tensor.shape != shape:
            return None
    try:
        data = _usual_data(inputs, rows) if binary is None else _usual_binary(inputs, rows, binary)
        if data is None:
            return None
        feed: dict[str, NDArray[Any]] = {}
        numbers = [values for values, f in zip(data, features, strict=True) if f.kind == "number"]
        if numbers:
            columns = iter(KINDS["number"].read(_packed(numbers, rows)))
        for values, feature in zip(data, features, strict=True):
            column = next(columns) if feature.kind == "number" else KINDS[feature.kind].read(values)
            feed[feature.input] = column.reshape(-1, 1)
    except (UnfitValues, RequestError):
        return None
    return request, feed, rows


def _usual_data(tensors: Sequence[Any], rows: int) -> list[Any] | None:
    """The values of tensors in JSON."""
    if any(len(tensor.data) != rows or tensor.parameters is not _NOTHING for tensor in tensors):
        return None
    return [tensor.data for tensor in tensors]


def _usual_binary(tensors: Sequence[Any], rows: int, binary: memoryview) -> list[Any] | None:
    """The values of binary tensors."""
    import numpy as np

    found: list[Any] = []
    at = 0
    for tensor in tensors:
        size, start = tensor.parameters.binary_data_size, at
        at += size
        if at > len(binary):
            return None
        if tensor.datatype == "BYTES":
            found.append(_texts(tensor.name, rows, bytes(binary[start:at])))
        else:
            dtype = _dtype(tensor.datatype)
            if size != rows * dtype.itemsize:
                return None
            found.append(np.frombuffer(binary, dtype, rows, start))
    return found if at == len(binary) else None


@lru_cache(maxsize=64)
def _request(most: int) -> msgspec.json.Decoder[Any]:
    """Of a request in any form, with so many inputs at most."""
    inputs = Annotated[list[_Tensor], Meta(min_length=1, max_length=most)]
    return msgspec.json.Decoder(
        msgspec.defstruct("_Request", [("inputs", inputs)], bases=(_Rest,), kw_only=True)
    )


_OF_MLSERVER = ("content_type", "headers")  # which its client writes as null where they are not set
_PARAMETERS_OF = msgspec.json.Decoder(_Parameters)


def _read(body: bytes, most: int) -> tuple[Any, bool]:
    """The frame of a request, all but the values of its tensors; and whether the largest number in it means infinity."""
    try:
        return _request(most).decode(body), False
    except msgspec.ValidationError as error:
        raise RequestError(400, f"the request does not fit the protocol: {_told(error)}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if (b"NaN" in body or b"Infinity" in body) and (mended := _mended(body)) != body:
            return _read(mended, most)[0], b"Infinity" in body
        hint = ", or text holds half of a surrogate pair" if re.search(rb"\\u[dD][89a-fA-F]", body) else ""
        raise RequestError(400, f"the request is not JSON: {_told(error)}{hint}.") from None


_LARGEST = sys.float_info.max
_ENDS = (_LARGEST, -_LARGEST)
_TOKENS = {b"NaN": b"null", b"Infinity": repr(_LARGEST).encode()}


def _mended(body: bytes) -> bytes:
    """The tokens NaN and Infinity, which are no JSON, and no part of a string, as null and the largest number."""
    # A text that does not end is taken whole, too: to look for its end again from each quote in it would take hours.
    tokens = rb'(?s)"(?:[^"\\]|\\.)*+"?|NaN|Infinity'
    return re.sub(tokens, lambda found: _TOKENS.get(found[0], found[0]), body)


def _told(error: Exception) -> str:
    """What a decoder says, which holds no values."""
    return str(error).replace("`", "").rstrip(".")


def _parameters(raw: Raw, where: str) -> dict[str, Any] | None:
    size = memoryview(raw).nbytes
    if size in (0, 4) and bytes(raw) in (b"", b"null"):
        return None
    if size > _PARAMETERS:
        raise RequestError(400, f"parameters of {where} have more than {_PARAMETERS} bytes, the limit.")
    expected = f"parameters of {where}: expected an object of strings, numbers and booleans"
    try:
        found = _PARAMETERS_OF.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, f"{expected} ({_told(error)}).") from None
    unset = [name for name, value in found.items() if value is None]
    if wrong := [name for name in unset if name not in _OF_MLSERVER]:
        raise RequestError(400, f"{expected}, {_short(wrong[0])} is null.")
    return {name: value for name, value in found.items() if value is not None}


def _by_name(tensors: Sequence[_Tensor], known: Sequence[str]) -> dict[str, _Tensor]:
    """The tensors by their names; each input of the model once, and nothing else."""
    found = {tensor.name: tensor for tensor in tensors}
    if len(found) < len(tensors):
        counts = Counter(tensor.name for tensor in tensors)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RequestError(400, f"inputs names {_short(twice)} twice.")
    if unknown := found.keys() - set(known):
        name = next(name for name in found if name in unknown)
        raise RequestError(400, f"the model has no input {_short(name)}; {did_you_mean(name[:100], known)}")
    if absent := [name for name in known if name not in found]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise RequestError(
            400,
            f"input {', '.join(map(repr, absent[:5]))}{more} missing: send a tensor of every feature, with null where unknown.",
        )
    return found


def _read_tensors(
    inputs: Sequence[_Tensor],
    features: Sequence[Feature],
    max_rows: int,
    binary: memoryview,
    *,
    with_infinity: bool,
) -> tuple[dict[str, NDArray[Any]], int]:
    """The feed and the number of rows of tensors in any form that the protocol allows."""
    tensors = _by_name(inputs, [f.name for f in features])
    first = inputs[0]
    rows = _rows(first, max_rows)
    data: dict[str, Any] = {}
    for tensor in inputs:  # in the order of their binary data
        if tensor is not first and (count := _rows(tensor, max_rows)) != rows:
            raise RequestError(
                400,
                f"input {tensor.name!r} has {count} rows, input {first.name!r} has {rows}: expected the same.",
            )
        data[tensor.name], binary = _data(tensor, rows, binary)
        if with_infinity and tensor.datatype in _FLOATS:
            data[tensor.name] = [math.copysign(math.inf, v) if v in _ENDS else v for v in data[tensor.name]]
    if binary:
        raise RequestError(400, f"{len(binary)} bytes follow the last binary tensor: expected none.")
    return _feed(features, tensors, data, rows), rows


def _rows(tensor: _Tensor, max_rows: int) -> int:
    """How many rows the shape of an input says, checked with its datatype."""
    name, shape = tensor.name, tensor.shape
    if tensor.datatype not in DATATYPES:
        raise RequestError(
            400,
            f"input {name!r}: datatype {_short(tensor.datatype)} is unknown; {did_you_mean(tensor.datatype[:100], DATATYPES)}",
        )
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise RequestError(400, f"input {name!r}: shape {_short(shape)} should be [N, 1] or [N].")
    if shape[0] > max_rows:
        raise RequestError(
            413,
            f"input {name!r} has {_short(shape[0])} rows, the limit is {max_rows}: send them in several requests.",
        )
    if shape[0] == 0:
        raise RequestError(400, f"input {name!r} has no rows: expected at least one.")
    return shape[0]


def _data(tensor: _Tensor, rows: int, binary: memoryview) -> tuple[Any, memoryview]:
    """The values of an input, ``rows`` of them, a list or an array; and the binary data of the tensors after it."""
    parameters = _parameters(tensor.parameters, f"tensor {tensor.name!r}")
    size = parameters.get("binary_data_size") if parameters else None
    if size is None:
        if tensor.data is _NOTHING:
            raise RequestError(
                400, f"input {tensor.name!r} has neither data nor the parameter binary_data_size."
            )
        values = _from_json(tensor, rows)
        if parameters and tensor.datatype == "BYTES":
            values = _as_meant(tensor.name, values, parameters.get("content_type"))
        return values, binary
    if tensor.data is not _NOTHING:
        raise RequestError(
            400, f"input {tensor.name!r} has both data and binary_data_size: expected one of them."
        )
    if type(size) is not int or not 0 <= size <= len(binary):
        raise RequestError(
            400,
            f"input {tensor.name!r}: binary_data_size is {_short(size)}, {len(binary)} bytes are left in the body.",
        )
    texts = _from_binary(tensor, rows, binary[:size])
    if parameters and tensor.datatype == "BYTES":
        texts = _as_meant(tensor.name, texts, parameters.get("content_type"))
    return texts, binary[size:]


@cache
def _decoders(datatype: str) -> tuple[msgspec.json.Decoder[Any], ...]:
    """Of data without missing values, with them, and nested."""
    # A whole number keeps its digits, as a category is its digits.
    value: Any = {"BOOL": bool, "BYTES": str}.get(datatype, int | float)
    if datatype in _BITS:
        sign, bits = _BITS[datatype]
        # The decoder knows no limit above that of INT64; numpy refuses what UINT64 cannot hold.
        low, high = (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        value = Annotated[int, Meta(ge=low) if bits == 64 and sign else Meta(ge=low, le=high)]
    types = (list[value], list[value | None], list[tuple[value | None]])
    return tuple(msgspec.json.Decoder(t) for t in types)


def _from_json(tensor: _Tensor, rows: int) -> list[Any]:
    plain, with_missing, nested = _decoders(tensor.datatype)
    raw: Any = tensor.data
    is_nested = len(tensor.shape) == 2 and _NESTED.match(raw) is not None
    try:
        if is_nested:
            values = [row[0] for row in nested.decode(raw)]
        else:
            try:
                values = plain.decode(raw)
            except msgspec.ValidationError:
                values = with_missing.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            400, f"input {tensor.name!r}: {_told_of_values(error, tensor.datatype)}."
        ) from None
    _check_count(tensor, rows, len(values))
    if tensor.datatype == "UINT64" and any(value is not None and value >= 2**64 for value in values):
        row = next(i for i, value in enumerate(values) if value is not None and value >= 2**64)
        raise RequestError(400, f"input {tensor.name!r}: row {row} is beyond UINT64.")
    return values


def _as_meant(name: str, texts: list[Any], content_type: Any) -> list[Any]:
    """Texts in which MLServer's client has written something else, and says so."""
    if content_type == "base64":
        raise RequestError(400, f"input {name!r} is base64: expected plain text.")
    if content_type != "pd_json":  # a column that is not all text, one with missing values for example
        return texts
    values: list[Any] = []
    for text in texts:
        try:
            values.append(None if text is None else _VALUE.decode(text))
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            raise RequestError(
                400, f"input {name!r} is pd_json, but row {len(values)} is no JSON of one value."
            ) from None
    return values


_VALUE = msgspec.json.Decoder(str | int | float | bool | None)
_NESTED = re.compile(rb"\s*\[\s*\[")


def check_count(name: str, datatype: str, shape: list[int], count: int, max_rows: int) -> None:
    """Refuse an input that has ``count`` values where its shape says another number, or where its shape is wrong."""
    tensor = _Tensor(name, datatype, shape)
    _check_count(tensor, _rows(tensor, max_rows), count)


def _check_count(tensor: _Tensor, rows: int, count: int) -> None:
    if count != rows:
        raise RequestError(
            400, f"input {tensor.name!r} has {count} values, its shape {tensor.shape} says {rows}."
        )


def _told_of_values(error: Exception, datatype: str) -> str:
    """What a decoder says of a tensor's data, with the row where it names one."""
    row = re.search(r" - at `\$\[(\d+)\]", str(error))
    said = _told(error).partition(" - at ")[0]
    if row is None:
        return f"its data is no list of {datatype} values: {said}"
    return f"row {row[1]} is no {datatype} such as {_EXAMPLE[datatype]}: {said}"


@cache
def _dtype(datatype: str) -> np.dtype[Any]:
    import numpy as np

    return np.dtype(_NUMPY[datatype])


def _from_binary(tensor: _Tensor, rows: int, data: memoryview) -> Any:
    import numpy as np

    name, datatype = tensor.name, tensor.datatype
    if datatype == "BYTES":
        return _texts(name, rows, bytes(data))
    dtype = _dtype(datatype)
    if len(data) != rows * dtype.itemsize:
        raise RequestError(
            400,
            f"input {name!r}: its binary data has {len(data)} bytes, {rows} values of {datatype} have {rows * dtype.itemsize}.",
        )
    if datatype == "BOOL":
        values = np.frombuffer(data, dtype=np.uint8)
        if (values > 1).any():
            raise RequestError(400, f"input {name!r}: row {int((values > 1).argmax())} is no BOOL such as 1.")
        return values.astype(bool)
    return np.frombuffer(data, dtype=dtype)


def _texts(name: str, rows: int, data: bytes) -> list[str]:
    """Texts, each behind its length in four bytes, least significant first."""
    import numpy as np

    width = len(data) // rows - 4
    # Codes of one length, as many categories are: ASCII without zeros, which numpy takes for the end of a text.
    if 0 < width < 256 and len(data) == rows * (4 + width) and data.count(0) == 3 * rows and data.isascii():
        records = np.frombuffer(data, dtype=[("length", "<u4"), ("text", f"S{width}")])
        if (records["length"] == width).all():
            if rows < 256 or width > 8:
                text = data.decode()
                return [text[at : at + width] for at in range(4, len(text), 4 + width)]
            # Each different text is made once: as numbers of 64 bits they are sorted quickly.
            codes, places = np.unique(records["text"].astype("S8").view("<u8"), return_inverse=True)
            different = codes.view("S8").astype(f"U{width}").astype(object)
            return different[places].tolist()
    found, at, end = [], 0, len(data)
    length = struct.Struct("<I").unpack_from
    try:
        for _ in range(rows):
            start = at + 4
            at = start + length(data, at)[0]
            found.append(data[start:at].decode())
    except struct.error:
        at = end + 1
    except UnicodeDecodeError:
        raise RequestError(400, f"input {name!r}: row {len(found)} is text that is no UTF-8.") from None
    if at > end:
        raise RequestError(400, f"input {name!r}: its binary data ends before its {rows} texts do.")
    if at < end:
        raise RequestError(400, f"input {name!r}: {end - at} bytes follow its {rows} binary texts.")
    return found


def _feed(
    features: Sequence[Feature], tensors: Mapping[str, _Tensor], data: Mapping[str, Any], rows: int
) -> dict[str, NDArray[Any]]:
    """The values of all features as the model takes them, ``[N, 1]`` each."""
    for f in features:
        datatype = tensors[f.name].datatype
        if datatype not in KINDS[f.kind].datatypes:
            raise RequestError(
                400,
                f"input {f.name!r} is a {f.kind}: expected one of {', '.join(KINDS[f.kind].datatypes)}, not {datatype}.",
            )
    feed = {}
    numbers = [f for f in features if f.kind == "number"]
    if numbers:
        columns = _read_kind(
            "number", _block([(tensors[f.name], data[f.name]) for f in numbers], rows), numbers
        )
        for f, column in zip(numbers, columns, strict=True):
            feed[f.input] = column.reshape(-1, 1)
    for f in features:
        if f.kind != "number":
            feed[f.input] = _read_kind(f.kind, data[f.name], [f]).reshape(-1, 1)
    return feed


def _read_kind(kind: str, values: Any, features: Sequence[Feature]) -> NDArray[Any]:
    """The values as :attr:`Kind.read` gives them, ``[N]`` of one feature or ``[features, N]``."""
    try:
        return KINDS[kind].read(values)
    except UnfitValues as error:
        column, row = divmod(error.row, error.wrong.shape[-1])
        raise RequestError(
            400, f"input {features[column].name!r}: row {row} is {error.why}; send null for a missing value."
        ) from None


def _block(columns: Sequence[tuple[_Tensor, Any]], rows: int) -> NDArray[np.float64]:
    """The numbers of several inputs, ``[inputs, N]``."""
    import numpy as np

    block = _packed([values for _, values in columns], rows)
    for place, (tensor, _) in enumerate(columns):
        # The model takes float32, so that FP32 needs no rounding of its own.
        if tensor.datatype == "FP16":
            with np.errstate(over="ignore"):
                block[place] = block[place].astype(np.float16)
    return block


def _packed(columns: Sequence[Any], rows: int) -> NDArray[np.float64]:
    """Columns, lists or arrays, as one array ``[columns, rows]``, with NaN for None and infinity for what no float can hold."""
    import numpy as np

    block = np.empty((len(columns), rows))
    into = struct.Struct(f"{rows}d").pack_into  # in less than half of numpy's time
    for place, values in enumerate(columns):
        if type(values) is not list:
            with np.errstate(invalid="ignore"):  # NaN of the kind that signals
                block[place] = values
            continue
        try:
            into(block[place], 0, *values)
        except (struct.error, OverflowError):
            block[place] = _with_others(values)
    return block


def _with_others(values: list[float | None]) -> Any:
    import numpy as np

    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except OverflowError:  # a whole number that no float can hold
        return [_as_float(value) for value in values]


def _as_float(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf


def _asked(request: _Rest, outputs: Sequence[str], parameters: Mapping[str, Any] | None) -> dict[str, bool]:
    """The outputs asked for, and whether each is to come as binary data."""
    all_binary = _flag(parameters, "binary_data_output", "the request", default=False)
    if not request.outputs:
        return dict.fromkeys(outputs, all_binary)
    asked: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in outputs:
            raise RequestError(
                400,
                f"the model has no output {_short(output.name)}; {did_you_mean(output.name[:100], outputs)}",
            )
        if output.name in asked:
            raise RequestError(400, f"outputs names {output.name!r} twice.")
        where = f"output {output.name!r}"
        own = _parameters(output.parameters, where)
        if own and own.get("classification", 0) != 0:
            raise RequestError(400, f"{where} asks for the classification extension, which is not offered.")
        asked[output.name] = _flag(own, "binary_data", where, default=all_binary)
    return asked


def _flag(parameters: Mapping[str, Any] | None, name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default) if parameters else default
    if not isinstance(value, bool):
        raise RequestError(400, f"parameter {name} of {where} is {_short(value)}, expected true or false.")
    return value


def _to_binary(array: NDArray[Any]) -> bytes:
    if array.dtype.kind in "OUS":
        texts = [str(text).encode() for text in array.ravel().tolist()]
        return b"".join(part for text in texts for part in (len(text).to_bytes(4, "little"), text))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
