"""Which rows a model has touched, so that nobody judges it on rows that it knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.features import Feature, feature_frame, read_batches
from lepton_airflow.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lepton_airflow.packaging.package import ModelPackage


def row_fingerprints(path: Path, features: Iterable[Feature], target: str) -> NDArray[np.uint64]:
    """One 64-bit hash per distinct row of features and target, sorted; equal rows in two files get equal hashes."""
    import numpy as np
    import pandas as pd

    features = list(features)
    parts = []
    for batch in read_batches(path, [*(f.name for f in features), target]):
        rows = feature_frame(batch, features)
        rows.columns = pd.RangeIndex(len(features))
        # An integer column with a null arrives as float, so all numbers are hashed as floats.
        numeric = pd.api.types.is_numeric_dtype(batch[target])
        rows["target"] = batch[target].astype(np.float64) if numeric else batch[target].astype(str)
        parts.append(np.unique(pd.util.hash_pandas_object(rows, index=False, categorize=False).to_numpy()))
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def overlap(package: ModelPackage, dataset_path: Path, info: DatasetInfo) -> str | None:
    """Say which rows of a dataset the model has touched, in one sentence; None when it has touched none.

    Two splits of one PrepareData run share no row. Otherwise time ranges decide, both ends included, and where either side has
    none, equal rows (features and target). When nothing can tell, the sentence says so, and it counts as overlap.
    """
    import numpy as np

    card = package.card
    unseen_by_time = []
    for touched in card.touched:
        if info.split_id is not None and touched.split_id == info.split_id:
            if touched.split == info.split:
                return f"the model's {touched.role} rows are the same split ({info.split!r} of {info.split_id[:12]})."
            unseen_by_time.append(True)
            continue
        if touched.time_range is None or info.time_range is None:
            unseen_by_time.append(False)
            continue
        mine, theirs = time_span(info.time_range), time_span(touched.time_range)
        if mine[0] <= theirs[1] and theirs[0] <= mine[1]:
            return (
                f"the model's {touched.role} rows span {' to '.join(touched.time_range)} ({touched.time_column}), "
                f"which overlaps {' to '.join(info.time_range)}."
            )
        unseen_by_time.append(True)
    if all(unseen_by_time):
        return None
    if package.rows is None:
        return (
            "whether the model has touched these rows cannot be told: "
            f"the model knows its rows by {'time' if any(t.time_range for t in card.touched) else 'nothing'}, "
            f"the dataset {'has' if info.time_range else 'lacks'} a time range; prepare both with the same time_column."
        )
    found = row_fingerprints(dataset_path, card.features, card.target)
    common = np.intersect1d(found, package.rows, assume_unique=True)
    if not len(common):
        return None
    return (
        f"{len(common):,} of {len(found):,} distinct rows equal rows that the model has touched (features and "
        f"target {card.target!r}; the data have no time column)."
    )


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
