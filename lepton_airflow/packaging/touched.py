"""Which rows a model has touched, so that nobody judges it on rows that it knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo, read_info, time_span
from lepton_airflow.data.features import BATCH_ROWS, Feature, feature_frame, read_batches

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from lepton_airflow.packaging.package import ModelPackage


def row_fingerprints(path: Path, features: Iterable[Feature], target: str) -> NDArray[np.uint64]:
    """One 64-bit hash per distinct row of features and target, sorted; equal rows in two files get equal hashes."""
    import numpy as np
    import pandas as pd

    features = list(features)
    parts = []
    who = "rows without time and ids are known again by the model's features and target: "
    for batch in read_batches(path, [*(f.name for f in features), target], who=who):
        rows = feature_frame(batch, features)
        rows.columns = pd.RangeIndex(len(features))
        # An integer column with a null arrives as float, so all numbers are hashed as floats.
        numeric = pd.api.types.is_numeric_dtype(batch[target])
        rows["target"] = batch[target].astype(np.float64) if numeric else batch[target].astype(str)
        parts.append(np.unique(pd.util.hash_pandas_object(rows, index=False, categorize=False).to_numpy()))
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def id_fingerprints(path: Path, id_columns: Sequence[str]) -> NDArray[np.uint64]:
    """One 64-bit hash per distinct id, sorted; an id is equal as a number and as its text, and whatever its type."""
    import numpy as np

    return np.unique(_id_hashes(path, id_columns))


def _id_hashes(path: Path, id_columns: Sequence[str]) -> NDArray[np.uint64]:
    """The hash of each row's id, in the order of the rows."""
    import numpy as np
    import pandas as pd
    import pyarrow.parquet as pq

    parts = []
    with pq.ParquetFile(path) as file:  # not by pandas, in which a value's type depends on those beside it
        for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(id_columns))):
            ids = pd.DataFrame({i: _as_text(batch.column(name)) for i, name in enumerate(id_columns)})
            parts.append(pd.util.hash_pandas_object(ids, index=False, categorize=False).to_numpy())
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)


def untouched_by_id(package: ModelPackage, dataset_path: Path, info: DatasetInfo) -> NDArray[np.bool_] | None:
    """Which rows of a dataset the model has not touched, (n,); None where ids do not tell."""
    import numpy as np

    if package.rows is None or not package.card.row_identity or package.card.row_identity != info.id_columns:
        return None
    return np.isin(_id_hashes(dataset_path, info.id_columns), package.rows, invert=True)


def _as_text(column: pa.Array) -> list[str]:
    """Ids as text: whole numbers alike as integers and as floats, dates as midnight; nothing where one is missing."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("us"))
    return [_text_of(value) for value in column.to_pylist()]


def _text_of(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Decimal):
        return format(value.normalize(), "f")
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def touched_rows(
    paths: Sequence[Path], features: Iterable[Feature], target: str
) -> tuple[NDArray[np.uint64], list[str]]:
    """Fingerprints of the distinct rows of some datasets, and the id columns they are of; none: they are of the values."""
    import numpy as np

    infos = [read_info(path) for path in paths]
    ids = infos[0].id_columns if all(i.id_columns == infos[0].id_columns for i in infos) else []
    features = list(features)
    parts = [id_fingerprints(p, ids) if ids else row_fingerprints(p, features, target) for p in paths]
    return np.unique(np.concatenate(parts)), ids


def overlap(package: ModelPackage, dataset_path: Path, info: DatasetInfo) -> str | None:
    """Say which rows of a dataset the model has touched, in one sentence; None when it has touched none.

    Splits of equal rows in an equal division share no row. Otherwise the rows are others when their time ranges are apart,
    both ends included; and ids, where both sides have the same id columns, tell the rest. Equal values are no proof of
    an equal row, but rows without any common value are others. When nothing can tell, the sentence says so, and it counts
    as overlap.
    """
    import numpy as np

    card = package.card
    in_time, timeless = None, False
    for touched in card.touched:
        if info.split_id is not None and touched.split_id == info.split_id:
            if touched.split == info.split:
                return f"the model's {touched.role} rows are the same split ({info.split!r} of {info.split_id[:12]})."
        elif touched.time_range is None or info.span is None:
            timeless = True
        elif overlapping(info.span, touched.time_range):
            in_time = in_time or (
                f"the model's {touched.role} rows span {' to '.join(touched.time_range)} ({touched.time_column}), "
                f"which overlaps {' to '.join(info.span)}."
            )
    if in_time is None and not timeless:
        return None
    if package.rows is not None and card.row_identity and card.row_identity == info.id_columns:
        found = id_fingerprints(dataset_path, info.id_columns)
        common = len(np.intersect1d(found, package.rows, assume_unique=True))
        ids = ", ".join(info.id_columns)
        return f"it knows {common:,} of the {len(found):,} ids of these rows ({ids})." if common else None
    if in_time is not None:
        return in_time
    remedy = "name what tells the rows apart in PrepareData's id_columns or time_column, for both."
    if package.rows is None or card.row_identity:
        known_by = "time" if any(t.time_range for t in card.touched) else "nothing"
        if card.row_identity:
            known_by = f"id ({', '.join(card.row_identity)})"
        theirs = (
            f"id ({', '.join(info.id_columns)})" if info.id_columns else "time" if info.span else "neither"
        )
        return (
            "whether the model has touched these rows cannot be told: the model knows its rows by "
            f"{known_by}, the dataset has {theirs}; {remedy}"
        )
    found = row_fingerprints(dataset_path, card.features, card.target)
    common = len(np.intersect1d(found, package.rows, assume_unique=True))
    if not common:
        return None
    return (
        f"whether the model has touched these rows cannot be told: {common:,} of {len(found):,} distinct rows have the values "
        f"of rows that it has touched (features and target {card.target!r}), which may be chance; {remedy}"
    )


def overlapping(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two inclusive ranges of time have an instant in common."""
    (start, end), (first, last) = time_span(mine), time_span(theirs)
    return start <= last and first <= end
