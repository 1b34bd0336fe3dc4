"""Load a split into memory as trainers get it, and check that its features and target can be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo, load_frame, read_info
from lepton_airflow.data.features import KINDS, Feature, feature_frame
from lepton_airflow.errors import BadInput, brief
from lepton_airflow.packaging.schema import Schema, features_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_NAMED = 20  # features at most that a message names


@dataclass(frozen=True)
class Rows:
    """A checked dataset in memory: raw features and target as trainers get them.

    :ivar name: what messages call it.
    :ivar frame: features and target.
    :ivar clusters: number of each row's cluster; None if the dataset names no cluster column.
    :ivar moments: values of the time column; None if the dataset names none.
    """

    name: str
    info: DatasetInfo
    schema: Schema
    frame: pd.DataFrame
    clusters: NDArray[np.int64] | None = None
    moments: NDArray[Any] | None = None

    @property
    def target(self) -> str:
        """The target column."""
        return str(self.info.target)

    @property
    def y(self) -> NDArray[Any]:
        """The target, (n,): class numbers as int64, or float64."""
        return self.frame[self.target].to_numpy()

    @classmethod
    def load(
        cls, path: Path, name: str, like: Rows | None = None, max_rows: int | None = None, seed: int = 0
    ) -> Rows:
        """Read a split made by PrepareData.

        :param like: the training rows; these must have the same features and classes.
        :param max_rows: keep a random sample of this many rows, in their order, and a row of each class that it lacks.
        :raises BadInput: a column or the target cannot be learned from; the message says which and why.
        """
        import numpy as np
        import pandas as pd

        info = read_info(path)
        target = _checked_target(info, name, like)
        others = [c for c in (info.cluster_column, info.time_column) if c]
        wanted = (like.info if like else info).features
        who = (
            dict.fromkeys(wanted, f"{name}: {like.name} has the feature, take both from one PrepareData")
            if like
            else {}
        )
        frame = load_frame(path, list(dict.fromkeys([*wanted, target, *others])), who)
        if not len(frame):
            raise BadInput(f"{name}: 0 rows, expected some; check the window and the filters of the data.")
        if max_rows is not None and len(frame) > max_rows:
            kept = np.random.default_rng(seed).choice(len(frame), max_rows, replace=False)
            if info.task == "classification":
                lacked = frame[~frame[target].isin(frame[target].iloc[kept])].drop_duplicates(target)
                kept = np.append(kept, lacked.index)
            frame = frame.iloc[np.sort(kept)].reset_index(drop=True)
        features = like.schema.features if like else features_of(info)
        try:
            raw = feature_frame(frame, features)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
        if like is None:
            _check_not_empty(raw, features, name)
        raw = raw.astype({f.name: KINDS[f.kind].trainer_dtype for f in features})
        classes = like.schema.classes if like else list(info.classes)
        if info.task == "classification":
            classes, raw[target] = _class_numbers(frame[target], classes, name, target)
            if like is None:
                _check_every_class(raw[target], classes, name, target)
        else:
            raw[target] = _numbers_to_predict(frame[target], name, target)
        clusters = pd.factorize(frame[info.cluster_column])[0] if info.cluster_column else None
        moments = frame[info.time_column].to_numpy() if info.time_column else None
        return cls(name, info, Schema(features, str(info.task), classes), raw, clusters, moments)

    def joined(self, more: Rows) -> Rows:
        """These rows and then those of another dataset, to train on."""
        import pandas as pd

        frame = pd.concat([self.frame, more.frame], ignore_index=True)
        name, info = f"{self.name} and {more.name}", replace(self.info, rows=len(frame))
        return Rows(name, info, self.schema, frame)

    def take(self, rows: NDArray[np.intp]) -> pd.DataFrame:
        """Some rows, as a trainer gets them."""
        return self.frame.iloc[rows].reset_index(drop=True)


def _checked_target(info: DatasetInfo, name: str, like: Rows | None) -> str:
    """The name of the target; raises when there is none, there are no features, or the training rows have another."""
    if info.target is None or info.task not in ("classification", "regression"):
        raise BadInput(
            f"{name}: the dataset's target is {info.target!r} and its task {info.task!r}, expected a target column and "
            "classification or regression; set them in PrepareData."
        )
    if not info.features:
        raise BadInput(f"{name}: the dataset has no features; list them in PrepareData.")
    reference = like.info if like else info
    if info.target != reference.target or info.task != reference.task:
        raise BadInput(
            f"{name}: its target is {info.target!r} ({info.task}), that of train is {reference.target!r} "
            f"({reference.task}); take both from one PrepareData."
        )
    return info.target


def _check_not_empty(raw: pd.DataFrame, features: Sequence[Feature], name: str) -> None:
    empty = [f.name for f in features if KINDS[f.kind].is_missing(raw[f.name]).all()]
    if empty:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        them = "it" if len(empty) == 1 else "them"
        what = "feature {} is" if len(empty) == 1 else "features {} are"
        raise BadInput(
            f"{name}: {what.format(', '.join(map(repr, empty[:_NAMED])) + more)} missing in all {len(raw):,} rows, so nothing "
            f"can be learned from {them}; name {them} in PrepareData's drop, or mend the source."
        )


def _check_every_class(numbers: pd.Series[Any], classes: list[Any], name: str, column: str) -> None:
    """Raise unless there are two classes or more, and a row of each."""
    import numpy as np

    present = np.unique(numbers)
    if len(present) < max(2, len(classes)):
        absent = [c for i, c in enumerate(classes) if i not in present]
        found = (
            f"has no row of {absent[0]!r}" if len(present) > 1 else f"is {classes[present[0]]!r} in all rows"
        )
        raise BadInput(
            f"{name}: target {column!r} {found} ({len(numbers):,} rows), expected every class at least once; "
            "widen the window or mend the target."
        )


def _class_numbers(
    target: pd.Series[Any], classes: list[Any], name: str, column: str
) -> tuple[list[Any], NDArray[Any]]:
    """The classes, and the number of each row's class; raises when a row has none or an unknown one."""
    import numpy as np

    missing = int(target.isna().sum())
    if missing:
        raise BadInput(
            f"{name}: target {column!r} is missing in {missing:,} of {len(target):,} rows; drop these rows."
        )
    values = target.tolist()
    classes = classes or sorted(set(values))
    number = {c: i for i, c in enumerate(classes)}
    if not any(v in number for v in set(values)):  # classes that JSON has only as text, such as dates
        values = [str(v) for v in values]
    unknown = sorted({str(v) for v in values if v not in number})
    if unknown:
        raise BadInput(
            f"{name}: target {column!r} has the value {brief(unknown[0])}, which is none of train's classes {', '.join(map(brief, classes[:8]))}; "
            "drop these rows or train on them."
        )
    return classes, np.array([number[v] for v in values], dtype=np.int64)


def _numbers_to_predict(target: pd.Series[Any], name: str, column: str) -> NDArray[np.float64]:
    import numpy as np

    try:
        values = target.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise BadInput(
            f"{name}: target {column!r} has dtype {target.dtype}, expected numbers for regression; "
            "set task='classification' or convert it."
        ) from None
    bad = ~np.isfinite(values)
    if bad.any():
        raise BadInput(
            f"{name}: target {column!r} is missing or infinite in {int(bad.sum()):,} of {len(values):,} rows, first in "
            f"row {int(np.argmax(bad))}; drop these rows."
        )
    return np.asarray(values)
