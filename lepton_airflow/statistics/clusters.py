"""Which rows belong together, as codes 0..G-1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lepton_airflow.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def cluster_codes(clusters: ArrayLike | None, n: int) -> tuple[NDArray[np.int64], int]:
    """Number the clusters of n rows: a code for each row, shape (n,), and how many clusters there are.

    :param clusters: (n,) keys of any hashable type (dates, strings, numbers); None makes each row its own cluster.
    :raises BadInput: a key is missing (rows without a day are not of one day), or there are fewer than 2 clusters.
    """
    import numpy as np

    if clusters is None:
        codes, count = np.arange(n), n
        if count < 2:
            raise BadInput(f"rows: only {n}, expected at least 2 to judge chance; widen the window.")
        return codes, count
    keys = np.asarray(clusters)
    if keys.shape != (n,):
        raise BadInput(f"clusters: shape {keys.shape} for {n} rows, expected one key per row, shape ({n},).")
    if keys.dtype == object:
        missing = np.fromiter((_is_missing(key) for key in keys), bool, n)
    else:
        missing = keys != keys  # NaN and NaT are the values that differ from themselves
    if np.any(missing):
        raise BadInput(
            f"clusters: {int(missing.sum()):,} of {n:,} keys are missing, "
            f"first in row {int(np.argmax(missing))}; expected a key on every row; "
            "drop these rows or fill the column."
        )
    if keys.dtype == object:  # not sortable in general
        numbers: dict[object, int] = {}
        codes = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, n)
        count = len(numbers)
    else:
        unique, codes = np.unique(keys, return_inverse=True)
        count = len(unique)
    if count < 2:
        raise BadInput(
            f"clusters: all {n:,} rows have the key {str(keys[0])[:40]}, "
            "expected at least 2 clusters to judge chance; widen the window or cluster by something finer."
        )
    return codes, count


def _is_missing(key: object) -> bool:
    """None, NaN, NaT, and pandas.NA, whose comparisons are not even booleans."""
    import numpy as np

    same = key == key
    return key is None or not (isinstance(same, (bool, np.bool_)) and bool(same))
