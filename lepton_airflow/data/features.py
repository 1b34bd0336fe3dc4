"""The kinds of features, and the one way in which raw values become what a model takes.

A column of a dataset and the values of a request go through the same function, :attr:`Kind.read`. So a served model gets
the bits that it would have got in training. Only the sentence about a refused value differs: here it speaks of the rows of
a dataset, in :mod:`lepton_airflow.serving.protocol` of the rows of a request.

To add a kind of feature, add one entry to :data:`KINDS`, and values of it to ``tests/data/test_features.py``, which sends
them through training and through the server. Reading, packages, ONNX inputs and the server's checks need no more. What a new
kind needs besides: which columns of a dataset are of it (:func:`kind_of`, and a field beside ``categorical`` in
:mod:`lepton_airflow.data.dataset`, set by PrepareData), how a request writes its values (``request_body`` in
:mod:`lepton_airflow.serving.protocol`) and which rows DeployModel probes it with, its bins in
:mod:`lepton_airflow.data.profile`, its probe for missing values in :mod:`lepton_airflow.training.parity`, and what a model does
with it (``lepton_airflow/models``, ``packaging/export/sklearn.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lepton_airflow.data.dataset import DatasetInfo

BATCH_ROWS = 65_536


class UnfitValues(Exception):
    """Raised by :attr:`Kind.read` for values that no model may get.

    :ivar why: what these values are, to be read after "is".
    :ivar wrong: (n,) which of the values.
    :ivar first: the first of them, as text.
    """

    def __init__(self, why: str, wrong: NDArray[np.bool_], first: str) -> None:
        super().__init__(why)
        self.why = why
        self.wrong = wrong
        self.first = first

    @property
    def row(self) -> int:
        """Place of the first of them."""
        return int(self.wrong.argmax())


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All that is known of a kind of feature.

    :ivar read: turns raw values (a pandas column, a numpy array or a list; None is a missing value) into what the model
        takes, (n,). Raises :class:`UnfitValues` for some of the values, TypeError or ValueError for their type as a whole.
    :ivar is_missing: says of the values that ``read`` gave which are missing, (n,).
    :ivar blank: a value that every model takes.
    :ivar dtype: numpy's type of what ``read`` gives.
    :ivar trainer_dtype: numpy's type of the column that a trainer gets; it holds the same values.
    :ivar tensor: type of the elements of its ONNX input: ``float``, ``string``, … (ONNX Runtime: ``tensor(float)``).
    :ivar datatypes: datatypes of the Open Inference Protocol that a request may send it in; the first one is recommended.
    """

    read: Callable[[Any], NDArray[Any]]
    is_missing: Callable[[Any], Any]
    blank: float | str
    dtype: str
    trainer_dtype: str
    tensor: str
    datatypes: tuple[str, ...]


def _read_numbers(values: Any) -> NDArray[np.float32]:
    """float32, NaN where a value is missing; a number that float32 cannot hold is refused."""
    import numpy as np

    if getattr(getattr(values, "dtype", None), "kind", "") in ("m", "M"):
        raise TypeError("a time is no number")
    try:
        if hasattr(values, "to_numpy"):  # pandas has several ways to say that a value is missing
            wide = np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
        else:
            wide = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except OverflowError:  # a whole number that no float can hold
        wide = np.array([_as_float(value) for value in values])
    with np.errstate(over="ignore", invalid="ignore"):  # NaN of the kind that signals
        narrow = wide.astype(np.float32)
    infinite = np.isinf(narrow)
    if infinite.any():
        raise UnfitValues("infinite or beyond float32 (3.4e38)", infinite, f"{wide[infinite][0]:g}")
    return narrow


def _as_float(value: Any) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:
        return float("inf")


def _numbers_missing(values: Any) -> Any:
    import numpy as np

    return np.isnan(values)


