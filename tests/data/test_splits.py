"""The arithmetic of splits, on tables of a few rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import duckdb
import pytest

from lepton_airflow.data.splits import SPLIT, Division, Split, length_text
from lepton_airflow.errors import BadConfiguration, BadInput

DIVISION: dict[str, Any] = {
    "by": "random",
    "time_column": None,
    "cluster_column": None,
    "known_clusters": False,
    "id_columns": [],
    "label_horizon": timedelta(),
    "strata": None,
    "valid_fraction": 0.25,
    "test_fraction": 0.2,
    "valid_start": None,
    "test_start": None,
    "seed": 0,
}


def divide(known: str, **changes: Any) -> duckdb.DuckDBPyConnection:
    """A connection with the table ``divided``, made from the rows of a query."""
    con = duckdb.connect()
    con.execute(f"CREATE TABLE known AS {known}")
    con.execute(f"CREATE TABLE divided AS {Division(**DIVISION | changes).query(con)}")
    return con


def rows(number: int, more: str = "") -> str:
    return f"SELECT i AS __row, NULL::TIMESTAMP AS __time{more} FROM range({number}) r(i)"


def counts(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    return dict(con.execute(f"SELECT {SPLIT}, count(*) FROM divided GROUP BY 1").fetchall())


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (10, {"train": 6, "valid": 2, "test": 2}),  # 0.8 * 0.75 is 0.6000000000000001: no seventh row
        (1000, {"train": 600, "valid": 200, "test": 200}),
        (4, {"train": 3, "valid": 1}),  # what cannot be divided is train's
        (1, {"train": 1}),
    ],
)
def test_shares_are_exact_and_train_gets_the_remainder(number: int, wanted: dict[str, int]) -> None:
    assert counts(divide(rows(number))) == wanted


def test_another_seed_divides_otherwise_and_the_same_one_alike() -> None:
    def train(seed: int) -> list[Any]:
        con = divide(rows(50), seed=seed)
        return con.execute(f"SELECT __row FROM divided WHERE {SPLIT} = 'train' ORDER BY 1").fetchall()

    assert train(1) == train(1) != train(2)


def test_strata_have_equal_shares_in_every_split() -> None:
    con = divide(rows(100, ", i % 10 = 0 AS rare"), strata="rare")
    assert counts(con) == {"train": 60, "valid": 20, "test": 20}
    found = con.execute(f"SELECT {SPLIT}, count(*) FROM divided WHERE rare GROUP BY 1").fetchall()
    assert dict(found) == {"train": 6, "valid": 2, "test": 2}


def test_a_cluster_goes_where_it_begins() -> None:
    known = "SELECT i AS __row, TIMESTAMP '2024-01-01' + INTERVAL (i) HOUR AS __time, i // 24 AS day FROM range(240) r(i)"
    con = divide(
        known, by="time", time_column="t", cluster_column="day", valid_fraction=0.0, test_fraction=0.45
    )
    found = con.execute(f"SELECT day, list(DISTINCT {SPLIT}) FROM divided GROUP BY 1 ORDER BY 1").fetchall()
    # 0.55 of the rows end inside the sixth day, which is then test as a whole.
    assert [names for _, names in found] == [["train"]] * 5 + [["test"]] * 5


@pytest.mark.parametrize(
    ("time_type", "first"),
    [
        ("DATE", "2024-01-01"),
        ("TIMESTAMP", "2024-01-01T00:00:00"),
        ("TIMESTAMP WITH TIME ZONE", "2024-01-01T00:00:00+00:00"),
    ],
)
def test_a_range_is_written_as_its_column_is(time_type: str, first: str) -> None:
    known = "SELECT i AS __row, TIMESTAMP '2024-01-01' + INTERVAL (i) DAY AS __time FROM range(10) r(i)"
    changes = {"by": "time", "time_column": "t", "valid_fraction": 0.0}
    division = Division(**DIVISION | changes)
    found = division.measure(divide(known, **changes), "divided", time_type)
    assert list(found) == ["train", "test"]
    assert found["train"].rows == 8
    assert found["train"].time_range is not None
    assert found["train"].time_range[0] == first


def test_without_times_there_is_no_range() -> None:
    assert Division(**DIVISION).measure(divide(rows(10)), "divided", None)["test"] == Split(2, None)


def test_a_split_without_rows_is_refused_with_what_there_is() -> None:
    known = "SELECT i AS __row, TIMESTAMP '2024-01-01' + INTERVAL (i) DAY AS __time, i % 2 AS shop FROM range(4) r(i)"
    changes = {
        "by": "time",
        "time_column": "t",
        "valid_fraction": 0.0,
        "test_start": "2024-03-01",
        "cluster_column": "shop",
    }
    con = divide(known, **changes)
    with pytest.raises(
        BadInput,
        match=r"split 'test' has no row: 4 rows in 2 clusters \(times 2024-01-01 .* to 2024-01-04 .*\) went to train",
    ):
        Division(**DIVISION | changes).measure(con, "divided", "TIMESTAMP")


@pytest.mark.parametrize(
    ("valid_start", "message"),
    [
        ("2024-01-05T00:00:00+00:00", "does not lie before the start of test, 2024-01-04T22:00:00"),
        ("yesterday", "is not a time: expected ISO 8601, window_start or window_end"),
    ],
)
def test_a_start_that_cannot_be_is_refused(valid_start: str, message: str) -> None:
    known = "SELECT i AS __row, TIMESTAMP '2024-01-01' + INTERVAL (i) DAY AS __time FROM range(10) r(i)"
    with pytest.raises(BadConfiguration, match=message):
        divide(known, by="time", test_start="2024-01-05T00:00:00+02:00", valid_start=valid_start)


def test_a_length_of_time_is_said_in_words() -> None:
    lengths = {
        "31 days": {"days": 31},
        "1 hour": {"hours": 1},
        "36 hours": {"hours": 36},
        "90 minutes": {"minutes": 90},
    }
    for text, length in (
        lengths | {"61 seconds": {"seconds": 61}, "0.5 seconds": {"milliseconds": 500}}
    ).items():
        assert length_text(timedelta(**length)) == text
