"""The reference profile: what the training rows look like, in a few kilobytes that travel with the model.

Drift is measured against it. Version 1 is ``{"profile": 1, "rows", "window", "time_range", "target", "positive_class",
"columns"}``.
A column of numbers has ``count, nulls, mean, std, min, max, quantiles, edges, counts``, a category ``count, nulls,
distinct, top, rest``. When rows come in clusters, each column also has a ``design_effect`` (``mean, spread, clusters``):
how much less these rows tell than as many independent ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.sql import fetch_row, nan_as_null, quote

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    from numpy.typing import NDArray

    from lepton_airflow.contract import Window

    _Describe = Callable[[duckdb.DuckDBPyConnection, str, str], dict[str, Any]]

VERSION = 1
TOP = 100  # categories counted by name; the others are counted together
_LABEL = 200  # characters kept of a category's name; names that begin alike for so long are counted as one
_GROUPS = 4096  # clusters are counted in at most this many groups, so that memory stays bounded


def reference_profile(
    con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo, window: Window | None
) -> dict[str, Any]:
    """Profile the features and the target of a table, one column at a time, so that memory stays bounded.

    :param table: name of a table or view with the columns of ``info``.
    """
    names = [*info.features, *([info.target] if info.target else [])]
    categories = {*info.categorical, *([info.target] if info.task == "classification" else [])}
    return {
        "profile": VERSION,
        "rows": info.rows,
        "window": [window.start, window.end] if window else None,
        "time_range": info.time_range,
        "target": info.target,
        "positive_class": info.positive_class,
        "columns": {
            name: _described(
                con, table, name, _category if name in categories else _number, info.cluster_column
            )
            for name in names
        },
    }


def reference_counts(column: Mapping[str, Any]) -> list[int]:
    """The rows of a profiled column by bin; the last bin is that of missing values.

    The other bins are those between the edges of numbers, or the categories of :func:`_binned` and one for all others.
    """
    if column["kind"] == "number":
        return [*(column["counts"] or [0]), column["nulls"]]
    own = [n for _, n in _binned(column)]
    return [*own, column["count"] - sum(own), column["nulls"]]


def _binned(column: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The categories that have a bin of their own: those that are named and occur more than once.

    About as many rows of a next window as there are categories that occur once have a value that is not here (Good 1953), so both
    are counted together. Else a column of texts, each of which occurs once, would drift from itself.
    """
    return [(label, n) for label, n in column["top"] if n > 1]


def share_of(column: Mapping[str, Any], counts: Sequence[int], value: Any) -> float | None:
    """The share of a category's value in counts by the bins of :func:`reference_counts`; None if no bin is its own."""
    label = str(value)[:_LABEL]
    places = [place for place, (name, _) in enumerate(_binned(column)) if name == label]
    return float(counts[places[0]] / sum(counts)) if places else None


def count_rows(
    con: duckdb.DuckDBPyConnection, table: str, name: str, column: Mapping[str, Any], cluster: str | None
) -> NDArray[np.int64]:
    """Count a table's rows by cluster and by the bins of :func:`reference_counts`, shape (clusters, k).

    Without a cluster column all rows are one cluster. Beyond 4,096 clusters, groups of clusters are counted, which are as
    independent of one another as clusters are. Only the counts are held in memory.
    """
    import numpy as np

    bins = len(reference_counts(column))
    group = f"hash({quote(cluster)}) % {_GROUPS}" if cluster else "0"
    if column["kind"] == "number":
        cases = " ".join(f"WHEN x <= {edge!r}::DOUBLE THEN {i}" for i, edge in enumerate(column["edges"]))
        source = f"(SELECT {group} AS g, {_as_number(name)} AS x FROM {table})"
        bin_of = f"CASE WHEN x IS NULL THEN {bins - 1} {cases} ELSE {bins - 2} END"
        values: list[Any] = []
    else:
        source = (
            f"(SELECT {group} AS g, left({quote(name)}::TEXT, {_LABEL}) AS x FROM {table}) LEFT JOIN "
            "(SELECT x, min(b) AS b FROM (SELECT unnest($1::TEXT[]) AS x, unnest(range(len($1))) AS b) GROUP BY x) USING (x)"
        )
        bin_of = f"CASE WHEN x IS NULL THEN {bins - 1} ELSE coalesce(b, {bins - 2}) END"
        values = [[label for label, _ in _binned(column)]]
    found = con.execute(
        f"SELECT dense_rank() OVER (ORDER BY g) - 1, b, n FROM "
        f"(SELECT g, {bin_of} AS b, count(*) AS n FROM {source} GROUP BY ALL)",
        values,
    ).fetchall()
    counts = np.zeros((max((row[0] for row in found), default=-1) + 1, bins), dtype=np.int64)
    for row, index, rows in found:
        counts[row, index] = rows
    return counts


