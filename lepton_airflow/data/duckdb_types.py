"""What kind of values a column of a DuckDB type holds, and how others can read them."""

from __future__ import annotations

import re

WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_NUMBERS = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)|BOOLEAN")


def is_number(kind: str) -> bool:
    """Whether the values can be taken as numbers."""
    return _NUMBERS.fullmatch(kind) is not None


def is_time(kind: str) -> bool:
    """Whether the values are dates or timestamps."""
    return kind == "DATE" or kind.startswith("TIMESTAMP")


def has_zone(kind: str) -> bool:
    """Whether the timestamps have a time zone."""
    return kind.startswith("TIMESTAMPTZ") or kind.endswith("WITH TIME ZONE")


def in_microseconds(column: str, kind: str) -> str:
    """SQL that casts timestamps in nanoseconds, as pandas writes them, to microseconds.

    DuckDB compares nanoseconds with no other timestamp, so a query could not compare them with the run's window.
    """
    return {
        "TIMESTAMP_NS": f"CAST({column} AS TIMESTAMP)",
        "TIMESTAMPTZ_NS": f"CAST({column} AS TIMESTAMPTZ)",
    }.get(kind, column)


def portable(column: str, kind: str) -> str:
    """SQL that casts a column to one of the few types that every framework and ONNX know."""
    if kind == "BOOLEAN":
        return f"CAST({column} AS TINYINT)"
    if kind.startswith("DECIMAL") or kind in (
        "HUGEINT",
        "UHUGEINT",
        '"NULL"',
    ):  # "NULL": a column without values
        return f"CAST({column} AS DOUBLE)"
    if kind.startswith("ENUM") or kind in ("UUID", "JSON"):
        return f"CAST({column} AS VARCHAR)"
    return in_microseconds(column, kind)
