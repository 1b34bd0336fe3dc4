"""The span of data time that a run is about, for every kind of run.

It comes from the run's partition key, else from its data interval, else from the asset events that triggered it, else from
its params. It never defaults to the date of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from lepton_airflow.contract import Window
from lepton_airflow.errors import BadConfiguration

_EMPTY = (
    "the run's data interval is empty: in Airflow 3 a cron string or @monthly gives every run an interval of length "
    "zero. Use schedule=CronDataIntervalTimetable('@monthly', timezone='UTC') when a run is about the month before"
)
_NONE = (
    "this kind of run has no data interval: give the asset event an extra {'window': {'start': …, 'end': …}}, or the "
    "run the params window_start and window_end"
)

_PARTITION = re.compile(r"^(\d{4})(?:-(\d{2})(?:-(\d{2})(?:[T ](\d{2})(?::\d{2}){0,2}Z?)?)?)?$")


def resolve(context: Mapping[str, Any]) -> tuple[Window | None, str]:
    """The window of a run, from its Airflow context; or None, and why there is none.

    :raises BadConfiguration: an event or a param is given, but it is not a span of time.
    """
    dag_run = context.get("dag_run")
    key = getattr(dag_run, "partition_key", None)
    if key:
        try:
            return from_partition_key(key), ""
        except BadConfiguration as error:
            # Partitions of another kind, by region for example. Most stages need no window.
            return None, str(error).rstrip(".")
    start, end = getattr(dag_run, "data_interval_start", None), getattr(dag_run, "data_interval_end", None)
    if start is not None and end is not None and start < end:
        return Window(_iso(start), _iso(end)), ""
    event = _from_events(context.get("triggering_asset_events") or {})
    if event:
        return event, ""
    params = context.get("params") or {}
    first, last = params.get("window_start"), params.get("window_end")
    if first or last:
        return checked(first, last, "params window_start and window_end"), ""
    return None, _EMPTY if start is not None else _NONE


def from_partition_key(key: str) -> Window:
    """The year, month, day or hour (UTC) that a partition key such as ``2013-04`` names."""
    match = _PARTITION.match(key)
    if not match:
        raise BadConfiguration(
            f"partition key {key!r} is no span of time: expected YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDTHH."
        )
    year, month, day, hour = match.groups()
    try:
        start = datetime(int(year), int(month or 1), int(day or 1), int(hour or 0), tzinfo=UTC)
    except ValueError as error:
        raise BadConfiguration(f"partition key {key!r} is no date: {error}.") from None
    if hour:
        end = start + timedelta(hours=1)
    elif day:
        end = start + timedelta(days=1)
    elif month:
        end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    else:
        end = start.replace(year=start.year + 1)
    return Window(_iso(start), _iso(end))


def checked(start: Any, end: Any, where: str) -> Window:
    """The window between two ISO 8601 times; a time without an offset is UTC.

    :param where: where the times come from, for the message.
    :raises BadConfiguration: they are not two such times, or the window is empty.
    """
    try:
        times = [t if isinstance(t, datetime) else datetime.fromisoformat(str(t)) for t in (start, end)]
    except ValueError:
        raise BadConfiguration(f"{where}: {start!r}, {end!r} are not two ISO 8601 times.") from None
    first, last = (t if t.tzinfo else t.replace(tzinfo=UTC) for t in times)
    if first >= last:
        raise BadConfiguration(f"{where}: the window from {start} to {end} is empty; expected start < end.")
    return Window(_iso(first), _iso(last))


def _from_events(events: Mapping[Any, Any]) -> Window | None:
    """The window from the first start to the last end in the triggering events; None if no event has a window."""
    found = [
        checked(window.get("start"), window.get("end"), "extra['window'] of the triggering asset event")
        for several in events.values()
        for event in several
        if isinstance(window := (getattr(event, "extra", None) or {}).get("window"), Mapping)
    ]
    if not found:
        return None
    return Window(min(w.start for w in found), max(w.end for w in found))


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")
