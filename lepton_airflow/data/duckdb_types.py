"""What kind of values a column of a DuckDB type holds, and how others can read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lepton_airflow.data.sql import quote

WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
# The types of timestamps in nanoseconds, and those that hold the same in microseconds.
MICROSECONDS = {"TIMESTAMP_NS": "TIMESTAMP", "TIMESTAMPTZ_NS": "TIMESTAMP WITH TIME ZONE"}
_DIGITS = 15  # of any number, which a DOUBLE keeps
_NUMBERS = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)|BOOLEAN")


def is_number(duckdb_type: str) -> bool:
    """Whether the values can be taken as numbers."""
    return _NUMBERS.fullmatch(duckdb_type) is not None


def is_time(duckdb_type: str) -> bool:
    """Whether the values are dates or timestamps."""
    return duckdb_type == "DATE" or duckdb_type.startswith("TIMESTAMP")


def has_zone(duckdb_type: str) -> bool:
    """Whether the timestamps have a time zone."""
    return duckdb_type.startswith("TIMESTAMPTZ") or duckdb_type.endswith("WITH TIME ZONE")


def parts_of(duckdb_type: str) -> set[str]:
    """The names of the types within a list, a struct or a map, at any depth; of another type its own."""
    found: set[str] = set()

    def note(name: str) -> str:
        found.add(name)
        return name

    _renamed(duckdb_type, note)
    return found


def with_parts(duckdb_type: str, changed: Mapping[str, str]) -> str:
    """The type with some of those within it changed; a key may have the name of a type."""
    return _renamed(duckdb_type, lambda name: changed.get(name, name))


def _renamed(duckdb_type: str, rename: Callable[[str], str]) -> str:
    import duckdb

    def name(of: Any) -> str:
        if of.id not in ("list", "array", "struct", "map"):
            return rename(str(of))
        parts = {part: inner if part == "size" else name(inner) for part, inner in of.children}
        if of.id in ("list", "array"):
            return f"{parts['child']}[{parts.get('size', '')}]"
        fields = parts.values() if of.id == "map" else (f"{quote(k)} {v}" for k, v in parts.items())
        return f"{of.id.upper()}({', '.join(fields)})"

    deep = duckdb_type.endswith("]") or duckdb_type.startswith(("STRUCT(", "MAP("))
    return name(duckdb.sqltype(duckdb_type)) if deep else rename(duckdb_type)


def in_microseconds(column: str, duckdb_type: str) -> str:
    """SQL that casts timestamps in nanoseconds, as pandas writes them, to microseconds.

    DuckDB compares nanoseconds with no time that has a zone, so a query could not compare them with the run's window.
    """
    return f"CAST({column} AS {MICROSECONDS[duckdb_type]})" if duckdb_type in MICROSECONDS else column


def portable(column: str, duckdb_type: str, *, exact: bool = False) -> str:
    """SQL that casts a column to one of the few types that every framework and ONNX know.

    :param exact: keep all digits, of which a DOUBLE has 15, as text: two ids stay two. The text has no zeros at its end, so that an id is
        the same text whatever its scale.
    """
    digits = re.match(r"DECIMAL\((\d+),(\d+)\)", duckdb_type)
    if exact and ("HUGEINT" in duckdb_type or (digits and int(digits[1]) > _DIGITS)):
        text = f"CAST({column} AS VARCHAR)"
        return f"regexp_replace({text}, '\\.?0+$', '')" if digits and int(digits[2]) else text
    if duckdb_type == "BOOLEAN":
        return f"CAST({column} AS TINYINT)"
    if duckdb_type.startswith("DECIMAL") or duckdb_type in (
        "HUGEINT",
        "UHUGEINT",
        '"NULL"',
    ):  # "NULL": a column without values
        return f"CAST({column} AS DOUBLE)"
    if duckdb_type.startswith("ENUM") or duckdb_type in ("UUID", "JSON"):
        return f"CAST({column} AS VARCHAR)"
    return in_microseconds(column, duckdb_type)
