"""Choose the rows that cross-validation holds out together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from lepton_airflow.errors import BadConfiguration, BadInput
from lepton_airflow.training.rows import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Fold = tuple[NDArray[np.intp], NDArray[np.intp]]

FoldBy = Literal["row", "time"]


def make_folds(rows: Rows, folds: int, fold_by: FoldBy, seed: int) -> list[Fold]:
    """Split rows into (train, held out) pairs of row numbers.

    ``row``: K folds at random, stratified by class, with whole clusters when the dataset names a cluster column.
    ``time``: the rows in order of time are cut into ``folds + 1`` blocks. Fold k holds block k out and trains on the blocks
    before it, so no model sees its future. Equal times stay together. Rows whose label reaches into the block are not trained
    on, nor are rows of a cluster that is held out, unless PrepareData said ``known_clusters``. The first block is never
    held out.

    :raises BadInput: the rows cannot be split so; the message says why.
    """
    import numpy as np

    if folds < 2:
        raise BadConfiguration(f"folds={folds}: expected at least 2.")
    made = _time_folds(rows, folds) if fold_by == "time" else _random_folds(rows, folds, seed)
    for number, (train, held_out) in enumerate(made, 1):
        if not len(train) or not len(held_out):
            raise BadInput(f"{rows.name}: fold {number} of {folds} is empty; set fewer folds.")
        if rows.schema.task == "classification" and len(np.unique(rows.y[train])) < 2:
            raise BadInput(
                f"{rows.name}: fold {number} of {folds} leaves one class only to train on; set fewer folds"
                + (" or fold_by='row'." if fold_by == "time" else ".")
            )
    return made


def _random_folds(rows: Rows, folds: int, seed: int) -> list[Fold]:
    import numpy as np
    from sklearn import model_selection as ms

    n, labels = len(rows.frame), rows.y
    classified, clustered = rows.schema.task == "classification", rows.clusters is not None
    units = n if rows.clusters is None else int(rows.clusters.max()) + 1
    if units < folds:
        what = f"values of cluster column {rows.info.cluster_column!r}" if clustered else "rows"
        raise BadInput(f"{rows.name}: {units} {what} cannot be split into folds={folds}; set fewer folds.")
    if classified and not clustered and np.bincount(labels).max() < folds:
        # scikit-learn refuses to stratify when no class has a row for each fold.
        labels = np.zeros(n, dtype=np.int64)
    splitter = {
        (True, True): ms.StratifiedGroupKFold,
        (True, False): ms.StratifiedKFold,
        (False, True): ms.GroupKFold,
        (False, False): ms.KFold,
    }[classified, clustered](folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # scikit-learn warns of a class with fewer rows than folds. A fold that does not see it gives it probability 0.
        warnings.simplefilter("ignore")
        return list(splitter.split(np.zeros(n), labels, rows.clusters))


def _time_folds(rows: Rows, folds: int) -> list[Fold]:
    import numpy as np
    import pandas as pd

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
        if rows.info.label_horizon_s:
            moments = pd.to_datetime(rows.moments, utc=True)
            reach = moments + pd.Timedelta(seconds=rows.info.label_horizon_s)
            before &= reach < moments[held_out].min()
        if rows.clusters is not None and not rows.info.known_clusters:
            before &= ~np.isin(rows.clusters, rows.clusters[held_out])
        made.append((np.flatnonzero(before), held_out))
    return made