def unseen_categories(
    con: duckdb.DuckDBPyConnection, table: str, name: str, column: Mapping[str, Any], limit: int = 20
) -> dict[str, int] | None:
    """Count the values of a table that a category's profile does not have, the most frequent first.

    Returns None for numbers, and where the profile names only its most frequent values.
    """
    if column["kind"] == "number" or column["rest"]:
        return None
    return dict(
        con.execute(
            f"SELECT x, count(*) AS n FROM (SELECT left({quote(name)}::TEXT, {_LABEL}) AS x FROM {table}) "
            "WHERE x NOT IN (SELECT unnest($1::TEXT[])) GROUP BY x ORDER BY n DESC, x LIMIT $2",
            [[label for label, _ in column["top"]], limit],
        ).fetchall()
    )


def _described(
    con: duckdb.DuckDBPyConnection, table: str, name: str, describe: _Describe, cluster: str | None
) -> dict[str, Any]:
    from lepton_airflow.statistics.distances import design_effect

    column = describe(con, table, name)
    effect = design_effect(count_rows(con, table, name, column, cluster)) if cluster else None
    if effect is None:
        return column
    rounded = effect._replace(mean=float(f"{effect.mean:.6g}"), spread=float(f"{effect.spread:.6g}"))
    return column | {"design_effect": rounded._asdict()}


def _as_number(name: str) -> str:
    return nan_as_null(f"{quote(name)}::DOUBLE")


def _number(con: duckdb.DuckDBPyConnection, table: str, name: str) -> dict[str, Any]:
    """Moments, deciles, and counts in bins between the deciles.

    ``counts[i]`` is the number of values in ``(edges[i-1], edges[i]]``; the first bin has no lower and the last no upper
    bound, so every later value falls into a bin. A value that fills a whole decile (no rain, a flag, a constant) has a bin of its
    own, from the number just below it, so that it is told from lower values. Deciles are nearest-rank values, from a sort that
    spills to disk.
    """
    value = _as_number(name)
    count, nulls, mean, std, low, high = fetch_row(
        con,
        f"SELECT count(x), count(*) - count(x), favg(x), stddev_samp(x), min(x), max(x) FROM (SELECT {value} AS x FROM {table})",
    )
    found: dict[str, Any] = {
        "kind": "number",
        "count": count,
        "nulls": nulls,
        "mean": _rounded(mean),
        "std": _rounded(std),
        "min": low,
        "max": high,
    }
    if not count:
        return found | {"quantiles": [], "edges": [], "counts": []}
    ranks = [max(1, -(-count * tenth // 10)) for tenth in range(11)]
    by_rank = dict(
        con.execute(
            f"SELECT rank, x FROM (SELECT x, row_number() OVER (ORDER BY x) AS rank FROM (SELECT {value} AS x FROM {table}) "
            "WHERE x IS NOT NULL) WHERE list_contains($1, rank)",
            [ranks],
        ).fetchall()
    )
    quantiles = [by_rank[rank] for rank in ranks]
    fills_decile = {
        one for one, next_ in itertools.pairwise(by_rank[rank] for rank in sorted(by_rank)) if one == next_
    }
    just_below = {math.nextafter(value, -math.inf) for value in fills_decile} - {-math.inf}
    edges = sorted({*quantiles[1:-1], *just_below})
    below = fetch_row(
        con,
        f"SELECT {', '.join(f'count(*) FILTER (x <= {edge!r}::DOUBLE)' for edge in edges)} FROM (SELECT {value} AS x FROM {table})",
    )
    totals = [0, *below, count]
    counts = [after - before for before, after in itertools.pairwise(totals)]
    return found | {"quantiles": quantiles, "edges": edges, "counts": counts}


def _category(con: duckdb.DuckDBPyConnection, table: str, name: str) -> dict[str, Any]:
    """Counts of the most frequent values by name, and of all others together."""
    column = quote(name)
    count, nulls, distinct = fetch_row(
        con, f"SELECT count({column}), count(*) - count({column}), count(DISTINCT {column}) FROM {table}"
    )
    top = con.execute(
        f"SELECT v, count(*) AS n FROM (SELECT left({column}::TEXT, {_LABEL}) AS v FROM {table} WHERE {column} IS NOT NULL) "
        f"GROUP BY v ORDER BY n DESC, v LIMIT {TOP}"
    ).fetchall()
    return {
        "kind": "category",
        "count": count,
        "nulls": nulls,
        "distinct": distinct,
        "top": [[value, n] for value, n in top],
        "rest": count - sum(n for _, n in top),
    }


def _rounded(value: float | None) -> float | None:
    """Nine digits, so that equal rows give an equal profile: the last bits of a parallel sum vary from run to run.

    None for what no float can hold, such as the spread of numbers near 1e300: JSON has no infinity.
    """
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")