def _read_categories(values: Any) -> NDArray[np.object_]:
    """Text, ``""`` where a value is missing; text that cannot be written as UTF-8, as ONNX stores it, is refused."""
    import numpy as np

    items = values.tolist() if hasattr(values, "tolist") else list(values)
    types = set(map(type, items))
    if not types <= {str, type(None)}:
        items = _as_texts(values, items)
    elif type(None) in types:
        items = [value or "" for value in items]
    try:
        "".join(items).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON and Python can spell
        wrong = np.array([not _is_utf8(text) for text in items])
        raise UnfitValues("text that is no UTF-8", wrong, repr(items[wrong.argmax()])[:60]) from None
    return np.array(items, dtype=object)


def _as_texts(values: Any, items: list[Any]) -> list[str]:
    """Values of any type as text."""
    if hasattr(values, "isna"):  # pandas has several ways to say that a value is missing
        missing = values.isna().tolist()
    else:
        missing = [value is None or value != value for value in items]
    return ["" if absent else _as_text(value) for value, absent in zip(items, missing, strict=True)]


def _as_text(value: Any) -> str:
    """A category as text. Whole numbers arrive as floats where another row has none, so 7.0 is the category 7."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _categories_missing(values: Any) -> Any:
    return values == ""


_NUMBERS = (
    "FP32",
    "FP64",
    "FP16",
    *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    "BOOL",
)

KINDS: dict[str, Kind] = {
    "number": Kind(
        read=_read_numbers,
        is_missing=_numbers_missing,
        blank=0.0,
        dtype="float32",
        # float64, because scikit-learn computes in it; rounded to float32, because the ONNX model gets that.
        trainer_dtype="float64",
        tensor="float",
        datatypes=_NUMBERS,
    ),
    "category": Kind(
        read=_read_categories,
        is_missing=_categories_missing,
        blank="",
        dtype="object",
        trainer_dtype="object",
        tensor="string",
        # Not FP16 and FP32: 0.1 would be another category than 0.1 in a column of doubles, and an unknown one at that.
        datatypes=("BYTES", *(name for name in _NUMBERS if name not in ("FP16", "FP32"))),
    ),
}


@dataclass(frozen=True)
class Feature:
    """One raw column that a model reads.

    :ivar kind: its entry in :data:`KINDS`.
    :ivar input: name of its ONNX input: the column's name where that is a plain identifier, else a safe form of it.
    """

    name: str
    kind: str
    input: str


def kind_of(info: DatasetInfo, column: str) -> str:
    """The kind that a dataset gives one of its features or carried columns."""
    return "category" if column in info.categorical else "number"


def feature_frame(frame: pd.DataFrame, features: Sequence[Feature]) -> pd.DataFrame:
    """The columns that a model reads, in the order of ``features``, as :attr:`Kind.read` gives them.

    :raises BadInput: a column is absent, there twice or not of its kind, or holds a value that no model may get.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for feature in features:
        name = feature.name
        if name not in frame.columns:
            raise BadInput(f"feature {name!r} is not among the columns; {did_you_mean(name, frame.columns)}")
        column = frame[name]
        if isinstance(column, pd.DataFrame):
            raise BadInput(
                f"feature {name!r} is there {column.shape[1]} times; give every column its own name."
            )
        try:
            columns[name] = KINDS[feature.kind].read(column)
        except UnfitValues as error:
            raise BadInput(
                f"feature {name!r} is {error.why} in {int(error.wrong.sum()):,} of {len(error.wrong):,} rows, first in row "
                f"{error.row}: {error.first}; mend these values or make them missing (null)."
            ) from None
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"feature {name!r} should hold {feature.kind}s, it has dtype {column.dtype} ({error}): "
                "convert it when preparing the data, or list it under categorical."
            ) from None
    return pd.DataFrame(columns, index=frame.index, columns=[f.name for f in features])


def read_batches(
    path: Path, columns: Sequence[str], batch_rows: int = BATCH_ROWS, who: str = ""
) -> Iterator[pd.DataFrame]:
    """Columns of a Parquet file in its row order, with at most ``batch_rows`` rows in memory at a time.

    :param who: what begins the sentence that a column is absent: who asks for it.
    :raises BadInput: a column is absent.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        for column in columns:
            if column not in present:
                raise BadInput(
                    f"{who}column {column!r} is not in {path.name}; {did_you_mean(column, present)}"
                )
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns)):
            yield batch.to_pandas()
