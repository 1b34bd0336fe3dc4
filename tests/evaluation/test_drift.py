"""Verdicts on whole windows: simulated data whose truth is known, and every way in which a column can go wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.profile import count_rows, reference_counts, reference_profile
from lepton_airflow.errors import BadInput
from lepton_airflow.evaluation.drift import ColumnVerdict, check_profile, judge_columns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Judge = Callable[..., dict[str, ColumnVerdict]]

FEATURES = ["wind", "hour", "engines", "origin", "gate"]
INFO = DatasetInfo(
    target="late",
    task="classification",
    features=FEATURES,
    categorical=["origin", "gate"],
    classes=[0, 1],
    cluster_column="day",
)


def frame(seed: int, days: int, rows: int = 60) -> pd.DataFrame:
    """Wind is mostly that of its day; the rest is drawn row by row; one engine count and one gate only."""
    rng = np.random.default_rng(seed)
    n = days * rows
    day = np.repeat(np.arange(days), rows)
    return pd.DataFrame(
        {
            "day": day,
            "wind": rng.normal(size=days)[day] + 0.3 * rng.normal(size=n),
            "hour": rng.integers(5, 24, n).astype(float),
            "engines": 2,
            "origin": rng.choice(["JFK", "EWR", "LGA"], n, p=[0.5, 0.3, 0.2]),
            "gate": "A1",
            "late": (rng.random(n) < 0.2).astype(int),
        }
    )


@pytest.fixture
def con() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 2})


@pytest.fixture
def profile_of(con: duckdb.DuckDBPyConnection) -> Callable[..., dict[str, Any]]:
    def call(rows: pd.DataFrame, info: DatasetInfo = INFO) -> dict[str, Any]:
        con.register("before", rows)
        from dataclasses import replace

        found = reference_profile(con, "before", replace(info, rows=len(rows)), None)
        return json.loads(json.dumps(found, allow_nan=False))  # as it travels

    return call


@pytest.fixture
def judge(con: duckdb.DuckDBPyConnection, profile_of: Callable[..., dict[str, Any]]) -> Judge:
    """``judge(rows)``: the verdicts on these rows by column, against 90 days drawn without drift."""
    reference = profile_of(frame(0, 90))

    def call(
        rows: pd.DataFrame | pa.Table,
        profile: dict[str, Any] | None = None,
        cluster: str | None = "day",
        **arguments: Any,
    ) -> dict[str, ColumnVerdict]:
        con.register("now", rows)
        found = judge_columns(con, "now", profile or reference, cluster, **arguments)
        return {verdict.name: verdict for verdict in found}

    return call


def typed(con: duckdb.DuckDBPyConnection, hour: str) -> pa.Table:
    """A month in which the column of hours is this expression."""
    con.register("month", frame(1, 30))
    return con.sql(f"SELECT * REPLACE ({hour} AS hour) FROM month").to_arrow_table()


def moved(verdicts: dict[str, ColumnVerdict]) -> list[str]:
    return [name for name, verdict in verdicts.items() if verdict.drifted]


# -- how often it is right ---------------------------------------------------------------------------------------------


def test_without_drift_a_false_alarm_in_any_column_is_rare(judge: Judge) -> None:
    runs = 60
    alarms = sum(bool(moved(judge(frame(seed, 30), threshold=0.0))) for seed in range(1, runs + 1))
    assert alarms <= 0.05 * runs + 3.5 * np.sqrt(0.05 * 0.95 * runs)


def test_without_knowing_of_days_every_month_looks_like_drift(profile_of, judge: Judge) -> None:
    known, unknown = profile_of(frame(0, 90)), profile_of(frame(0, 90))
    for column in unknown["columns"].values():
        del column["design_effect"]
    months = [frame(seed, 30).drop(columns="day") for seed in range(1, 6)]
    assert all("wind" in moved(judge(m, unknown, cluster=None, threshold=0.0)) for m in months)
    assert sum(bool(moved(judge(m, known, cluster=None, threshold=0.0))) for m in months) <= 1


def test_real_drift_is_found_the_more_the_larger(judge: Judge) -> None:
    def power(shift: float) -> float:
        found = 0
        for seed in range(1, 11):
            rows = frame(seed, 30)
            rows["wind"] += shift
            found += moved(judge(rows)) == ["wind"]
        return found / 10

    weak, strong = power(0.6), power(1.5)
    assert weak < strong
    assert strong == 1.0


# -- every way a column can go wrong -------------------------------------------------------------------------------------


def test_a_column_that_empties_has_drifted(judge: Judge) -> None:
    half, none = frame(1, 30), frame(1, 30)
    half.loc[half.index % 2 == 0, "hour"] = None
    none["origin"] = None
    none["hour"] = np.nan
    found = judge(half)
    assert moved(found) == ["hour"]
    assert found["hour"].missing == [0.0, 0.5]
    assert "missing 0.0% before and 50.0% now" in found["hour"].reason
    found = judge(none)
    assert sorted(moved(found)) == ["hour", "origin"]
    assert found["origin"].reason.startswith("every value is missing")


def test_a_column_that_was_empty_and_fills_has_drifted(profile_of, judge: Judge) -> None:
    before = frame(0, 90)
    before["hour"] = np.nan
    assert moved(judge(frame(1, 30), profile_of(before))) == ["hour"]
    empty = frame(1, 30)
    empty["hour"] = np.nan
    found = judge(empty, profile_of(before))["hour"]
    assert (found.drifted, found.distance, found.p_value) == (False, 0.0, 1.0)


def test_values_never_seen_before_are_named(judge: Judge) -> None:
    rows = frame(1, 30)
    rows.loc[rows.index % 3 == 0, "origin"] = "ISP"
    rows.loc[rows.index == 1, "origin"] = "HPN"
    found = judge(rows)
    assert moved(found) == ["origin"]
    assert found["origin"].unseen == {"ISP": 600, "HPN": 1}
    assert "values never seen before: 'ISP', 'HPN'" in found["origin"].reason
    assert found["gate"].unseen == {}


def test_a_constant_that_changes_has_drifted_even_in_two_days(judge: Judge) -> None:
    rows = frame(1, 2)
    rows["engines"], rows["gate"] = 4, "B7"
    assert sorted(moved(judge(rows))) == ["engines", "gate"]


def test_columns_that_are_gone_or_text_have_drifted_and_a_target_may_come_later(judge: Judge) -> None:
    rows = frame(1, 30).drop(columns=["origin", "late"])
    rows["hour"] = rows["hour"].astype(str)
    found = judge(rows)
    assert list(found)[:2] == ["hour", "origin"]  # what moved most comes first
    assert found["hour"].reason == "numbers have become VARCHAR"
    assert found["origin"].reason == "the column is gone"
    assert found["origin"].distance is None
    assert "late" not in found


@pytest.mark.parametrize(
    "kind",
    [
        *(
            f"{unsigned}{size}"
            for unsigned in ("", "U")
            for size in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
        ),
        *("HUGEINT", "FLOAT", "DOUBLE", "DECIMAL(9,2)"),
    ],
)
def test_numbers_stay_numbers_however_they_are_stored(con, judge: Judge, kind: str) -> None:
    found = judge(typed(con, f"hour::{kind}"))["hour"]
    assert not found.drifted
    assert found.distance < 0.1


@pytest.mark.parametrize("kind", ["DATE", "INTERVAL", "INTEGER[]"])
def test_what_is_no_number_any_more_has_drifted(con, judge: Judge, kind: str) -> None:
    found = judge(typed(con, f"NULL::{kind}"))["hour"]
    assert found.reason == f"numbers have become {kind}"


@pytest.mark.parametrize("kind", ["BOOLEAN", "BIGINT", "DOUBLE", "DECIMAL(4,1)", "VARCHAR"])
def test_labels_are_the_same_in_any_type(con, judge: Judge, kind: str) -> None:
    """The profile's target is 0 and 1; a snapshot may have true and false, or floats where some labels are missing."""
    con.register("now", frame(2, 30))
    found = judge(con.execute(f"SELECT * REPLACE (CAST(late AS {kind}) AS late) FROM now").to_arrow_table())
    assert not found["late"].drifted
    assert found["late"].distance == judge(frame(2, 30))["late"].distance


