from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_airflow.airflow import window
from lepton_airflow.contract import Window
from lepton_airflow.errors import BadConfiguration

JANUARY = Window("2013-01-01T00:00:00+00:00", "2013-02-01T00:00:00+00:00")
MARCH = Window("2013-03-01T00:00:00+00:00", "2013-04-01T00:00:00+00:00")


def _context(
    *,
    interval: tuple[datetime, datetime] | None = None,
    key: str | None = None,
    events: list[dict[str, Any]] | None = None,
    **params: Any,
) -> dict[str, Any]:
    start, end = interval or (None, None)
    return {
        "dag_run": SimpleNamespace(partition_key=key, data_interval_start=start, data_interval_end=end),
        "triggering_asset_events": {"flights": [SimpleNamespace(extra=extra) for extra in events or []]},
        "params": params,
    }


def _days(first: int, last: int) -> tuple[datetime, datetime]:
    return datetime(2013, 1, first, tzinfo=UTC), datetime(2013, 1, last, tzinfo=UTC)


def test_the_order_is_partition_interval_event_params() -> None:
    interval = (datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 2, 1, tzinfo=UTC))
    events = [{"window": {"start": "2013-03-01", "end": "2013-04-01"}}]
    params = {"window_start": "2013-05-01", "window_end": "2013-06-01"}
    may = Window("2013-05-01T00:00:00+00:00", "2013-06-01T00:00:00+00:00")
    assert window.resolve(_context(key="2013-03", interval=interval, events=events, **params)) == (MARCH, "")
    assert window.resolve(_context(interval=interval, events=events, **params)) == (JANUARY, "")
    assert window.resolve(_context(events=events, **params)) == (MARCH, "")
    assert window.resolve(_context(**params)) == (may, "")


def test_an_empty_interval_is_no_window_and_says_which_timetable_to_use() -> None:
    found, why = window.resolve(_context(interval=_days(1, 1)))
    assert found is None
    assert "CronDataIntervalTimetable" in why


def test_an_empty_interval_does_not_hide_params() -> None:
    context = _context(interval=_days(1, 1), window_start="2013-01-01", window_end="2013-02-01")
    assert window.resolve(context) == (JANUARY, "")


def test_no_interval_at_all_says_what_to_give() -> None:
    found, why = window.resolve(_context())
    assert found is None
    assert "window_start" in why


def test_several_events_span_from_the_first_to_the_last() -> None:
    events = [
        {"window": {"start": "2013-01-15", "end": "2013-02-01"}},
        {"rows": 3},
        {"window": {"start": "2013-01-01", "end": "2013-01-10"}},
    ]
    assert window.resolve(_context(events=events)) == (JANUARY, "")


@pytest.mark.parametrize(
    ("key", "start", "end"),
    [
        ("2013", "2013-01-01T00", "2014-01-01T00"),
        ("2013-12", "2013-12-01T00", "2014-01-01T00"),
        ("2012-02-29", "2012-02-29T00", "2012-03-01T00"),
        ("2013-12-31T23", "2013-12-31T23", "2014-01-01T00"),
        ("2013-01-01T05:00:00Z", "2013-01-01T05", "2013-01-01T06"),
    ],
)
def test_partition_keys(key: str, start: str, end: str) -> None:
    assert window.from_partition_key(key) == Window(f"{start}:00:00+00:00", f"{end}:00:00+00:00")


@pytest.mark.parametrize("key", ["2013-13", "2013-02-30", "spring", "2013-1", "eu-west", "2013-01-01T24"])
def test_partition_keys_that_are_no_time(key: str) -> None:
    with pytest.raises(BadConfiguration, match=f"partition key '{key}' is no"):
        window.from_partition_key(key)


def test_a_partition_that_is_no_time_has_no_window_and_says_so() -> None:
    interval = _days(1, 2)  # whatever the interval is, it is not what this run is about
    found, why = window.resolve(_context(key="eu-west", interval=interval))
    assert found is None
    assert "partition key 'eu-west' is no span of time" in why


def test_times_without_offset_are_utc_and_others_keep_their_instant() -> None:
    assert window.checked("2013-01-01", "2013-01-31T19:00:00-05:00", "x") == JANUARY
    local = timezone(timedelta(hours=1))
    assert (
        window.checked(datetime(2013, 1, 1, 1, tzinfo=local), datetime(2013, 2, 1, 1, tzinfo=local), "x")
        == JANUARY
    )


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [
        ("2013-02-01", "2013-01-01", "is empty"),
        ("2013-01-01", "2013-01-01", "is empty"),
        ("soon", "2013-01-01", "not two ISO 8601 times"),
        ("2013-01-01", None, "not two ISO 8601 times"),
    ],
)
def test_what_is_no_window_is_a_sentence(start: Any, end: Any, sentence: str) -> None:
    with pytest.raises(BadConfiguration, match=f"params window_start and window_end: .*{sentence}"):
        window.resolve(_context(window_start=start, window_end=end))
