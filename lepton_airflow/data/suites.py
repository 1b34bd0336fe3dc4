"""Suites of expectations as data: check the form of a suite, and propose one that a table meets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.duckdb_types import WHOLE
from lepton_airflow.data.sql import fetch_row, quote
from lepton_airflow.errors import BadConfiguration

if TYPE_CHECKING:
    import duckdb

_INTEGERS = (*WHOLE, "HUGEINT", "UHUGEINT")
_MAX_VALUES_IN_SET = 20
_SEEN_OFTEN = 7  # the next window has none of what is expected 7 times with a probability of e^-7, 1 in 1,000
_KNOWN = 0.95  # of the rows of a next window must have a category that this one has
# By which the number of rows may change from one window to the next, and the odds of a missing value.
_TIMES_ROWS = 5
_LEVEL = 0.1  # by this share at least the level of a column may move
_NO_GUESS = 0.2  # a share of present values so low says nothing


def checked_suite(suite: Any, what: str, name: str) -> dict[str, Any]:
    """Give the suite a name if it has none; raises BadConfiguration, with the right form, if it has no expectations."""
    if (
        not isinstance(suite, dict)
        or not isinstance(suite.get("expectations"), list)
        or not suite["expectations"]
    ):
        raise BadConfiguration(
            f'{what} has no expectations: expected {{"name": …, "expectations": [{{"type": …, "kwargs": {{…}}}}, …]}}. '
            'ValidateData(suite="infer") proposes one from a snapshot.'
        )
    return {"name": name} | suite


def propose_suite(
    con: duckdb.DuckDBPyConnection,
    table: str,
    columns: Mapping[str, str],
    source: Path,
    *,
    types: bool = True,
) -> dict[str, Any]:
    """Propose a suite that the table meets, and the next window of the same source: for a person to review and to tighten.

    One window does not say how the next will differ, so only what chance and growth leave alone is proposed. Columns that follow
    the window (one value, dates, dates as numbers) get no bounds. Ids get uniqueness, where so many whole numbers so close together
    would otherwise have met, and for UUIDs. Other numbers get bounds whose margin grows as distinct values become fewer.

    :param columns: the table's columns and their types.
    :param source: the file that the suite and its notes are named after.
    :param types: whether to propose DuckDB's types of the columns, too.
    """
    (rows,) = fetch_row(con, f"SELECT count(*) FROM {table}")
    proposed: list[dict[str, Any]] = [
        _expect(
            "table_row_count_to_be_between",
            min_value=max(1, rows // _TIMES_ROWS),
            max_value=rows * _TIMES_ROWS,
        ),
        _expect("table_columns_to_match_set", column_set=list(columns), exact_match=True),
    ]
    for name, kind in columns.items():
        if types:
            plain = kind.partition("(")[0]
            proposed.append(_expect("column_values_to_be_in_type_list", column=name, type_list=[plain]))
        proposed += _propose_for(con, table, name, kind, rows)
    return {
        "name": source.stem,
        "meta": {"notes": f"Proposed from {rows} rows of {source.name}. Review every bound before use."},
        "expectations": proposed,
    }


def _propose_for(
    con: duckdb.DuckDBPyConnection, table: str, name: str, kind: str, rows: int
) -> Iterator[dict[str, Any]]:
    """Expectations that one column of the table meets, but for its type."""
    column = quote(name)
    present, distinct = fetch_row(
        con, f"SELECT count({column}), approx_count_distinct({column}) FROM {table}"
    )
    if present == 0:
        return
    is_id = _is_id(con, table, column, kind, present, distinct)
    mostly = 1.0 if is_id and present == rows else _share_present(present, rows)
    if mostly == 1:
        yield _expect("column_values_to_not_be_null", column=name)
    elif mostly >= _NO_GUESS:
        yield _expect("column_values_to_not_be_null", column=name, mostly=mostly)
    if is_id:
        yield _expect("column_values_to_be_unique", column=name)
    if kind in (*_INTEGERS, "FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        bounds = _bounds(con, table, column, kind, distinct, is_id=is_id)
        if bounds:
            yield _expect("column_values_to_be_between", column=name, **bounds)
    elif kind == "VARCHAR":
        values = con.execute(
            f"SELECT {column}, count(*) FROM {table} WHERE {column} IS NOT NULL GROUP BY ALL ORDER BY 1 LIMIT {_MAX_VALUES_IN_SET + 1}"
        ).fetchall()
        if len(values) <= _MAX_VALUES_IN_SET:
            if _are_categories(values, present):
                yield _expect(
                    "column_values_to_be_in_set", column=name, value_set=[v for v, _ in values], mostly=_KNOWN
                )
            return
        low, high = fetch_row(con, f"SELECT min(length({column})), max(length({column})) FROM {table}")
        most = high + _round_up(_margin(distinct) * (high - low))
        yield _expect(
            "column_value_lengths_to_be_between", column=name, min_value=min(low, 1), max_value=most
        )


def _expect(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


def _share_present(present: int, rows: int) -> float:
    """The share of values that a next window will not lack.

    None missing among n leaves a share of 10/n likely enough, where missing values come in runs; with some missing, their odds may grow.
    """
    missing = rows - present
    if not missing and rows >= 10_000:
        return 1.0
    odds = _TIMES_ROWS * missing / present
    return max(0.0, math.floor(100 * (1 - odds / (1 + odds) - 10 / rows)) / 100)


def _is_id(
    con: duckdb.DuckDBPyConnection, table: str, column: str, kind: str, present: int, distinct: int
) -> bool:
    """Whether no value repeats, and that is no chance."""
    if distinct < 0.75 * present:  # the count is approximate
        return False
    number = column
    if kind == "VARCHAR":
        uuids, numbered, forms = fetch_row(
            con,
            f"""SELECT bool_and(regexp_full_match({column}, '[0-9a-fA-F-]{{16,}}') AND length({column}) >= 16),
                bool_and(regexp_full_match({column}, '\\D*\\d{{1,18}}\\D*')),
                count(DISTINCT regexp_replace({column}, '\\d+', '0')) FROM {table}""",
        )
        if not uuids and not (numbered and forms == 1):
            return False
        if uuids:
            kind = "UUID"
        number = f"TRY_CAST(regexp_extract({column}, '\\d+') AS BIGINT)"
    elif kind not in ("UUID", *_INTEGERS):
        return False
    exact, low, high = fetch_row(
        con, f"SELECT count(DISTINCT {column}), min({number}), max({number}) FROM {table}"
    )
    if exact < present:
        return False
    # Of n numbers drawn from a span of s, about n²/2s pairs would be equal.
    return kind == "UUID" or present**2 / (2 * (int(high) - int(low) + 1)) >= _SEEN_OFTEN


def _are_categories(values: list[tuple[str, int]], present: int) -> bool:
    """Whether a next window will hardly bring others: several values, most of them seen often, and none that names a year."""
    often = sum(count for _, count in values if count >= _SEEN_OFTEN)
    return (
        len(values) > 1
        and often >= _KNOWN * present
        and not any(re.search(r"(19|20)\d\d", v) for v, _ in values)
    )


def _margin(distinct: int) -> float:
    """How far beyond the observed range the next window may go, in ranges.

    The range of d values whose tail falls off exponentially is about ln d of its scales, and the next d values go 7 scales beyond it once in
    1,000 times. A trend moves by one range from window to window, and may double its pace.
    """
    return max(2.0, _SEEN_OFTEN / math.log(max(distinct, 2)))


def _bounds(
    con: duckdb.DuckDBPyConnection, table: str, column: str, kind: str, distinct: int, *, is_id: bool
) -> dict[str, float]:
    """Bounds of numbers that a next window keeps; none where they follow the window, or are not finite."""
    low, middle, high, at_zero = fetch_row(
        con,
        f"SELECT min({column}), approx_quantile({column}, 0.5), max({column}), count(*) FILTER ({column} = 0) FROM {table}",
    )
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return {}
    whole = kind in _INTEGERS
    if not whole:
        low, middle, high = float(low), float(middle), float(high)
    # What never is negative: counts from 0 or 1, what is often 0, and what trails off upwards as amounts and distances do.
    counts = low in (0, 1) if whole else low == 0 and at_zero > 1
    from_zero = low >= 0 and (counts or 3 * (middle - low) < high - middle)
    if is_id or (whole and _are_dates(con, table, column)):
        return {"min_value": 0} if low >= 0 else {}
    margin = _margin(distinct)
    slack = margin * (high - low)
    above, below = high + max(slack, abs(high) * _LEVEL), low - max(slack, abs(low) * _LEVEL)
    if low >= 0 and 0 < middle < high:  # amounts grow by factors
        above = max(above, high * _growth(high / middle, margin))
    if high <= 0 and low < middle < 0:
        below = min(below, low * _growth(low / middle, margin))
    if not (math.isfinite(above) and math.isfinite(below)):
        return {"min_value": 0} if from_zero else {}
    return {"min_value": 0 if from_zero else -_round_up(-below), "max_value": _round_up(above)}


def _growth(ratio: float, margin: float) -> float:
    """By what factor amounts may grow, at most 1,000; without the power, which no float may hold."""
    return math.exp(min(margin * math.log(ratio), math.log(1000)))


def _are_dates(con: duckdb.DuckDBPyConnection, table: str, column: str) -> bool:
    """Whether whole numbers are dates such as 20130501, 130501 or 201305."""
    forms = " OR ".join(
        f"bool_and(length({column}::VARCHAR) = {digits} AND year(try_strptime({column}::VARCHAR, '{form}')) BETWEEN 1900 AND 2100)"
        for digits, form in ((8, "%Y%m%d"), (6, "%y%m%d"), (6, "%Y%m"))
    )
    (found,) = fetch_row(con, f"SELECT {forms} FROM {table} WHERE {column} IS NOT NULL")
    return bool(found)


def _round_up(bound: float) -> int | float:
    """The bound, rounded towards plus infinity to two digits, so that it can be read."""
    if bound == 0:
        return 0
    decimals = 1 - math.floor(math.log10(abs(bound)))
    if decimals <= 0:
        unit = 10**-decimals
        return -(math.floor(-bound) // unit) * unit
    rounded = round(math.ceil(bound * 10**decimals) / 10**decimals, decimals)
    return int(rounded) if rounded == int(rounded) else rounded
