from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pytest

from lepton_airflow.data.held_values import as_held, midnight
from lepton_airflow.errors import BadConfiguration

COLUMNS = {
    "at": "TIMESTAMP",
    "ns": "TIMESTAMP_NS",
    "seen": "TIMESTAMP WITH TIME ZONE",
    "day": "DATE",
    "text": "VARCHAR",
    "whole": "BIGINT",
    "price": "DECIMAL(9,2)",
}
NOON_UTC = datetime(2013, 5, 1, 12, tzinfo=UTC)
NOON = NOON_UTC.replace(tzinfo=None)


def held(**kwargs: Any) -> dict[str, Any]:
    return as_held(kwargs, COLUMNS, "here")


@pytest.mark.parametrize(
    "text",
    [
        "2013-05-01T12:00:00",
        "2013-05-01 12:00",
        "2013-05-01T12:00:00Z",
        "2013-05-01T14:00:00+02:00",
        NOON_UTC,
    ],
)
def test_a_time_becomes_what_its_column_holds(text: Any) -> None:
    for column, moment in {"at": NOON, "ns": NOON, "seen": NOON_UTC, "text": text}.items():
        assert held(column=column, min_value=text, value_set=[text, None]) == {
            "column": column,
            "min_value": moment,
            "value_set": [moment, None],
        }


def test_a_date_is_its_midnight() -> None:
    assert held(column="at", max_value="2013-05-01")["max_value"] == NOON.replace(hour=0)
    assert held(column="seen", max_value=date(2013, 5, 1))["max_value"] == datetime(2013, 5, 1, tzinfo=UTC)
    assert held(column="day", value_set=["2013-05-01T02:00:00+02:00"])["value_set"] == [date(2013, 5, 1)]


@pytest.mark.parametrize(
    ("sign", "day"), [(">=", 2), (">", 1), ("<=", 1), ("<", 2)]
)  # of the dates around noon on the 1st
def test_a_time_of_day_divides_dates_where_it_lies(sign: str, day: int) -> None:
    assert midnight(NOON, sign) == date(2013, 5, day)
    assert midnight(NOON.replace(hour=0), sign) == date(2013, 5, 1)
    name = "min_value" if ">" in sign else "max_value"
    bound = held(column="day", **{name: "2013-05-01T12:00", f"strict_{name[:3]}": "=" not in sign})
    assert bound[name] == date(2013, 5, day)
    condition = {
        "type": "comparison",
        "column": {"name": "day"},
        "operator": sign,
        "parameter": "2013-05-01T12:00",
    }
    assert held(row_condition=condition)["row_condition"]["parameter"] == date(2013, 5, day)


def test_pairs_and_joined_conditions_are_read_column_by_column() -> None:
    pairs = held(column_A="text", column_B="day", value_pairs_set=[["2013-05-01", "2013-05-02"]])
    assert pairs["value_pairs_set"] == [["2013-05-01", date(2013, 5, 2)]]

    def compare(column: str, value: Any) -> dict[str, Any]:
        return {"type": "comparison", "column": {"name": column}, "operator": "==", "parameter": value}

    nullity = {"type": "nullity", "column": {"name": "at"}, "is_null": True}
    asked = {
        "type": "or",
        "conditions": [compare("text", "2013-05-01"), nullity, compare("day", "2013-05-01")],
    }
    assert held(row_condition=asked)["row_condition"]["conditions"] == [
        compare("text", "2013-05-01"),
        nullity,
        compare("day", date(2013, 5, 1)),
    ]


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(
        BadConfiguration, match=r"^here: column 'at' holds TIMESTAMP, and 'May' is no ISO 8601"
    ):
        held(column="at", value_set=["May"])
    with pytest.raises(
        BadConfiguration, match=r"'day' holds dates, and none of them equals '2013-05-01T12:00'"
    ):
        held(column="day", value_set=["2013-05-01T12:00"])


def test_a_text_that_meets_numbers_is_one() -> None:
    assert held(column="whole", value_set=["1", " 9007199254740993", 2, None])["value_set"] == [
        1,
        2**53 + 1,
        2,
        None,
    ]
    assert held(column="price", value_set=["1.50"])["value_set"] == [1.5]
    with pytest.raises(BadConfiguration, match=r"column 'whole' holds BIGINT, and 'one' is no number"):
        held(column="whole", value_set=["one"])
    with pytest.raises(
        BadConfiguration, match=r"column 'text' holds text, and 5 is none: write it as a text, \"5\""
    ):
        held(column="text", value_set=[5])
