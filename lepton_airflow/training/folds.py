"""Which rows are held out together in cross-validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.training.rows import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Fold = tuple[NDArray[np.intp], NDArray[np.intp]]

FoldBy = Literal["row", "time"]


def make_folds(rows: Rows, folds: int, fold_by: FoldBy, seed: int) -> list[Fold]:
    """Split rows into (train, held out) pairs of row numbers.

    ``row``: K folds at random; stratified by class, and with whole clusters when the dataset names a cluster column.
    ``time``: the rows in order of time are cut into ``folds + 1`` blocks; fold k is trained on the blocks before block k
    and held out on it, so no model sees its future. Equal times stay together; rows of a cluster that is held out are
    not trained on. The first block is never held out.
    """
    import numpy as np
    from sklearn import model_selection as ms

    n, classified = len(rows.frame), rows.schema.task == "classification"
    if folds < 2:
        raise BadConfiguration(f"folds={folds}: expected at least 2.")
    if fold_by == "time":
        made = _time_folds(rows, folds)
    else:
        units = n if rows.clusters is None else int(rows.clusters.max()) + 1
        if units < folds:
            what = (
                "rows" if rows.clusters is None else f"values of cluster column {rows.info.cluster_column!r}"
            )
            raise BadInput(
                f"{rows.name}: {units} {what} cannot be split into folds={folds}; set fewer folds."
            )
        kinds = {
            (True, True): ms.StratifiedGroupKFold,
            (True, False): ms.StratifiedKFold,
            (False, True): ms.GroupKFold,
            (False, False): ms.KFold,
        }
        splitter = kinds[classified, rows.clusters is not None](folds, shuffle=True, random_state=seed)
        labels = rows.y
        if (
            classified and rows.clusters is None
        ):  # sklearn refuses when every class has fewer rows than there are folds
            labels = labels if np.bincount(labels).max() >= folds else np.zeros(n, dtype=np.int64)
        with contextlib.suppress(Warning):
            made = _quietly(lambda: list(splitter.split(np.zeros(n), labels, rows.clusters)))
    for number, (train, held_out) in enumerate(made):
        if not len(train) or not len(held_out):
            raise BadInput(f"{rows.name}: fold {number + 1} of {folds} is empty; set fewer folds.")
        if classified and len(np.unique(rows.y[train])) < 2:
            raise BadInput(
                f"{rows.name}: fold {number + 1} of {folds} leaves one class only to train on; set fewer folds"
                + (" or fold_by='row'." if fold_by == "time" else ".")
            )
    return made


def _quietly(call: Callable[[], Any]) -> Any:
    import warnings

    with (
        warnings.catch_warnings()
    ):  # a class with fewer rows than folds is handled: it gets probability 0 where unseen
        warnings.simplefilter("ignore")
        return call()


def _time_folds(rows: Rows, folds: int) -> list[Fold]:
    import numpy as np

    if rows.moments is None:
        raise BadConfiguration(
            "fold_by='time' needs a time column, the dataset names none; set time_column in PrepareData."
        )
    _, moment = np.unique(rows.moments, return_inverse=True)
    counts = np.bincount(moment)
    block_of_moment = np.minimum((np.cumsum(counts) - counts) * (folds + 1) // len(moment), folds)
    block = block_of_moment[moment]
    made = []
    for k in range(1, folds + 1):
        held_out = np.flatnonzero(block == k)
        before = block < k
        if rows.clusters is not None:
            before &= ~np.isin(rows.clusters, rows.clusters[held_out])
        made.append((np.flatnonzero(before), held_out))
    return made
