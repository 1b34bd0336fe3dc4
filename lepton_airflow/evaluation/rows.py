"""The rows that a model is judged on: their labels and clusters, and a sentence about what does not fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo, load_frame, read_info
from lepton_airflow.data.features import Feature, kind_of
from lepton_airflow.errors import BadConfiguration, BadInput, brief, did_you_mean
from lepton_airflow.packaging.card import ModelCard

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class EvaluationRows:
    """The rows of one dataset, for models of one task.

    :ivar y: (n,) class numbers in the order of the model's classes, or the target itself in a regression.
    :ivar clusters: (n,) keys of what is dependent, or None.
    :ivar frame: further columns that were asked for.
    """

    info: DatasetInfo
    y: NDArray[Any]
    clusters: NDArray[Any] | None
    cluster_column: str | None
    frame: pd.DataFrame


def load_rows(
    path: Path,
    card: ModelCard,
    cluster_column: str | None = None,
    columns: Sequence[str] = (),
    who: str = "the model",
) -> EvaluationRows:
    """Read what a model with this card can be judged on, in the order in which ``predict_parquet`` gives predictions.

    :param cluster_column: column that names dependent rows; None: the one that the dataset names, if any.
    :param columns: further columns to read, for slices.
    :param who: what messages call the model.
    :raises BadInput: a feature of the model is absent, the target is missing on some row, is no number in a regression, or a class that the model does not know.
    :raises BadConfiguration: the dataset is for another task or target.
    """
    info = read_info(path)
    for what, mine, theirs in (("task", card.task, info.task), ("target", card.target, info.target)):
        if mine != theirs:
            raise BadConfiguration(
                f"the model's {what} is {mine!r}, the dataset's is {theirs!r}: pass a split of the data that the model "
                "was made for."
            )
    check_features(card, path, info, who)
    asked = dict.fromkeys(columns, "slices")
    if cluster_column:
        asked[cluster_column] = "cluster_column"
    cluster_column = cluster_column or info.cluster_column
    wanted = dict.fromkeys([card.target, *([cluster_column] if cluster_column else []), *columns])
    frame = load_frame(path, list(wanted), asked)
    if frame.empty:
        raise BadInput(
            f"{path.name} has 0 rows, expected some to judge a model on; check the window and the filters."
        )
    target = frame[card.target]
    missing = int(target.isna().sum())
    if missing:
        raise BadInput(
            f"target {card.target!r} is missing in {missing:,} of {len(frame):,} rows: drop those rows when preparing."
        )
    y = _class_numbers(target, card) if card.task == "classification" else _numbers(target)
    clusters = frame[cluster_column].to_numpy() if cluster_column else None
    return EvaluationRows(info, y, clusters, cluster_column, frame)


def columns_like(scores: NDArray[Any], classes: Sequence[Any], wanted: Sequence[Any]) -> NDArray[Any]:
    """Probabilities of a model that knows these classes, in the order of another model of the same classes."""
    return scores if list(classes) == list(wanted) else scores[:, [list(classes).index(c) for c in wanted]]


def check_features(card: ModelCard, path: Path, info: DatasetInfo, who: str) -> None:
    """Raise unless the dataset has all features of a model, each of the kind that the model was trained on.

    Of another kind, such as a column of digits that was read as text last month and as numbers this month, its values would
    match no category.

    :param who: what messages call the model.
    """
    check_columns(card.features, path, who)
    for feature in card.features:
        theirs = kind_of(info, feature.name)
        if feature.name in (*info.features, *info.carried) and feature.kind != theirs:
            raise BadInput(
                f"feature {feature.name!r} is a {theirs} in the dataset, {who} was trained on it as a {feature.kind}: "
                "cast it to one type in PrepareData's features."
            )


def check_columns(features: Sequence[Feature], path: Path, who: str) -> None:
    """Raise BadInput unless a Parquet file has a column for every feature of a model."""
    import pyarrow.parquet as pq

    present = set(pq.read_schema(path).names)
    absent = [feature.name for feature in features if feature.name not in present]
    if absent:
        names = ", ".join(map(brief, absent[:5])) + (
            f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        )
        raise BadInput(
            f"{who} needs the column{'s' if len(absent) > 1 else ''} {names}, which {path.name} does not have: let "
            "PrepareData's features give it, and where a model trained on these rows should not see it, name it in "
            f"carry_columns, so that the files keep it; {did_you_mean(absent[0], present)}"
        )


def _class_numbers(target: pd.Series[Any], card: ModelCard) -> NDArray[np.int64]:
    import numpy as np

    number_of = {label: number for number, label in enumerate(card.classes)}
    labels = target.tolist()
    unknown = sorted({repr(label) for label in labels if label not in number_of})
    if unknown:
        raise BadInput(
            f"target {card.target!r} has the values {', '.join(unknown[:5])}, which the model does not know; it was "
            f"trained on {', '.join(map(repr, card.classes[:10]))}. Train it on data with all classes, or drop these rows."
        )
    return np.fromiter((number_of[label] for label in labels), np.int64, len(labels))


def _numbers(target: pd.Series[Any]) -> NDArray[np.float64]:
    import numpy as np

    try:
        y = target.to_numpy(dtype=np.float64)
    except (TypeError, ValueError):
        raise BadInput(
            f"target {target.name!r} has dtype {target.dtype}, expected numbers for a regression."
        ) from None
    if not np.isfinite(y).all():
        raise BadInput(
            f"target {target.name!r} is infinite in {int((~np.isfinite(y)).sum()):,} rows: drop them."
        )
    return y
