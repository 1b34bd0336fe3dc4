"""Datasets as Parquet files that describe themselves.

PrepareData writes one Parquet file per split. Its key-value metadata holds a :class:`DatasetInfo` under the key
``lepton``, so every later stage knows target, features, time, clusters and which rows it has, from the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadInput, did_you_mean, first_line

if TYPE_CHECKING:
    import pandas as pd


_KEY = b"lepton"


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset says of itself: columns and their roles, the rows it has, and where they come from.

    :ivar task: ``classification`` or ``regression``.
    :ivar features: columns that a model may see, in order; the other columns are target, time, clusters, ids or carried.
    :ivar carried: columns that a model trained on these rows does not see, for models that were trained on others.
    :ivar categorical: the features and carried columns that are categories (text); all others of them are numbers.
    :ivar time_range: smallest and largest value of ``time_column`` in this split, both inclusive, ISO 8601; or None.
    :ivar labels_until: the last time that the labels of these rows look at, ISO 8601; None: they do not look ahead.
    :ivar label_horizon_s: how far a label looks ahead of its row [s].
    :ivar cluster_column: rows with an equal value depend on one another (one day's flights).
    :ivar known_clusters: clusters may lie on both sides of a cut in time: the question is how their later rows are predicted.
    :ivar id_columns: what tells the rows apart, whatever their values.
    :ivar split: ``train``, ``valid``, ``test``, or None before splitting.
    :ivar split_by: ``time``, ``group`` or ``random``.
    :ivar split_id: equal for the splits of equal rows in an equal division, which share no row.
    :ivar classes: the distinct values of the target in the order of their numbers, of two the positive one last; empty for
        regression.
    :ivar snapshot_sha256: digest of the snapshot that the rows were made from.
    """

    target: str | None = None
    task: str | None = None
    features: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    categorical: list[str] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)
    time_column: str | None = None
    time_range: list[str] | None = None
    labels_until: str | None = None
    label_horizon_s: float = 0.0
    cluster_column: str | None = None
    known_clusters: bool = False
    id_columns: list[str] = field(default_factory=list)
    split: str | None = None
    split_by: str | None = None
    split_id: str | None = None
    snapshot_sha256: str | None = None
    rows: int = 0

    @property
    def span(self) -> list[str] | None:
        """The times that the rows and their labels tell of, both inclusive, ISO 8601; None without a time column."""
        return self.time_range and [self.time_range[0], self.labels_until or self.time_range[1]]

    @property
    def positive_class(self) -> Any:
        """See :func:`positive_class`."""
        return positive_class(self.classes)


def positive_class(classes: Sequence[Any]) -> Any:
    """Of two classes the second: precision, recall and F1 are about it, and a threshold is one of its probability; else None."""
    return classes[1] if len(classes) == 2 else None


def read_info(path: Path, *, plain: bool = False) -> DatasetInfo:
    """Read the description that a Parquet file carries.

    :param plain: take a file that carries none, such as a snapshot, too; it says nothing of itself then.
    :raises BadInput: the file is damaged, or carries none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    if _KEY not in metadata:
        if plain:
            return DatasetInfo()
        raise BadInput(
            f"{path.name} does not say what its target and features are: expected a split made by PrepareData; "
            "pass prepare.output['train'], ['valid'] or ['test']."
        )
    known = {f.name for f in fields(DatasetInfo)}
    return DatasetInfo(**{k: v for k, v in json.loads(metadata[_KEY]).items() if k in known})


def unreadable(path: Path, error: Exception) -> BadInput:
    """What to say of a file that cannot be read as Parquet: whether it is none, or is damaged."""
    if is_parquet(path):
        return BadInput(
            f"{path.name} cannot be read as Parquet: {first_line(error)}. Run the task that wrote it again."
        )
    return BadInput(
        f"{path.name} is no Parquet file: land it with IngestData first, and pass ingest.output['snapshot'], or what "
        "PrepareData makes of it."
    )


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does; of a folder it is not known, so True."""
    if path.is_dir():
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def check_names(path: Path) -> None:
    """Raise BadInput when columns of a Parquet file differ by case alone, since DuckDB renames one of them."""
    import pyarrow.parquet as pq

    seen: dict[str, str] = {}
    for name in pq.read_schema(path).names:
        if (other := seen.setdefault(name.lower(), name)) is not name:
            raise BadInput(
                f"{path.name} has the columns {other!r} and {name!r}, which SQL does not tell apart: rename one of them."
            )


def info_sql(info: DatasetInfo) -> str:
    """The clause of DuckDB's ``COPY … TO`` that writes a dataset's description into the Parquet file."""
    text = json.dumps(asdict(info), sort_keys=True, ensure_ascii=False, allow_nan=False).replace("'", "''")
    return f"KV_METADATA {{lepton: '{text}'}}"


def load_frame(
    path: Path, columns: Sequence[str] | None = None, who: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Load columns of a Parquet file, by default all; raises BadInput when one is absent.

    :param who: by column, what begins the sentence that it is absent: who asks for it.
    """
    import pyarrow.parquet as pq

    present = pq.read_schema(path).names
    for column in columns or ():
        if column not in present:
            begin = f"{who[column]}: " if who and column in who else ""
            raise BadInput(f"{begin}column {column!r} is not in {path.name}; {did_you_mean(column, present)}")
    return pq.read_table(path, columns=list(columns) if columns is not None else None).to_pandas()


def time_span(time_range: Sequence[str]) -> tuple[datetime, datetime]:
    """First and last instant of an inclusive range; a date as its end means that whole day, no offset means UTC."""
    try:
        start, end = (datetime.fromisoformat(text) for text in time_range)
    except (ValueError, TypeError):
        raise BadInput(
            f"time_range {list(time_range)!r}: expected two ISO 8601 times; prepare the data again."
        ) from None
    if len(time_range[1]) <= len("2013-01-31"):
        end += timedelta(days=1) - timedelta.resolution
    return _utc(start), _utc(end)


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
