"""Divide rows into train, valid and test, so that no split sees another's future, group or row.

The rows are in a view ``known``, whose column ``ROW`` is a row's place in its file and ``TIME`` its time.

A label that looks ahead (bought again within 30 days) tells of the time after its row. A split in time therefore leaves
a gap: rows whose label reaches into the next split belong to none, as in the purging of M. Lopez de Prado, Advances in
Financial Machine Learning (2018), chapter 7.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from lepton_airflow.data.duckdb_types import has_zone
from lepton_airflow.data.sql import fetch_row, quote
from lepton_airflow.errors import BadConfiguration, BadInput

if TYPE_CHECKING:
    import duckdb

SPLIT, TIME, ROW = "__split", "__time", "__row"
_START, _PLACE = "__start", "__place"
KEY, COUNT = "__key", "__count"  # of what is counted beside the user's columns
# Names that no column of the user's may have.
RESERVED = (
    SPLIT,
    TIME,
    ROW,
    "file_row_number",
    _START,
    _PLACE,
    KEY,
    COUNT,
)


_WHICH_QUESTION = (
    "If the model will predict later rows of clusters that it knows (the next month of its customers), set "
    "known_clusters=true; if it will meet new ones, use split='group', or cluster by something shorter."
)


@dataclass(frozen=True)
class Split:
    """The number of rows of a split, and their smallest and largest time, both inclusive."""

    rows: int
    time_range: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Division:
    """How rows are divided into train, valid and test.

    :ivar by: ``time``: train lies before valid, and valid before test; ``group``: whole clusters at random; ``random``.
    :ivar cluster_column: rows with an equal value stay together, but for a division by time of known clusters.
    :ivar known_clusters: of a division by time: a cluster may have rows on both sides of a cut.
    :ivar id_columns: a random division goes by these, so that a row stays in its split when its features change.
    :ivar label_horizon: how far a label looks ahead; a division by time leaves such a gap before each cut.
    :ivar strata: column whose values have equal shares in all splits of a random division.
    :ivar valid_fraction: share of the rows outside test that validate; 0: no such split.
    :ivar valid_start: time at which valid starts, ISO 8601; replaces ``valid_fraction``.
    """

    by: Literal["time", "group", "random"]
    time_column: str | None
    cluster_column: str | None
    known_clusters: bool
    id_columns: Sequence[str]
    label_horizon: timedelta
    strata: str | None
    valid_fraction: float
    test_fraction: float
    valid_start: str | None
    test_start: str | None
    seed: int

    @property
    def names(self) -> list[str]:
        """The splits to make, in order of time."""
        if self.test_fraction == 1 and not self.test_start:
            return ["test"]
        wanted = ["train"]
        wanted += ["valid"] if self.valid_start or self.valid_fraction else []
        wanted += ["test"] if self.test_start or self.test_fraction else []
        return wanted

    def query(self, con: duckdb.DuckDBPyConnection) -> str:
        """SQL of the rows of ``known``, each with the name of its split; NULL for rows in a gap."""
        return {"time": self._by_time, "group": self._by_group, "random": self._by_chance}[self.by](con)

    def _by_time(self, con: duckdb.DuckDBPyConnection) -> str:
        key, start = TIME, ""
        if self.cluster_column and not self.known_clusters:
            # A whole cluster goes to the split in which it begins, so a cut inside a day moves to the day's end.
            key = _START
            start = f", min({TIME}) OVER (PARTITION BY {quote(self.cluster_column)}) AS {_START}"
        con.execute(f"CREATE TEMP VIEW placed AS SELECT *{start} FROM known")
        test = self._cut(con, "test", key, None)
        valid = self._cut(con, "valid", key, test)
        cases = [f"WHEN {key} >= {timestamp(test)} THEN 'test'"] if test else []
        cases += [f"WHEN {key} >= {timestamp(valid)} THEN 'valid'"] if valid else []
        name = f"CASE {' '.join(cases)} ELSE 'train' END" if cases else "'train'"
        divided = f"SELECT * {f'EXCLUDE ({_START})' if start else ''}, {name} AS {SPLIT} FROM placed"
        if not self.label_horizon:
            return divided
        reach = f"{TIME} + {interval(self.label_horizon)}"
        reaching = []
        for place, earlier in enumerate(self.names[:-1]):
            later = ", ".join(f"'{name}'" for name in self.names[place + 1 :])
            cut = f"min({TIME}) FILTER ({SPLIT} IN ({later})) OVER ()"
            reaching.append(f"{SPLIT} = '{earlier}' AND {reach} >= {cut}")
        kept = f"CASE WHEN {' OR '.join(reaching)} THEN NULL ELSE {SPLIT} END" if reaching else SPLIT
        return f"SELECT * REPLACE ({kept} AS {SPLIT}) FROM ({divided})"

    def _cut(
        self, con: duckdb.DuckDBPyConnection, name: str, key: str, end: datetime | None
    ) -> datetime | None:
        """The time at which a split begins: as stated, or such that the rows from then on are about its share."""
        stated, fraction = getattr(self, f"{name}_start"), getattr(self, f"{name}_fraction")
        if stated:
            moment = moment_of(stated, f"{name}_start")
            if end is not None and moment >= end:
                raise BadConfiguration(
                    f"{name}_start={stated!r} does not lie before the start of test, {end.isoformat()}."
                )
            return moment
        if not fraction:
            return None
        before = f"WHERE {key} < {timestamp(end)}" if end else ""
        (rows,) = fetch_row(con, f"SELECT count(*) FROM placed {before}")
        found = con.execute(
            f"SELECT {key} FROM (SELECT {key}, row_number() OVER (ORDER BY {key}) AS n FROM placed {before}) WHERE n = $1",
            [math.floor(rows * (1 - fraction)) + 1],
        ).fetchone()
        return found[0] if found else None

    def _by_group(self, con: duckdb.DuckDBPyConnection) -> str:
        group = quote(str(self.cluster_column))
        # 0.0 and -0.0 are one group with two texts, which would have a place each.
        text = f"'{self.seed}:' || min({group}::TEXT)"
        return (
            f"WITH groups AS (SELECT {group} AS g, count(*) AS n, md5({text}) AS h FROM known GROUP BY {group}), "
            f"placed AS (SELECT g, (sum(n) OVER (ORDER BY h, g) - n) / sum(n) OVER () AS {_PLACE} FROM groups) "
            f"SELECT known.*, {self._shares()} AS {SPLIT} FROM known JOIN placed ON known.{group} = placed.g"
        )

    def _by_chance(self, con: duckdb.DuckDBPyConnection) -> str:
        strata = f"PARTITION BY {quote(self.strata)}" if self.strata else ""
        # Each id with its length before it: 1, 23 is not 12, 3.
        ids = [f"coalesce(length({c}::TEXT) || ':' || {c}::TEXT, '-')" for c in map(quote, self.id_columns)]
        key = " || ".join(ids) or ROW
        return (
            f"SELECT * EXCLUDE ({_PLACE}), {self._shares()} AS {SPLIT} FROM (SELECT *, (row_number() OVER ({strata} "
            f"ORDER BY md5('{self.seed}:' || {key}), {ROW}) - 1) / count(*) OVER ({strata}) AS {_PLACE} FROM known)"
        )

    def _shares(self) -> str:
        """SQL of the split at a place from 0 to below 1. Train comes first, so it gets the row that cannot be divided."""
        # Rounded, because 0.8 * 0.75 is slightly above 0.6, which would give train one row more.
        outside = round(1 - self.test_fraction, 9)
        train = round(outside * (1 - self.valid_fraction), 9)
        return f"CASE WHEN {_PLACE} < {train!r} THEN 'train' WHEN {_PLACE} < {outside!r} THEN 'valid' ELSE 'test' END"

    def measure(self, con: duckdb.DuckDBPyConnection, table: str, time_type: str | None) -> dict[str, Split]:
        """Count the rows of each split of a table, train first, and find their time range.

        :param time_type: DuckDB's type of the time column, which decides how its times are written.
        :raises BadInput: a split has no row, or splits overlap in time.
        """
        found = {
            name: (rows, low, high)
            for name, rows, low, high in con.execute(
                f"SELECT {SPLIT}, count(*), min({TIME}), max({TIME}) FROM {table} GROUP BY {SPLIT}"
            ).fetchall()
        }
        for name in self.names:
            if name not in found:
                rows = sum(rows for rows, *_ in found.values())
                why = "Change its start or fraction, or bring more data."
                if self.label_horizon:
                    why += (
                        f" label_horizon leaves out the rows of the {length_text(self.label_horizon)} before a cut and before the end of "
                        "the data."
                    )
                if self.by == "time" and self.cluster_column and not self.known_clusters:
                    why += (
                        f" A cluster of {self.cluster_column!r} stays with its first row. {_WHICH_QUESTION}"
                    )
                raise BadInput(
                    f"split {name!r} has no row: {rows} rows{self._extent(con, table)} went to {', '.join(sorted(found))}. {why}"
                )
        if self.by == "time":
            for earlier, later in itertools.pairwise(self.names):
                if not found[earlier][2] < found[later][1]:
                    raise BadInput(
                        f"clusters of {self.cluster_column!r} overlap in time: {earlier} would reach to {found[earlier][2]} and "
                        f"{later} begin at {found[later][1]}. {_WHICH_QUESTION}"
                    )

        def text(moment: datetime) -> str:
            if time_type == "DATE":  # as the last time of a range it means the whole day
                return moment.date().isoformat()
            return moment.replace(tzinfo=UTC if has_zone(time_type or "") else None).isoformat()

        return {
            name: Split(rows, [text(low), text(high)] if low else None)
            for name, (rows, low, high) in ((name, found[name]) for name in self.names)
        }

    def _extent(self, con: duckdb.DuckDBPyConnection, table: str) -> str:
        """The number of clusters and the range of times of a table, for a message."""
        text = ""
        if self.cluster_column:
            (clusters,) = fetch_row(con, f"SELECT count(DISTINCT {quote(self.cluster_column)}) FROM {table}")
            text += f" in {clusters} clusters"
        if self.time_column:
            low, high = fetch_row(con, f"SELECT min({TIME}), max({TIME}) FROM {table}")
            text += f" (times {low} to {high})"
        return text


def interval(length: timedelta) -> str:
    """A length of time as SQL."""
    return f"to_microseconds({length // timedelta(microseconds=1)})"


def length_text(length: timedelta) -> str:
    """A length of time in words, in the largest unit of which it is a whole number: ``31 days``."""
    seconds = length.total_seconds()
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds % size == 0:
            return f"{seconds / size:g} {unit}{'s' * (seconds != size)}"
    return f"{seconds:g} seconds"


def label_horizon(con: duckdb.DuckDBPyConnection, text: str | None) -> timedelta:
    """Read how far a label looks ahead, such as ``30 days``; None is not at all.

    :raises BadConfiguration: it is no length of time, has no fixed length, or is not above 0.
    """
    import duckdb

    if text is None:
        return timedelta()
    expected = "expected a length of time such as '1 hour' or '30 days'."
    try:
        months, length = fetch_row(
            con,
            "SELECT date_part('month', i) + 12 * date_part('year', i), i FROM (SELECT CAST($1 AS INTERVAL) AS i)",
            [text],
        )
    except duckdb.Error:
        raise BadConfiguration(f"label_horizon={text!r}: {expected}") from None
    if months:
        raise BadConfiguration(
            f"label_horizon={text!r}: a month has no fixed length; write days, rather too many than too few."
        )
    if length <= timedelta():
        raise BadConfiguration(f"label_horizon={text!r}: {expected}")
    return timedelta(seconds=length.total_seconds())


def moment_of(text: str, name: str) -> datetime:
    """A stated time, in UTC if it names an offset; raises BadConfiguration."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadConfiguration(
            f"{name}={text!r} is not a time: expected ISO 8601, window_start or window_end."
        ) from None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def timestamp(moment: datetime | None) -> str:
    """A time as SQL."""
    assert moment is not None
    return f"TIMESTAMP '{moment.isoformat(sep=' ')}'"