def test_a_label_that_is_nan_has_not_come_yet(judge: Judge) -> None:
    data = frame(2, 30)
    data["late"] = data.late.where(data.index % 10 == 0)
    found = judge(data)["late"]
    assert not found.drifted
    assert found.missing == [0.0, 0.0]


def test_the_target_is_judged_too(judge: Judge) -> None:
    rows = frame(1, 30)
    rows["late"] = (np.random.default_rng(1).random(len(rows)) < 0.6).astype(int)
    found = judge(rows)
    assert moved(found) == ["late"]
    assert found["late"].role == "target"


def test_the_shares_of_the_positive_class_are_told(profile_of, judge: Judge) -> None:
    late = judge(frame(2, 40).assign(late=lambda f: (f.index % 2).astype(int)))["late"]
    assert late.positive == {"class": 1, "before": pytest.approx(0.2, abs=0.03), "now": 0.5}
    assert f"positive class 1 {late.positive['before']:.1%} before and 50.0% now" in late.reason
    assert judge(frame(2, 40))["wind"].positive is None


def test_one_day_of_rows_is_judged_by_what_the_reference_says_of_days(profile_of, judge: Judge) -> None:
    rows = frame(1, 1)
    # The reference has many days as windy: this is no drift, however far the 60 rows are from the others.
    rows["wind"] = 1.0
    found = judge(rows)["wind"]
    assert found.distance > 1
    assert not found.drifted
    assert "which chance explains" in found.reason
    without = profile_of(frame(0, 90))
    for column in without["columns"].values():
        del column["design_effect"]
    found = judge(rows, without)["wind"]
    assert (found.drifted, found.p_value) == (False, None)
    assert found.reason == "all rows are one cluster, which cannot be told from chance"


