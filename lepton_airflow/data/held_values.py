"""Values of a suite or of a run's window, as the column holds them that they are compared with.

JSON has no dates, a column of dates has no hours, and no time with an offset compares with one without. What has no offset is in UTC.
To SQL the text "1" equals the number 1, and to pandas nothing equals it. No number of 4 bytes equals 0.1, but for the nearest to it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from lepton_airflow.data.duckdb_types import has_zone, is_number, is_time
from lepton_airflow.errors import BadConfiguration

# The arguments of expectations that are compared with one column's values, and how. A bound that is not strict is met by itself.
_BOUNDS = {"min_value": (">=", ">"), "max_value": ("<=", "<")}


def midnight(moment: datetime, sign: str) -> date:
    """The date that divides a column of dates as a moment does. A date means its midnight in UTC.

    :param sign: how the dates are compared with it: ``<``, ``<=``, ``>`` or ``>=``.
    """
    utc = _in_utc(moment)
    later = sign in (">=", "<") and utc.time() != time.min
    return utc.date() + timedelta(days=int(later))


def as_held(kwargs: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The arguments of an expectation, with ISO texts as dates or timestamps, and texts as numbers, where the column holds such.

    :param columns: DuckDB's types by name.
    :param where: which expectation it is, for the message.
    :raises BadConfiguration: a text is no date, time or number, has a time of day where it should equal a date, or a number meets texts.
    """

    def held(value: Any, column: Any, sign: str = "==") -> Any:
        return _held(value, columns.get(str(column), ""), sign, f"{where}: column {column!r}")

    changed = dict(kwargs)
    column = kwargs.get("column")
    for name, (sign, strict) in _BOUNDS.items():
        if is_time(columns.get(str(column), "")) and name in kwargs:
            changed[name] = held(kwargs[name], column, strict if kwargs.get(f"strict_{name[:3]}") else sign)
    if isinstance(kwargs.get("value_set"), list):
        # Each value once: Great Expectations counts those that a column has, and compares with the length of the set.
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
        try:
            return time.fromisoformat(value)
        except ValueError:
            raise BadConfiguration(
                f"{where} holds TIME, and {value[:40]!r} is no time such as 14:30:00."
            ) from None
    if isinstance(value, str) and is_number(kind):
        value = _number(value, kind, where)
    if isinstance(value, float) and kind == "FLOAT":
        with suppress(OverflowError):  # beyond its range there is no such value
            return struct.unpack("f", struct.pack("f", value))[0]
    if kind == "VARCHAR" and isinstance(value, (int, float)):
        raise BadConfiguration(f'{where} holds text, and {value!r} is none: write it as a text, "{value}".')
    if not is_time(kind) or not isinstance(value, (str, date)):
        return value
    try:
        moment = _moment(value)
    except ValueError:
        raise BadConfiguration(
            f"{where} holds {kind}, and {str(value)[:40]!r} is no ISO 8601 date or time such as 2013-05-01 or 2013-05-01T14:30:00+00:00."
        ) from None
    if kind != "DATE":
        utc = _in_utc(moment)
        return utc if has_zone(kind) else utc.replace(tzinfo=None)
    if sign in ("==", "!=") and _in_utc(moment).time() != time.min:
        raise BadConfiguration(
            f"{where} holds dates, and none of them equals {str(value)[:40]!r}, which has a time of day: give the date alone."
        )
    return midnight(moment, sign)


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
