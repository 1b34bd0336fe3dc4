"""Suites of expectations as data: check the form of a suite, and propose one that a table meets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.duckdb_types import WHOLE
from lepton_airflow.data.sql import fetch_row, quote
from lepton_airflow.errors import BadConfiguration

if TYPE_CHECKING:
    import duckdb

_INTEGERS = (*WHOLE, "HUGEINT")
_MAX_VALUES_IN_SET = 20
_SLACK = 0.1  # of the observed range, and of the share of nulls


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
    con: duckdb.DuckDBPyConnection, table: str, columns: Mapping[str, str], source: Path
) -> dict[str, Any]:
    """Propose a suite that a table meets with some slack, for a person to review.

    :param columns: the table's columns and their types.
    :param source: the file that the suite and its notes are named after.
    """
    (rows,) = fetch_row(con, f"SELECT count(*) FROM {table}")
    proposed: list[dict[str, Any]] = [
        _expect("table_row_count_to_be_between", min_value=rows // 2, max_value=rows * 2),
        _expect("table_columns_to_match_set", column_set=list(columns), exact_match=True),
    ]
    for name, kind in columns.items():
        proposed += _propose_for(con, table, name, kind, rows)
    return {
        "name": source.stem,
        "meta": {"notes": f"Proposed from {rows} rows of {source.name}. Review every bound before use."},
        "expectations": proposed,
    }


def _propose_for(
    con: duckdb.DuckDBPyConnection, table: str, name: str, kind: str, rows: int
) -> Iterator[dict[str, Any]]:
    """Expectations that one column of the table meets."""
    column = quote(name)
    present, distinct = fetch_row(
        con, f"SELECT count({column}), approx_count_distinct({column}) FROM {table}"
    )
    yield _expect("column_values_to_be_in_type_list", column=name, type_list=[kind.partition("(")[0]])
    if present == 0:
        return
    if present == rows:
        yield _expect("column_values_to_not_be_null", column=name)
    else:
        mostly = round(max(0.0, present / rows - _SLACK), 2)
        yield _expect("column_values_to_not_be_null", column=name, mostly=mostly)
    if distinct > 0.9 * present and kind in (*_INTEGERS, "VARCHAR", "UUID"):
        (exact,) = fetch_row(con, f"SELECT count(DISTINCT {column}) FROM {table}")
        if exact == present:
            yield _expect("column_values_to_be_unique", column=name)
    if kind in (*_INTEGERS, "FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        low, high = fetch_row(con, f"SELECT min({column}), max({column}) FROM {table}")
        whole = kind in _INTEGERS
        if math.isfinite(low) and math.isfinite(high):
            least, most = (
                _bounds(low, high, whole=True) if whole else _bounds(float(low), float(high), whole=False)
            )
            yield _expect("column_values_to_be_between", column=name, min_value=least, max_value=most)
    elif kind == "VARCHAR" and distinct <= _MAX_VALUES_IN_SET:
        values = con.execute(
            f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL ORDER BY 1"
        ).fetchall()
        yield _expect("column_values_to_be_in_set", column=name, value_set=[v for (v,) in values])
    elif kind == "VARCHAR":
        low, high = fetch_row(con, f"SELECT min(length({column})), max(length({column})) FROM {table}")
        yield _expect("column_value_lengths_to_be_between", column=name, min_value=low, max_value=high)


def _expect(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


def _bounds(low: float, high: float, *, whole: bool) -> tuple[float, float]:
    """Bounds around the observed range, with slack, rounded outwards to about as many digits as the slack has."""
    slack = _SLACK * (high - low)
    least, most = low, high
    if 1e-300 < slack < math.inf:
        decimals = 1 - math.floor(math.log10(slack))
        decimals = min(decimals, 0) if whole else decimals
        unit = 10.0**-decimals
        least = min(low, round(math.floor((low - slack) / unit) * unit, decimals))
        most = max(high, round(math.ceil((high + slack) / unit) * unit, decimals))
    least = max(least, 0) if low >= 0 else least
    return _readable(least), _readable(most)


def _readable(bound: float) -> float:
    return int(bound) if bound == int(bound) else bound