def test_a_small_move_beyond_chance_does_not_matter(judge: Judge) -> None:
    rows = frame(1, 400)
    rows["hour"] = rows["hour"].where(rows.index % 20 != 0, 8.0)
    found = judge(rows)["hour"]
    assert found.p_adjusted < 1e-6
    assert found.distance < 0.1
    assert not found.drifted


# -- counting ----------------------------------------------------------------------------------------------------------


def test_the_profile_s_own_rows_fall_into_its_bins(con, profile_of) -> None:
    rows = frame(0, 90)
    rows.loc[::7, ["hour", "origin"]] = None
    rows.loc[::11, "wind"] = np.nan
    profile = profile_of(rows)
    for name, column in profile["columns"].items():
        counts = count_rows(con, "before", name, column, "day")
        assert counts.sum(axis=0).tolist() == reference_counts(column), name
        assert counts.sum(axis=1).max() % 60 == 0  # whole days
        assert 80 <= len(counts) <= 90  # few of them share a group


@pytest.mark.parametrize("nulls", [0, 5])
def test_nan_is_missing_in_what_arrow_wrote_too(con, profile_of, tmp_path: Path, nulls: int) -> None:
    rows = frame(0, 90)
    rows.loc[::3, "hour"] = np.nan
    hour = pa.array(rows["hour"].to_numpy(), mask=np.arange(len(rows)) < nulls)
    path = tmp_path / "arrow.parquet"
    pq.write_table(pa.table({"hour": hour, "day": rows["day"]}), path)
    con.execute(f"CREATE VIEW written AS SELECT * FROM read_parquet('{path}')")
    rows.loc[: nulls - 1, "hour"] = np.nan
    wanted = profile_of(rows)["columns"]["hour"]
    info = DatasetInfo(features=["hour"], cluster_column="day", rows=len(rows))
    assert reference_profile(con, "written", info, None)["columns"]["hour"] == wanted
    assert count_rows(con, "written", "hour", wanted, "day").sum(axis=0).tolist() == reference_counts(wanted)


def test_more_categories_than_a_profile_names_are_counted_together(con, profile_of, judge: Judge) -> None:
    rng = np.random.default_rng(0)
    rows, now = frame(0, 90), frame(1, 30)
    rows["origin"] = [f"it's {i}" for i in rng.integers(0, 150, len(rows))]
    now["origin"] = [f"it's {i}" for i in rng.integers(0, 150, len(now))]
    now.loc[0, "origin"] = "x" * 500
    profile = profile_of(rows)
    assert count_rows(con, "before", "origin", profile["columns"]["origin"], None).shape == (1, 102)
    found = judge(now, profile)["origin"]
    assert not found.drifted
    assert found.unseen is None  # an unnamed value may be one of the rare ones


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        (None, "p is no reference profile: expected prepare.output"),
        ({"columns": {}}, "p is no reference profile"),
        ({"profile": 2, "columns": {}}, "version 2, this lepton_airflow knows up to 1: upgrade"),
        ({"profile": 1, "columns": {}, "rows": 0}, "p describes no rows"),
    ],
)
def test_what_is_no_profile_is_refused(profile: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        check_profile(profile, "p")
