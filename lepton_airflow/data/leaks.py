"""Find features that know too much: the target itself, or what comes later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.duckdb_types import WHOLE
from lepton_airflow.data.sql import fetch_row, for_each, quote

if TYPE_CHECKING:
    import duckdb


def copies_of_target(con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> list[str]:
    """The features that are the target under another name: with one value for each class, or in a straight line with it."""
    target = quote(str(info.target))
    if info.task == "regression":
        numbers = _numbers(info)
        if not numbers:
            return []
        linear = fetch_row(
            con, f"SELECT {for_each(f'corr({{}}::DOUBLE, {target}::DOUBLE)', numbers)} FROM {table}"
        )
        return [n for n, r in zip(numbers, linear, strict=True) if r is not None and abs(r) > 1 - 1e-9]
    copies = []
    # The counts are approximate; the exact ones follow for the few features that pass.
    distinct = fetch_row(con, f"SELECT {for_each('approx_count_distinct({})', info.features)} FROM {table}")
    for name, about in zip(info.features, distinct, strict=True):
        if about <= 2 * len(info.classes):
            pairs = con.execute(f"SELECT DISTINCT {quote(name)}, {target} FROM {table}").fetchall()
            if len(pairs) == len({value for value, _ in pairs}) == len(info.classes):
                copies.append(name)
    return copies


def perfect_separators(con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> list[str]:
    """The numbers that tell two classes apart by themselves: all values of one class lie below all of the other."""
    numbers = _numbers(info)
    if info.task != "classification" or len(info.classes) != 2 or not numbers:
        return []
    ranges = con.execute(
        f"SELECT {quote(str(info.target))}, {for_each('min({0}), max({0})', numbers)} FROM {table} GROUP BY 1"
    ).fetchall()
    found = []
    for index, name in enumerate(numbers):
        (low, high), (low2, high2) = (row[1 + 2 * index : 3 + 2 * index] for row in ranges)
        if None not in (low, high, low2, high2) and (high < low2 or high2 < low):
            found.append(name)
    return found


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
