from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lepton_airflow.data.suite_parameters import asks_for_now, filled
from lepton_airflow.errors import BadConfiguration

pytest.importorskip("great_expectations")


def fill(expression: str, **parameters: Any) -> Any:
    return filled({"$PARAMETER": expression}, parameters, "here")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("rows", 48),
        ("0.25 * rows", 12.0),
        ("trunc(1.1 * rows) + 1", 53),
        ("-2 * rows ^ 2", -4608),
        ("1e2 * rows", 4800.0),
        ("start", "2013-05-01T00:00:00+00:00"),
        ("start - timedelta(days=1, hours=2)", "2013-04-29T22:00:00+00:00"),
        ("min-date", "a name that is no expression"),
        ("e", 5),
    ],
)
def test_an_expression_is_computed(expression: str, value: Any) -> None:
    parameters = {
        "rows": 48,
        "start": "2013-05-01T00:00:00+00:00",
        "min-date": "a name that is no expression",
        "e": 5,
    }
    assert filled({"$PARAMETER": expression}, parameters, "here") == value


def test_parameters_are_filled_at_any_depth() -> None:
    asked = {"column": "a", "value_set": [1, {"$PARAMETER": "x"}], "c": {"parameter": {"$PARAMETER": "y"}}}
    assert filled(asked, {"x": [2], "y": 3}, "here") == {
        "column": "a",
        "value_set": [1, [2]],
        "c": {"parameter": 3},
    }
    assert filled({"$PARAMETER": "x", "$PARAMETER.x": 4}, {}, "here") == 4


def test_a_parameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(
        BadConfiguration, match=r"needs .PARAMETER 'rows', which is nan: every value would meet"
    ):
        filled({"min_value": {"$PARAMETER": "rows"}}, {"rows": float("nan")}, "here")


def test_now_is_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        ago = datetime.now(UTC) - datetime.fromisoformat(fill("now() - timedelta(weeks=1)"))
    time.tzset()
    assert abs(ago - timedelta(weeks=1)) < timedelta(minutes=1)
    assert asks_for_now([{"kwargs": {"min_value": {"$PARAMETER": "now() - timedelta(weeks=1)"}}}])
    assert not asks_for_now({"now": {"$PARAMETER": "now + know(1)"}, "text": "now()"})


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("mean", "pass suite_parameters={'mean': …}"),
        ("0.1 * mean", "pass suite_parameters={'mean': …}"),
        ("may - timedelta(days=1)", "pass suite_parameters={'may': …}"),  # and not the month of this year
        ("2 * e", "'e' is a number of mathematics: rename the parameter"),
        ("rows *", "cannot compute: Expected end of text"),
        ("now(", "cannot compute: Expected"),
        ("rows / 0", "cannot compute: division by zero"),
        ("1e308 * 10", "which is inf"),
    ],
)
def test_what_cannot_be_computed_gets_one_sentence(expression: str, reason: str) -> None:
    with pytest.raises(BadConfiguration, match=f"^here needs .*{re.escape(reason)}") as caught:
        fill(expression, rows=48, e=5)
    assert "\n" not in str(caught.value)
