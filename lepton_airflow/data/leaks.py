"""Find features that know too much: the target itself, or what comes later."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.duckdb_types import WHOLE
from lepton_airflow.data.splits import COUNT, KEY, TIME, timestamp
from lepton_airflow.data.sql import fetch_row, for_each, nan_as_null, quote

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

ROWS_TO_ACCUSE = 20  # with fewer, a feature may follow the target by chance: two points lie on a line
_LAST_ROWS = 1000
_FIRST_ROWS = 1000


def copies_of_target(con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> list[str]:
    """The features that are the target under another name: with one value for each class, or in a straight line with it.

    Of a number that is missing in most rows the others count, if they are enough.
    """
    target = quote(str(info.target))
    if info.task == "regression":
        other = target.replace("{", "{{").replace("}", "}}")
        numbers = _numbers(info)
        if not numbers:
            return []
        clean = nan_as_null("{0}::DOUBLE")  # one NaN would make the whole correlation NaN
        line = f"CASE WHEN count({clean}) >= {ROWS_TO_ACCUSE} THEN corr({clean}, {other}::DOUBLE) END"
        linear = fetch_row(con, f"SELECT {for_each(line, numbers)} FROM {table}")
        return [n for n, r in zip(numbers, linear, strict=True) if r is not None and abs(r) > 1 - 1e-9]
    copies = []
    # The counts are approximate; the exact ones follow for the few features that pass.
    distinct = fetch_row(con, f"SELECT {for_each('approx_count_distinct({})', info.features)} FROM {table}")
    for name, about in zip(info.features, distinct, strict=True):
        if about <= 2 * len(info.classes):
            value = quote(name) if name in info.categorical else nan_as_null(f"{quote(name)}::DOUBLE")
            pairs, values = fetch_row(
                con,
                f"WITH p AS (SELECT DISTINCT {value} AS v, {target} AS t FROM {table}) "
                "SELECT count(*), (SELECT count(*) FROM (SELECT DISTINCT v FROM p)) FROM p",
            )
            if pairs == values == len(info.classes):
                copies.append(name)
    return copies


def perfect_separators(con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> list[str]:
    """The features that tell two classes apart by themselves.

    Of a number all values of one class lie below all of the other, or a feature is there in the rows of one class alone, as a day of
    death is. A number that only few rows have may do so by chance.
    """
    if info.task != "classification" or len(info.classes) != 2:
        return []
    numbers = set(_numbers(info))
    parts = ["count(*)"]
    for name in info.features:
        value = nan_as_null(f"{quote(name)}::DOUBLE") if name in numbers else quote(name)
        ends = f"min({value}), max({value})" if name in numbers else "NULL, NULL"
        parts += [f"count({value})", ends]
    (all_rows, *one), (all_rows2, *other) = con.execute(
        f"SELECT {', '.join(parts)} FROM {table} GROUP BY {quote(str(info.target))}"
    ).fetchall()
    found = []
    for index, name in enumerate(info.features):
        (rows, low, high), (rows2, low2, high2) = (ends[3 * index : 3 * index + 3] for ends in (one, other))
        in_one_class = {(rows, rows2)} & {(0, all_rows2), (all_rows, 0)}
        apart = name in numbers and min(rows, rows2) and (high < low2 or high2 < low)
        if rows + rows2 >= ROWS_TO_ACCUSE and (in_one_class or apart):
            found.append(name)
    return found


def in_order_of_target(con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> list[str]:
    """The numbers that put all rows in the order of a number to predict, or in the opposite one, as its logarithm does."""
    if info.task != "regression":
        return []
    target = quote(str(info.target))

    def ordered(name: str, rows: str, least: int = ROWS_TO_ACCUSE, values: int = 3) -> bool:
        value = nan_as_null(f"{quote(name)}::DOUBLE")
        count, different, up, down = fetch_row(
            con,
            "SELECT count(*), count(DISTINCT v), count(*) FILTER (up <> place), count(*) FILTER (down <> place) FROM "
            "(SELECT v, rank() OVER (ORDER BY v) AS up, rank() OVER (ORDER BY v DESC) AS down, rank() OVER (ORDER BY t) AS place "
            f"FROM (SELECT {value} AS v, {target}::DOUBLE AS t FROM {rows}) WHERE v IS NOT NULL)",
        )
        return count >= least and different >= values and not (up and down)

    # The first rows rule most features out; only the others are sorted whole. A feature may be missing or constant in these.
    some = f"(SELECT * FROM {table} LIMIT {_FIRST_ROWS})"
    return [name for name in _numbers(info) if ordered(name, some, 0, 0) and ordered(name, table)]


def look_ahead(
    con: duckdb.DuckDBPyConnection,
    table: str,
    alone: str,
    cut: datetime,
    types: Mapping[str, str],
    info: DatasetInfo,
    stated: str | None,
) -> str:
    """Say which feature or target of the rows before a cut depends on rows from then on; empty if none does.

    :param table: the rows as computed from the whole snapshot.
    :param alone: the rows as computed from the snapshot before the cut.
    :param types: the columns and their types.
    :param stated: how far the target may look ahead, in the user's words; None: not at all.
    """
    horizon = timedelta(seconds=info.label_horizon_s)
    # The label of a row that long before the cut is known at the cut, so nothing of it may change.
    both = [_rows_before(source, info, cut - horizon) for source in (table, alone)]
    different = _different(con, both, types)
    if different:
        return _looks_ahead(different, cut, horizon, info, stated)
    return _unlabelled_look_ahead(con, table, alone, cut, types, info) if horizon else ""


def _rows_before(table: str, info: DatasetInfo, cut: datetime, since: datetime | None = None) -> str:
    moment = f"CAST({quote(str(info.time_column))} AS TIMESTAMP)"
    later = f" AND {moment} >= {timestamp(since)}" if since else ""
    return f"(SELECT *, {moment} AS {TIME} FROM {table} WHERE {moment} < {timestamp(cut)}{later})"


def _unlabelled_look_ahead(
    con: duckdb.DuckDBPyConnection,
    table: str,
    alone: str,
    cut: datetime,
    types: Mapping[str, str],
    info: DatasetInfo,
) -> str:
    """Say which feature looks ahead less far than the target, in rows whose label is not known at the cut.

    Without the later rows a query may leave such rows out, for they have no label. Those that it gives are compared.
    """
    horizon = timedelta(seconds=info.label_horizon_s)
    both = [_rows_before(source, info, cut, cut - horizon) for source in (table, alone)]
    names = [info.time_column, info.cluster_column, *info.id_columns]
    key = f"hash({', '.join(quote(name) for name in dict.fromkeys(names) if name)})"  # a missing id has a hash, too
    counted = [
        f"(SELECT {key} AS {KEY}, count(*) AS {COUNT} FROM {source} GROUP BY {KEY})" for source in both
    ]
    in_both = f"(SELECT {KEY} FROM {counted[0]} JOIN {counted[1]} USING ({KEY}, {COUNT}))"
    (more,) = fetch_row(
        con,
        f"SELECT count(*) FROM {counted[1]} AS alone LEFT JOIN {counted[0]} AS f USING ({KEY}) "
        f"WHERE alone.{COUNT} > coalesce(f.{COUNT}, 0)",
    )
    compared = [f"(SELECT * FROM {source} WHERE {key} IN {in_both})" for source in both]
    features = {name: kind for name, kind in types.items() if name != info.target}
    different = ["*"] if more else _different(con, compared, features)
    if different:
        return _looks_ahead(different, cut, timedelta(), info, None)
    (rows,), (all_rows,) = (fetch_row(con, f"SELECT count(*) FROM {t}") for t in (compared[0], both[0]))
    if not rows and all_rows:
        log.warning(
            "leak_check: features give no row of the %s before %s without the later ones, so that these %d look ahead "
            "cannot be ruled out; let features keep rows without a label: label_horizon leaves them out.",
            horizon, cut, all_rows,
        )  # fmt: skip
    return ""


def _looks_ahead(
    different: Sequence[str], cut: datetime, horizon: timedelta, info: DatasetInfo, stated: str | None
) -> str:
    """The sentence about columns that change when the rows from a cut on are taken away."""
    before = cut - horizon
    columns = [] if "*" in different else list(different)
    if horizon and columns in ([], [info.target]):
        what = f"target {info.target!r}" if columns else "the number of rows"
        return (
            f"the target looks further ahead than label_horizon={stated!r}: {what} before {before} changes when the rows from "
            f"{cut} on are taken away. State the whole length."
        )
    if columns == [info.target]:
        return (
            f"target {info.target!r} looks ahead: before {cut} it changes when the rows from then on are taken away. If it "
            "should, say how far in label_horizon, such as '30 days'."
        )
    what = f"column {columns[0]!r}" if columns else "the number of rows"
    return (
        f"features look into the future: {what} before {before} changes when the rows from {cut if horizon else 'then'} on "
        "are taken away. Let windows and aggregates reach over earlier rows only, and give them an order; where the target "
        "looks ahead, say how far in label_horizon; leak_check=false accepts it, for what is known beforehand."
    )


def _different(con: duckdb.DuckDBPyConnection, both: Sequence[str], types: Mapping[str, str]) -> list[str]:
    """The columns in which two tables differ: over all rows, and over the last ones.

    What looks a few rows ahead changes the last rows only, which the sums of many rows may hide.
    """
    last = f"(SELECT min({TIME}) FROM (SELECT {TIME} FROM {both[0]} ORDER BY {TIME} DESC LIMIT {_LAST_ROWS}))"
    ends = [f"(SELECT * FROM {table} WHERE {TIME} >= {last})" for table in both]
    return differing_columns(con, both[0], both[1], types, key=TIME) or differing_columns(
        con, ends[0], ends[1], types, key=TIME
    )


def differing_columns(
    con: duckdb.DuckDBPyConnection, one: str, other: str, types: Mapping[str, str], key: str
) -> list[str]:
    """The columns in which two tables differ, whatever the order of their rows; ``*`` if they differ in their number.

    :param types: the columns and their types.
    :param key: a column that tells the rows apart.
    """
    before, after = (_fingerprint(con, table, types, key) for table in (one, other))
    return [column for column in before if not _alike(before[column], after[column])]


def _fingerprint(
    con: duckdb.DuckDBPyConnection, table: str, types: Mapping[str, str], key: str
) -> dict[str, tuple[Any, ...]]:
    """A few numbers for each column that change when one of its values changes, whatever the order of the rows.

    For numbers these are sums, plain and weighted, and no hashes: a feature that sums floats may differ in its last bits
    from run to run, which is no leak.
    """
    parts = []
    for name, kind in types.items():
        column = quote(name)
        if kind in ("FLOAT", "DOUBLE", *WHOLE):
            value = f"CASE WHEN isfinite({column}::DOUBLE) THEN {column}::DOUBLE END"
            share = f"(hash({key}) % 1024) / 1024.0"
            parts.append(f"[count({value}), sum(abs({value})), sum({value}), sum({value} * {share})]")
        else:
            parts.append(f"[count({column})::HUGEINT, sum(hash({column}, {key})::HUGEINT)]")
    rows, *values = fetch_row(con, f"SELECT count(*), {', '.join(parts)} FROM {table}")
    return {"*": (rows,)} | {name: tuple(v) for name, v in zip(types, values, strict=True)}


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    if len(one) < 4:
        return one == other
    if one[0] != other[0]:
        return False
    size = max(abs(one[1] or 0), abs(other[1] or 0))
    return all(abs((a or 0) - (b or 0)) <= 1e-9 * size for a, b in zip(one[1:], other[1:], strict=True))


def _numbers(info: DatasetInfo) -> list[str]:
    return [name for name in info.features if name not in info.categorical]
