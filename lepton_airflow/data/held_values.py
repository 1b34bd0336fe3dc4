"""Values of a suite or of a run's window, as the column holds them that they are compared with.

JSON has no dates, a column of dates has no hours, and no time with an offset compares with one without. What has no offset is in UTC.
To SQL the text "1" equals the number 1, and to pandas nothing equals it. No number of 4 bytes equals 0.1, but for the nearest to it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from lepton_airflow.data.duckdb_types import has_zone, is_number, is_time
from lepton_airflow.errors import BadConfiguration

# The arguments of expectations that are compared with one column's values, and how. A bound that is not strict is met by itself.
_EXACT = 2**53  # whole numbers up to it are exact in a float
_BOUNDS = {"min_value": (">=", ">"), "max_value": ("<=", "<")}
# Those whose bounds are compared with values of the column, or with the one in their middle.
_OF_VALUES = tuple(f"expect_column_{name}_to_be_between" for name in ("values", "min", "max", "median"))


def midnight(moment: datetime, sign: str) -> date:
    """The date that divides a column of dates as a moment does. A date means its midnight in UTC.

    :param sign: how the dates are compared with it: ``<``, ``<=``, ``>`` or ``>=``.
    """
    utc = _in_utc(moment)
    later = sign in (">=", "<") and utc.time() != time.min
    return utc.date() + timedelta(days=int(later))


def as_held(
    kwargs: dict[str, Any], columns: Mapping[str, str], where: str, expectation: str = ""
) -> dict[str, Any]:
    """The arguments of an expectation, with ISO texts as dates or timestamps, and texts as numbers, where the column holds such.

    :param columns: DuckDB's types by name.
    :param expectation: its type.
    :param where: which expectation it is, for the message.
    :raises BadConfiguration: a text is no date, time or number, has a time of day where it should equal a date, or a number meets texts;
        or Great Expectations would round a bound.
    """

    def held(value: Any, column: Any, sign: str = "==") -> Any:
        return _held(value, columns.get(str(column), ""), sign, f"{where}: column {column!r}")

    changed = dict(kwargs)
    column = kwargs.get("column")
    kind = columns.get(str(column), "")
    if not is_time(kind):
        _check_digits(kwargs, where)
    for name, (sign, strict) in _BOUNDS.items():
        if name not in kwargs:
            continue
        if kind == "TIME" and isinstance(kwargs[name], str):
            raise BadConfiguration(
                f"{where}: column {column!r} holds TIME, for which Great Expectations has no bounds: compare it in a row_condition, or "
                "in the SQL of unexpected_rows_expectation."
            )
        if is_time(kind) or (kind == "FLOAT" and expectation in _OF_VALUES):
            changed[name] = held(kwargs[name], column, strict if kwargs.get(f"strict_{name[:3]}") else sign)
    if isinstance(kwargs.get("value_set"), list):
        # Each value once: Great Expectations counts those that a column has, and compares with the length of the set.
        if any(isinstance(value, list | dict) for value in kwargs["value_set"]):
            raise BadConfiguration(
                f"{where}: value_set holds a list or an object, which Great Expectations compares with no column: unnest it in the query."
            )
        changed["value_set"] = list(dict.fromkeys(held(value, column) for value in kwargs["value_set"]))
    if isinstance(kwargs.get("value_pairs_set"), list):
        pair = (kwargs.get("column_A"), kwargs.get("column_B"))
        changed["value_pairs_set"] = [
            [held(value, name) for value, name in zip(values, pair, strict=False)]
            for values in kwargs["value_pairs_set"]
        ]
    if isinstance(kwargs.get("row_condition"), dict):
        changed["row_condition"] = _condition(kwargs["row_condition"], held)
    return changed


def whole(value: Any) -> Any:
    """A whole number beyond 2^53 that came as a float, as an integer: compared as floats, other integers would equal it."""
    large = (
        isinstance(value, float) and value.is_integer() and _EXACT <= abs(value) < 2**64
    )  # of the integers of a column
    return int(value) if large else value


def as_float(value: Any) -> Any:
    """A decimal as the float that says the same, if one does: the numbers of a suite are floats, and to Python 0.3 is not Decimal("0.3")."""
    same = isinstance(value, Decimal) and Decimal(repr(float(value))) == value
    return float(value) if same else value


def _check_digits(kwargs: Mapping[str, Any], where: str) -> None:
    """Raise for a whole number that no float holds, since Great Expectations makes floats of bounds and totals."""
    for name in ("min_value", "max_value", "sum_total"):
        value = kwargs.get(name)
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,300}\s*", value):
            value = int(value)
        if isinstance(value, int) and _EXACT < abs(value) < 10**300 and float(value) != value:
            raise BadConfiguration(
                f"{where}: Great Expectations would round {name}={value} to {float(value):.0f}: write that number, or compare in a "
                "row_condition or in the SQL of unexpected_rows_expectation."
            )


def _condition(condition: dict[str, Any], held: Any) -> dict[str, Any]:
    """A row_condition in JSON, with moments."""
    if isinstance(condition.get("conditions"), list):
        return condition | {"conditions": [_condition(one, held) for one in condition["conditions"]]}
    column, value = condition.get("column"), condition.get("parameter")
    if not isinstance(column, dict) or value is None:
        return condition
    name, sign = column.get("name"), str(condition.get("operator"))
    values = [held(one, name) for one in value] if isinstance(value, list) else held(value, name, sign)
    return condition | {"parameter": values}


def _held(value: Any, kind: str, sign: str, where: str) -> Any:
    """One value as a column of a type holds it."""
    if isinstance(value, str) and kind == "BOOLEAN":
        if value.lower() not in ("true", "false"):
            raise BadConfiguration(f"{where} holds BOOLEAN, and {value[:40]!r} is neither true nor false.")
        return value.lower() == "true"
    if isinstance(value, str) and kind == "TIME":
        with suppress(ValueError):
            if not (moment := time.fromisoformat(value)).tzinfo:
                return moment
        raise BadConfiguration(f"{where} holds TIME, and {value[:40]!r} is no time such as 14:30:00.")
    if isinstance(value, str) and is_number(kind):
        value = _number(value, kind, where)
    if is_number(kind) and kind not in ("FLOAT", "DOUBLE", "BOOLEAN"):
        value = whole(value)
    if isinstance(value, (int, float)) and kind == "FLOAT":
        with suppress(OverflowError):  # beyond its range there is no such value
            nearest = struct.unpack("f", struct.pack("f", value))[0]
            return value if nearest == value else nearest
    if kind == "VARCHAR" and isinstance(value, (int, float)):
        raise BadConfiguration(f'{where} holds text, and {value!r} is none: write it as a text, "{value}".')
    if not is_time(kind) or not isinstance(value, (str, date)):
        return value
    try:
        at = _moment(value)
    except ValueError:
        raise BadConfiguration(
            f"{where} holds {kind}, and {str(value)[:40]!r} is no ISO 8601 date or time such as 2013-05-01 or 2013-05-01T14:30:00+00:00."
        ) from None
    if kind != "DATE":
        utc = _in_utc(at)
        return utc if has_zone(kind) else utc.replace(tzinfo=None)
    if sign in ("==", "!=") and _in_utc(at).time() != time.min:
        raise BadConfiguration(
            f"{where} holds dates, and none of them equals {str(value)[:40]!r}, which has a time of day: give the date alone."
        )
    return midnight(at, sign)


def _number(text: str, kind: str, where: str) -> int | float:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    raise BadConfiguration(f"{where} holds {kind}, and {text[:40]!r} is no number.")


def _moment(value: str | date) -> datetime:
    if isinstance(value, datetime):
        return value
    return datetime.combine(value, time.min) if isinstance(value, date) else datetime.fromisoformat(value)


def _in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
