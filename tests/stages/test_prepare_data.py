from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.contract import Window
from lepton_airflow.data.dataset import DatasetInfo, read_info
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.stages import Result, RunInfo
from lepton_airflow.stages.ingest_data import IngestData
from lepton_airflow.stages.prepare_data import PrepareData

ROOT = Path(__file__).parents[2]
MAY = Window("2013-05-01T00:00:00+00:00", "2013-06-01T00:00:00+00:00")


def prepare(tmp_path: Path, snapshot: pd.DataFrame | str, **kwargs: Any) -> Result:
    run = RunInfo.local(tmp_path, **{k: kwargs.pop(k) for k in ("window",) if k in kwargs})
    if isinstance(snapshot, pd.DataFrame):
        snapshot.to_parquet(tmp_path / "snapshot.parquet")
        snapshot = str(tmp_path / "snapshot.parquet")
    return PrepareData(**({"snapshot": snapshot, "target": "y"} | kwargs)).run(run)


def splits(tmp_path: Path, result: Result) -> dict[str, pd.DataFrame]:
    run = RunInfo.local(tmp_path)
    return {n: pd.read_parquet(run.fetch(a.uri)) for n, a in result.artifacts.items() if n != "profile"}


def info(tmp_path: Path, result: Result, name: str = "train") -> DatasetInfo:
    return read_info(RunInfo.local(tmp_path).fetch(result.artifacts[name].uri))


def profile(tmp_path: Path, result: Result) -> dict[str, Any]:
    return json.loads(RunInfo.local(tmp_path).fetch(result.artifacts["profile"].uri).read_text())


def table(rows: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Measurements of 50 machines, several at a time, whose yes or no depends on x a little."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    return pd.DataFrame(
        {
            "t": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, rows // 4, rows), unit="h"),
            "machine": rng.integers(0, 50, rows),
            "x": x,
            "kind": rng.choice(["a", "b", "ü c"], rows),
            "y": (x + rng.normal(size=rows) > 0.8).astype(int),
        }
    )


TIME = {"split": "time", "time_column": "t"}
RANDOM = {"split": "random"}


# -- splits -----------------------------------------------------------------------------------------------------------


def test_time_splits_are_in_order_and_ties_stay_together(tmp_path: Path) -> None:
    result = prepare(tmp_path, table(), **TIME, id_columns=["machine"])
    parts = splits(tmp_path, result)
    assert list(parts) == ["train", "valid", "test"]
    assert sum(map(len, parts.values())) == 1000
    assert parts["train"].t.max() < parts["valid"].t.min()
    assert parts["valid"].t.max() < parts["test"].t.min()
    assert len(parts["test"]) / 1000 == pytest.approx(0.2, abs=0.02)
    assert len(parts["valid"]) / 800 == pytest.approx(0.2, abs=0.02)
    described = info(tmp_path, result, "valid")
    assert described.time_range == [parts["valid"].t.min().isoformat(), parts["valid"].t.max().isoformat()]
    assert (described.features, described.categorical) == (["x", "kind"], ["kind"])
    assert (described.task, described.classes, described.split, described.rows) == (
        "classification", [0, 1], "valid", len(parts["valid"]),
    )  # fmt: skip


def test_a_cluster_goes_as_a_whole_to_the_split_where_it_begins(tmp_path: Path) -> None:
    data = table()
    data["day"] = data.t.dt.date
    parts = splits(
        tmp_path, prepare(tmp_path, data, **TIME, cluster_column="day", test_start="2024-01-09T13:00:00")
    )
    days = [set(part.day) for part in parts.values()]
    assert not days[0] & days[1]
    assert not days[1] & days[2]
    assert min(days[2]) == pd.Timestamp("2024-01-10").date()  # the 9th begins before the cut
    assert parts["valid"].t.max() < parts["test"].t.min()


def test_clusters_that_overlap_in_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="clusters of 'machine' overlap in time"):
        prepare(tmp_path, table(), **TIME, cluster_column="machine")


def test_starts_are_read_in_utc_and_from_the_window(tmp_path: Path) -> None:
    data = table()
    data["t"] = data.t.dt.tz_localize("America/New_York")
    window = Window("2024-01-08T00:00:00-05:00", "2024-02-01T00:00:00-05:00")
    result = prepare(
        tmp_path,
        data,
        **TIME,
        test_start="window_start",
        valid_start="2024-01-07T05:00:00+00:00",
        window=window,
    )
    parts = splits(tmp_path, result)
    assert parts["valid"].t.min() == pd.Timestamp("2024-01-07", tz="America/New_York")
    assert parts["test"].t.min() == pd.Timestamp("2024-01-08", tz="America/New_York")
    assert info(tmp_path, result, "test").time_range[0] == "2024-01-08T05:00:00+00:00"


def test_groups_are_never_torn_apart(tmp_path: Path) -> None:
    options = {"split": "group", "cluster_column": "machine", "drop": ["t"]}
    first = splits(tmp_path, prepare(tmp_path, table(), **options))
    machines = [set(part.machine) for part in first.values()]
    assert sum(map(len, machines)) == len(set().union(*machines)) == 50
    assert len(first["test"]) / 1000 == pytest.approx(0.2, abs=0.06)
    other = splits(tmp_path, prepare(tmp_path, table(), **options, seed=1))
    assert set(other["test"].machine) != machines[2]


def test_random_splits_keep_the_shares_of_rare_classes(tmp_path: Path) -> None:
    data = table().drop(columns="t").assign(y=["rare" if i % 50 == 0 else "usual" for i in range(1000)])
    parts = splits(tmp_path, prepare(tmp_path, data, **RANDOM, valid_fraction=0.25))
    assert {n: (part.y == "rare").sum() for n, part in parts.items()} == {"train": 12, "valid": 4, "test": 4}
    pd.testing.assert_frame_equal(
        pd.concat(parts.values()).sort_values("x", ignore_index=True), data.sort_values("x", ignore_index=True),
        check_dtype=False,
    )  # fmt: skip


@pytest.mark.parametrize("options", [TIME, RANDOM, {"split": "group", "cluster_column": "machine"}])
def test_equal_inputs_give_equal_bytes_whatever_the_order_and_threads(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    digests = set()
    for threads in (1, 2):
        run = RunInfo.local(tmp_path / str(threads))
        # The snapshot's digest is part of each file, so only the SELECT's own order is shuffled.
        pq.write_table(pa.Table.from_pandas(table(30_000), preserve_index=False), tmp_path / "same.parquet")
        stage = PrepareData(
            snapshot=str(tmp_path / "same.parquet"), target="y", threads=threads, features="SELECT * FROM snapshot ORDER BY random()",
            leak_check=False, **({"id_columns": ["t"]} | options),
        )  # fmt: skip
        digests.add(tuple(sorted((n, a.sha256) for n, a in stage.run(run).artifacts.items())))
    assert len(digests) == 1


def test_five_rows_are_enough_and_accuse_nobody(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0, 5.0], "y": [2.0, 4.0, 6.0, 8.0, 10.0]})
    result = prepare(tmp_path, frame, split="random", valid_fraction=0.25)
    assert {name: part["rows"] for name, part in result.values["splits"].items()} == {
        "train": 3,
        "valid": 1,
        "test": 1,
    }


def test_split_id_names_the_division(tmp_path: Path) -> None:
    def split_id(**kwargs: Any) -> set[str | None]:
        result = prepare(tmp_path, table(), **({"id_columns": ["t"]} | RANDOM | kwargs))
        return {info(tmp_path, result, name).split_id for name in ("train", "valid", "test")}

    one = split_id()
    assert len(one) == 1
    assert split_id() == one
    assert split_id(seed=1) != one
    assert split_id(drop=["kind"]) != one
    assert split_id(task="regression", stratify=True) != one  # not stratified, so other rows
    assert split_id(threads=1) == one


def test_a_window_that_moves_the_cut_makes_another_division(tmp_path: Path) -> None:
    """Else the rows that a later run trained on would pass for rows that it has not seen."""
    ids = set()
    for day in ("03", "08"):
        window = Window(f"2024-01-{day}T00:00:00+00:00", "2024-02-01T00:00:00+00:00")
        result = prepare(tmp_path, table(), **TIME, test_start="window_start", window=window)
        ids.add(info(tmp_path, result).split_id)
    assert len(ids) == 2


def test_the_time_range_of_dates_names_days(tmp_path: Path) -> None:
    frame = table().assign(t=lambda f: f.t.dt.date)
    result = prepare(tmp_path, frame, **TIME)
    low, high = info(tmp_path, result).time_range or ("", "")
    assert (low, high) == ("2024-01-01", str(splits(tmp_path, result)["train"].t.max()))


def test_a_column_without_a_value_is_a_feature_that_tells_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = prepare(tmp_path, table().assign(kind=None), **TIME)
    assert "'kind' is missing in every row of train" in caplog.text
    assert info(tmp_path, result).categorical == []
    caplog.clear()
    prepare(tmp_path, table().assign(kind=None), **TIME, test_fraction=1.0)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "feature 'kind' is missing in every row of test: it tells a model nothing."
    ]


def test_a_split_of_fraction_0_is_not_made(tmp_path: Path) -> None:
    result = prepare(tmp_path, table(), **TIME, valid_fraction=0)
    assert set(result.artifacts) == {"train", "test", "profile"}
    assert set(result.values["splits"]) == {"train", "test"}


# -- features ---------------------------------------------------------------------------------------------------------


def test_the_flights_features_look_back_only(raw_flights: Path, tmp_path: Path) -> None:
    run = RunInfo.local(tmp_path, window=MAY)
    flights = {"uri": f"{raw_flights}/flights/2013-0[2-5].csv", "types": {"tailnum": "VARCHAR"}}
    others = {"weather": f"{raw_flights}/weather/*.jsonl", "planes": f"{raw_flights}/planes.parquet"}
    others |= {"airports": f"{raw_flights}/airports.csv", "airlines": f"{raw_flights}/airlines.tsv"}
    query = (ROOT / "dags/sql/flights_snapshot.sql").read_text()
    snapshot = IngestData(sources={"flights": flights} | others, query=query, order_by=["scheduled_at"]).run(
        run
    )
    features = (ROOT / "dags/sql/flights_features.sql").read_text()
    result = PrepareData(
        snapshot=snapshot.artifacts["snapshot"].uri, target="late", features=features, time_column="scheduled_at",
        cluster_column="day", test_start="window_start", valid_fraction=0.15,
    ).run(run)  # fmt: skip
    parts = splits(tmp_path, result)
    assert parts["test"].scheduled_at.min().isoformat() >= "2013-05-01"
    assert set(parts["train"].day) & set(parts["valid"].day) == set()
    leaks = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "late"}
    assert not leaks & set(info(tmp_path, result).features)
    # Yesterday's share, worked out by hand for one airport and day.
    flown = pd.concat([parts["train"], parts["valid"]])
    day = pd.Timestamp("2013-03-08").date()
    yesterday = flown[(flown.day == day - pd.Timedelta(days=1)) & (flown.origin == "JFK")].late.mean()
    assert flown[
        (flown.day == day) & (flown.origin == "JFK")
    ].origin_late_yesterday.unique() == pytest.approx([yesterday])


@pytest.mark.parametrize(
    ("features", "column"),
    [
        ("SELECT *, lead(x) OVER (ORDER BY t, x) AS coming FROM snapshot", "coming"),
        ("SELECT *, avg(x) OVER () AS mean FROM snapshot", "mean"),
        ("SELECT *, x - (SELECT max(x) FROM snapshot) AS below FROM snapshot", "below"),
        (("SELECT *, last_value(kind) OVER (PARTITION BY machine ORDER BY t ROWS BETWEEN CURRENT ROW AND 1 FOLLOWING) AS k2 "
         "FROM snapshot"), "k2"),
        (("WITH last AS (SELECT max(t) AS m FROM snapshot) SELECT snapshot.* REPLACE (date_diff('hour', t, m) AS x) "
         "FROM snapshot, last"), "x"),
    ],
)  # fmt: skip
def test_sql_that_looks_ahead_is_refused_by_column(tmp_path: Path, features: str, column: str) -> None:
    with pytest.raises(BadInput, match=f"features look into the future: column '{column}' before 2024"):
        prepare(tmp_path, table(), **TIME, features=features)
    assert prepare(tmp_path, table(), **TIME, features=features, leak_check=False).values["splits"]


def test_rows_that_later_ones_take_away_are_a_leak(tmp_path: Path) -> None:
    features = (
        "SELECT * FROM snapshot QUALIFY row_number() OVER (PARTITION BY machine ORDER BY t DESC, x) <= 18"
    )
    with pytest.raises(BadInput, match="look into the future: the number of rows before"):
        prepare(tmp_path, table(), **TIME, features=features)


def test_history_in_sql_passes(tmp_path: Path) -> None:
    features = """
        SELECT *, avg(y) OVER (PARTITION BY machine ORDER BY t RANGE BETWEEN UNBOUNDED PRECEDING AND INTERVAL 1 HOUR PRECEDING)
            AS seen
        FROM snapshot"""
    assert "seen" in info(tmp_path, prepare(tmp_path, table(), **TIME, features=features)).features


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_features.py").write_text(
        """
def ratio(frame):
    return frame.assign(ratio=frame.x / (1 + frame.x.abs()))
def standardised(frame):
    return frame.assign(x=(frame.x - frame.x.mean()) / frame.x.std())
def broken(frame):
    return frame["absent"]
def doubled(frame):
    frame.columns = ["t", "machine", "x", "x", "y"]
    return frame
def mixed(frame):
    return frame.assign(odd=["a", 1] * (len(frame) // 2))
def a_list(frame):
    return [1]
def huge(frame):
    return frame.assign(odd=[2**70] + [1] * (len(frame) - 1))
def half(frame):
    return frame.assign(odd="\\ud800")
def cased(frame):
    return frame.assign(X=1.0)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    return "my_features"


def test_features_by_a_function(functions: str, tmp_path: Path) -> None:
    result = prepare(tmp_path, table(), **TIME, features=f"{functions}:ratio")
    assert "ratio" in info(tmp_path, result).features
    stage = PrepareData(
        snapshot=str(tmp_path / "snapshot.parquet"), target="y", features=f"{functions}:ratio"
    )
    before = cache_key(stage, RunInfo.local(tmp_path))
    with (tmp_path / "my_features.py").open("a") as file:
        file.write("# changed\n")
    assert cache_key(stage, RunInfo.local(tmp_path)) != before


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("standardised", BadInput, "look into the future: column 'x'"),
        ("broken", BadInput, "raised KeyError: 'absent'"),
        ("doubled", BadConfiguration, "the column 'x' twice"),
        ("mixed", BadInput, "such as one of mixed types: .*column odd"),
        ("huge", BadInput, "a column that Parquet cannot hold"),
        ("half", BadInput, "a column that Parquet cannot hold"),
        ("cased", BadConfiguration, "the column 'X' twice, also where capitals count for nothing"),
        ("a_list", BadConfiguration, "returned list, expected a pandas DataFrame"),
        ("ration", BadConfiguration, "did you mean 'ratio'"),
    ],
)
def test_functions_that_cannot_work(
    functions: str, tmp_path: Path, name: str, kind: type[LeptonError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        prepare(tmp_path, table(), **TIME, features=f"{functions}:{name}")


def test_types_become_those_that_every_framework_knows(tmp_path: Path) -> None:
    features = """
        SELECT * EXCLUDE (y), y = 1 AS y, x > 0 AS flag, x::DECIMAL(10, 2) AS price, kind::ENUM('a', 'b', 'ü c') AS level,
            CASE WHEN x > 0 THEN machine END AS "some whole number" FROM snapshot"""
    result = prepare(tmp_path, table(), split="random", features=features, drop=["t"])
    rows = splits(tmp_path, result)["train"]
    assert rows.dtypes.astype(str).to_dict() == {
        "machine": "int64", "x": "float64", "kind": "object", "y": "int8", "flag": "int8", "price": "float64",
        "level": "object", "some whole number": "float64",
    }  # fmt: skip
    assert info(tmp_path, result).classes == [0, 1]


def test_carried_columns_are_kept_and_are_no_features(tmp_path: Path) -> None:
    result = prepare(tmp_path, table(), **TIME, carry_columns=["kind", "machine"])
    described = info(tmp_path, result, "test")
    assert (described.features, described.carried, described.categorical) == (
        ["x"],
        ["machine", "kind"],
        ["kind"],
    )
    assert set(splits(tmp_path, result)["test"]) == set(table())
    assert set(profile(tmp_path, result)["columns"]) == {"x", "y"}
    assert result.summary.startswith("1 features (2 more carried for other models) to predict 'y'")


TEXT = "SELECT * REPLACE (CASE WHEN y = 1 THEN 'good' ELSE 'bad' END AS y) FROM snapshot"
DIGITS = "SELECT * REPLACE (y::INT::VARCHAR AS y) FROM snapshot"
FLAG = "SELECT * REPLACE (y = 1 AS y) FROM snapshot"


@pytest.mark.parametrize(
    ("features", "stated", "classes", "said"),
    [
        (TEXT, None, ["bad", "good"], "classification, positive class by order: 'good'"),
        (TEXT, "bad", ["good", "bad"], "classification, positive class: 'bad'"),
        (TEXT, "good", ["bad", "good"], "classification, positive class: 'good'"),
        (None, 0, [1, 0], "classification, positive class: 0"),
        (None, "0.0", [1, 0], "classification, positive class: 0"),
        (None, " 1 ", [0, 1], "classification, positive class: 1"),
        (FLAG, False, [1, 0], "classification, positive class: 0 (false)"),
        (FLAG, True, [0, 1], "classification, positive class: 1 (true)"),
        (FLAG, "False", [1, 0], "classification, positive class: 0 (false)"),
        (FLAG, "true", [0, 1], "classification, positive class: 1 (true)"),
        (FLAG, "1", [0, 1], "classification, positive class: 1 (true)"),
        (FLAG, None, [0, 1], "classification, positive class by order: 1 (true)"),
        (DIGITS, "1", ["0", "1"], "classification, positive class: '1'"),
    ],
)
def test_the_positive_class_is_the_second_and_is_said(
    tmp_path: Path, features: str | None, stated: Any, classes: list[Any], said: str
) -> None:
    options = {"features": features, "drop": ["t"], **RANDOM}
    result = prepare(tmp_path, table(), positive_class=stated, **options)
    described = info(tmp_path, result, "test")
    assert (described.classes, described.positive_class) == (classes, classes[1])
    assert f"to predict 'y' ({said}); rows:" in result.summary
    assert profile(tmp_path, result)["positive_class"] == classes[1]
    # It moves no row, so the splits stay those of a run with another one.
    assert described.split_id == info(tmp_path, prepare(tmp_path, table(), **options)).split_id


def test_sql_reads_nothing_but_the_snapshot(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    with pytest.raises(BadConfiguration, match="features may read only the table snapshot"):
        prepare(
            tmp_path, table(), **TIME, features=f"SELECT * FROM snapshot, read_csv('{tmp_path}/secret.csv')"
        )


def test_window_and_parameters_are_bound(tmp_path: Path) -> None:
    window = Window("2024-01-03T00:00:00+00:00", "2024-01-09T00:00:00+00:00")
    features = "SELECT * FROM snapshot WHERE t >= $window_start AND t < $window_end AND kind = $kind"
    result = prepare(tmp_path, table(), **TIME, features=features, parameters={"kind": "ü c"}, window=window)
    rows = pd.concat(splits(tmp_path, result).values())
    assert set(rows.kind) == {"ü c"}
    assert rows.t.min() >= pd.Timestamp("2024-01-03")


# -- leaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "task"),
    [
        ("SELECT *, y AS label FROM snapshot", None),
        ("SELECT *, CASE y WHEN 1 THEN 'yes' ELSE 'no' END AS label FROM snapshot", None),
        ("SELECT * REPLACE (x AS y), x * 1.8 + 32 AS label FROM snapshot", "regression"),
    ],
)
def test_the_target_under_another_name_is_refused(tmp_path: Path, features: str, task: Any) -> None:
    features = features.replace("SELECT * REPLACE (x AS y)", "SELECT t, kind, x AS y")
    with pytest.raises(BadInput, match=r"feature 'label' tells the target 'y' (exactly|in a straight line)"):
        prepare(tmp_path, table(), **TIME, features=features, task=task)


def test_a_perfect_separation_by_one_number_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tmp_path, table(), **TIME, features="SELECT * REPLACE (x > 0.5 AS y) FROM snapshot")
    assert "feature 'x' separates the classes perfectly" in caplog.text


# -- profile ----------------------------------------------------------------------------------------------------------


def test_the_profile_counts_what_is_in_train(tmp_path: Path) -> None:
    data = table(5000)
    data["rain"] = np.where(data.x > 1.0, data.x, 0.0)
    data["constant"] = 3
    data.loc[:99, "x"] = np.nan
    data["many"] = [f"category {i % 700}" for i in range(5000)]
    data["void"] = np.full(5000, np.nan)
    result = prepare(tmp_path, data, **TIME)
    train, found = splits(tmp_path, result)["train"], profile(tmp_path, result)
    assert (found["profile"], found["rows"]) == (1, len(train))
    assert list(found["columns"]) == [*info(tmp_path, result).features, "y"]
    x = found["columns"]["x"]
    assert (x["count"], x["nulls"]) == (train.x.notna().sum(), train.x.isna().sum())
    for key, value in (
        ("mean", train.x.mean()),
        ("std", train.x.std()),
        ("min", train.x.min()),
        ("max", train.x.max()),
    ):
        assert x[key] == pytest.approx(value)
    assert x["quantiles"] == pytest.approx(np.nanquantile(train.x, np.arange(11) / 10, method="inverted_cdf"))
    bins = pd.cut(train.x, [-np.inf, *x["edges"], np.inf]).value_counts(sort=False)
    assert x["counts"] == bins.tolist()
    rain = found["columns"]["rain"]
    assert rain["counts"][:2] == [0, (train.rain == 0).sum()]  # "no rain" has a bin of its own
    assert found["columns"]["constant"]["counts"] == [0, len(train), 0]
    assert found["columns"]["void"]["counts"] == []
    many = found["columns"]["many"]
    assert (many["distinct"], len(many["top"])) == (train.many.nunique(), 100)
    assert sum(n for _, n in many["top"]) + many["rest"] == len(train)
    assert dict(found["columns"]["y"]["top"]) == {str(k): v for k, v in train.y.value_counts().items()}


@pytest.mark.parametrize(
    ("target", "task", "named"),
    [
        ("y::DOUBLE", None, True),
        ("y::DOUBLE", "regression", False),
        ("y + 0.5", None, False),
        ("x", None, False),
    ],
)
def test_classes_that_are_written_as_fractions_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str, task: str | None, named: bool
) -> None:
    features = f"SELECT * REPLACE (({target})::DOUBLE AS y) FROM snapshot"
    prepare(tmp_path, table(), **TIME, features=features, task=task, leak_check=False)
    assert ("target 'y' holds about 2 whole numbers and is DOUBLE" in caplog.text) is named


def test_the_index_of_a_dataframe_is_named_among_the_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shuffled = table().drop(columns="t").sample(frac=1, random_state=0)
    shuffled.to_parquet(tmp_path / "s.parquet")
    for drop, named in ([], True), (["__index_level_0__"], False):
        caplog.clear()
        PrepareData(snapshot=str(tmp_path / "s.parquet"), target="y", **RANDOM, drop=drop).run(
            RunInfo.local(tmp_path)
        )
        assert ("feature '__index_level_0__' is the index of a DataFrame" in caplog.text) is named


def test_a_hundred_thousand_categories_pass_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = 130_000
    data = pd.DataFrame(
        {"y": np.arange(rows) % 2, "x": np.arange(rows) % 97, "who": [f"user {i}" for i in range(rows)]}
    )
    result = prepare(tmp_path, data, **RANDOM)
    assert "feature 'who' has about" in caplog.text
    assert RunInfo.local(tmp_path).fetch(result.artifacts["profile"].uri).stat().st_size < 20_000


# -- refusals ---------------------------------------------------------------------------------------------------------

NOT_THERE = "is not among the features' columns"
REFUSALS: list[tuple[dict[str, Any], type[LeptonError], str]] = [
    ({"target": "yy"}, BadConfiguration, f"target: column 'yy' {NOT_THERE}; did you mean 'y'"),
    ({"time_column": "time"}, BadConfiguration, f"time_column: column 'time' {NOT_THERE}"),
    ({"time_column": None}, BadConfiguration, "split='time' needs time_column"),
    ({"time_column": "machine"}, BadConfiguration, "time_column 'machine' is BIGINT, expected a date"),
    ({"cluster_column": "day"}, BadConfiguration, f"cluster_column: column 'day' {NOT_THERE}"),
    ({"id_columns": ["kinds"]}, BadConfiguration, "did you mean 'kind'"),
    ({"drop": ["kinds"]}, BadConfiguration, "drop: column 'kinds' is not there; did you mean 'kind'"),
    ({"split": "group"}, BadConfiguration, "split='group' needs cluster_column"),
    ({"split": "random", "cluster_column": "machine"}, BadConfiguration, "would tear the clusters of 'machine' apart"),
    ({"split": "random", "test_start": "2024-01-05"}, BadConfiguration, "belong to split='time'"),
    ({"split": "random", "time_column": None}, BadConfiguration, "feature 't' is TIMESTAMP"),
    ({"valid_fraction": 1.0}, BadConfiguration, "valid_fraction=1.0: expected a share"),
    ({"test_start": "soon"}, BadConfiguration, "test_start='soon' is not a time"),
    ({"test_start": "window_start"}, BadConfiguration, "test_start='window_start', and this run has no window"),
    ({"test_start": "2030-01-01"}, BadInput, "split 'test' has no row: 1000 rows .times 2024-01-01.* went to train, valid"),
    ({"test_start": "2020-01-01"}, BadInput, "split 'train' has no row"),
    ({"test_start": "2024-01-03", "valid_start": "2024-01-04"}, BadConfiguration, "does not lie before the start of test"),
    ({"features": "SELECT * FROM snapshot WHERE x > 99"}, BadInput, "features gives no row"),
    ({"features": "SELECT t, y FROM snapshot"}, BadConfiguration, "no feature is left"),
    ({"features": "SELECT *, x AS X FROM snapshot"}, BadConfiguration, "features gives the column 'X' twice"),
    ({"features": "SELECT *, [x] AS xs FROM snapshot"}, BadConfiguration, r"feature 'xs' is DOUBLE\[\]: expected a number"),
    ({"features": "SELECT *, 1 AS __split FROM snapshot"}, BadConfiguration, "a name that the splits use"),
    ({"features": "SELECT z FROM snapshot"}, BadConfiguration, r"\"z\" not found.*snapshot\(t, machine, x, kind, y\)"),
    ({"features": "SELECT * FROM snapshots"}, BadConfiguration, "Table with name snapshots does not exist"),
    ({"features": "DROP VIEW snapshot"}, BadConfiguration, "features must be one SELECT, and is DROP"),
    ({"features": "SELECT * FROM snapshot WHERE x > $low"}, BadConfiguration, r"features uses \$low"),
    ({"features": "SELECT * REPLACE (NULL::INTEGER AS y) FROM snapshot"}, BadInput, "target 'y' is missing in all 1000 rows"),
    ({"features": "SELECT * REPLACE (CASE WHEN x > 1 THEN y END AS y) FROM snapshot"}, BadInput, "missing in .* of 1000 rows: leave"),
    ({"features": "SELECT * REPLACE (1 AS y) FROM snapshot"}, BadInput, "target 'y' has only the class 1 in train"),
    ({"features": "SELECT * REPLACE (CASE WHEN x > 1 THEN 'nan'::DOUBLE ELSE x END AS y) FROM snapshot"}, BadInput, "is NaN in"),
    ({"features": "SELECT * REPLACE (CASE WHEN x > 1 THEN '-inf'::DOUBLE ELSE x END AS y) FROM snapshot"}, BadInput, "infinite in"),
    ({"features": "SELECT * REPLACE ('inf'::DOUBLE AS x) FROM snapshot"}, BadInput, "feature 'x' is infinite in 1000 rows"),
    ({"features": "SELECT * REPLACE (t AS y), t FROM snapshot"}, BadConfiguration, "twice"),
    ({"features": "SELECT * EXCLUDE y, t::TIMESTAMP AS y FROM snapshot"}, BadConfiguration, "target 'y' is TIMESTAMP"),
    ({"features": "SELECT * EXCLUDE y, kind AS y FROM snapshot", "task": "regression"}, BadConfiguration, "is text, which"),
    ({"features": "SELECT * REPLACE (x AS y) FROM snapshot", "task": "classification"}, BadConfiguration, "does not take as a class"),
    ({"features": "SELECT * REPLACE (NULL::TIMESTAMP AS t) FROM snapshot"}, BadInput, "column 't' is missing in 1000 rows"),
    ({"features": "SELECT * REPLACE (CASE WHEN t > '2024-01-10' THEN 2 ELSE y END AS y) FROM snapshot"}, BadInput,
     "class 2 of target 'y' occurs in test and not in train"),
    ({"features": "SELECT * REPLACE (md5(x::TEXT) AS y) FROM snapshot", "test_fraction": 0, "valid_fraction": 0,
      "drop": ["x"]}, BadInput, "more than 1000 classes"),
    ({"carry_columns": ["tail"]}, BadConfiguration, "carry_columns: column 'tail' is not among"),
    ({"carry_columns": ["machine"], "id_columns": ["machine"]}, BadConfiguration, "'machine' is in id_columns already"),
    ({"carry_columns": ["u"], "features": "SELECT *, t AS u FROM snapshot"}, BadConfiguration, "carried column 'u' is TIMESTAMP"),
    ({"features": TEXT, "positive_class": "Bad"}, BadConfiguration,
     "positive_class='Bad': target 'y' has the 2 classes 'bad', 'good', and the positive class is not one of them; did you mean 'bad'[?]$"),
    ({"positive_class": "2"}, BadConfiguration, "positive_class='2': target 'y' has the 2 classes 0, 1, and the positive class is not one of them.$"),
    ({"drop": ["x"], "carry_columns": ["x"]}, BadConfiguration,
     "carry_columns: column 'x' is in drop, so it is not there: take it out of drop, as carry_columns alone keeps it from the features"),
    ({"drop": ["machine"], "id_columns": ["machine"]}, BadConfiguration, "id_columns: column 'machine' is in drop"),
    ({"drop": ["y"]}, BadConfiguration, "target: column 'y' is in drop"),
    ({"positive_class": "nan"}, BadConfiguration, "positive_class='nan': target 'y' has the 2 classes 0, 1, and"),
    ({"features": "SELECT * REPLACE (y + 1 AS y) FROM snapshot", "positive_class": True}, BadConfiguration, "2 classes 1, 2, and"),
    ({"features": "SELECT * REPLACE (kind AS y) FROM snapshot", "positive_class": "a", "drop": ["kind"]}, BadConfiguration,
     "3 classes 'a', 'b', 'ü c', and the positive class can be stated for two classes only"),
    ({"features": "SELECT * REPLACE (x AS y) FROM snapshot", "drop": ["x"], "positive_class": 1}, BadConfiguration,
     "positive_class=1: target 'y' is a number to predict, without classes"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "kind", "message"), REFUSALS)
def test_what_cannot_work_gets_one_sentence(
    tmp_path: Path, parameters: dict[str, Any], kind: type[LeptonError], message: str
) -> None:
    rows = 1200 if "md5" in parameters.get("features", "") else 1000
    with pytest.raises(kind, match=message) as caught:
        prepare(tmp_path, table(rows), **(TIME | parameters))
    assert "\n" not in str(caught.value)
    assert RunInfo.local(tmp_path).store.keys("artifacts") == []


def test_rows_without_a_target_can_be_left_out(tmp_path: Path) -> None:
    features = "SELECT * REPLACE (CASE WHEN x < 1 THEN y END AS y) FROM snapshot"
    result = prepare(tmp_path, table(), **TIME, features=features, drop_missing_target=True)
    assert result.metrics["rows_without_target"] == (table().x >= 1).sum()
    assert sum(map(len, splits(tmp_path, result).values())) == (table().x < 1).sum()


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "s.csv").write_text("t,y\n2024-01-01,1\n")
    for name, said in (
        ("cut.parquet", "cannot be read as Parquet"),
        ("s.csv", "is no Parquet file: land it with"),
    ):
        with pytest.raises(BadInput, match=f"{name} {said}"):
            prepare(tmp_path, str(tmp_path / name), **TIME)


def test_memory_is_bounded_for_sql(tmp_path: Path) -> None:
    source = tmp_path / "large.parquet"
    duckdb.sql(
        "COPY (SELECT i AS id, TIMESTAMP '2024-01-01' + to_seconds((hash(i) & 1048575)::BIGINT) AS t, md5(i::TEXT) AS who, "
        f"hash(i, 1) / 1e19 AS x, hash(i, 2) % 2 AS y FROM range(600_000) r(i)) TO '{source}' (FORMAT parquet)"
    )
    with pytest.raises(BadConfiguration, match="Raise memory_limit_mb"):
        prepare(tmp_path, str(source), **TIME, memory_limit_mb=20)
    result = prepare(tmp_path, str(source), **TIME, id_columns=["id", "who"], memory_limit_mb=64)
    assert result.metrics["rows_train"] == pytest.approx(384_000, rel=0.01)


# -- targets that look ahead ------------------------------------------------------------------------------------------

NEXT_HOUR = (
    "SELECT *, lag(load) OVER (ORDER BY t) AS before, lead(load, 3) OVER (ORDER BY t) AS coming FROM snapshot"
)
LOAD: dict[str, Any] = {"time_column": "t", "target": "coming", "task": "regression", "features": NEXT_HOUR}
BOUGHT = """
    SELECT cutoff, customer, count(*) FILTER (bought_at < cutoff) AS bought, bool_or(bought_at >= cutoff AND bought_at < cutoff + INTERVAL 30 DAY) AS again
    FROM snapshot, (SELECT unnest(generate_series((SELECT min(bought_at)::DATE FROM snapshot) + INTERVAL 7 DAY,
                                                  (SELECT max(bought_at) FROM snapshot){until}, INTERVAL 7 DAY)) AS cutoff)
    GROUP BY cutoff, customer HAVING min(bought_at) < cutoff
"""
AGAIN: dict[str, Any] = {
    "target": "again", "time_column": "cutoff", "snapshot_time_column": "bought_at", "id_columns": ["customer"],
}  # fmt: skip


def load(hours: int = 400) -> pd.DataFrame:
    times = pd.date_range("2024-01-01", periods=hours, freq="h")
    wave = np.sin(np.arange(hours) / 4) + np.random.default_rng(0).normal(size=hours)
    return pd.DataFrame({"t": times, "load": wave})


def purchases(rows: int = 900) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    days = rng.integers(0, 365, rows) + rng.random(rows)
    return pd.DataFrame(
        {"bought_at": pd.Timestamp("2024-01-01") + pd.to_timedelta(days, unit="D"), "customer": rng.integers(0, 40, rows)}
    ).assign(bought_at=lambda frame: frame.bought_at.dt.round("s"))  # fmt: skip


def test_a_target_that_looks_ahead_leaves_a_gap_and_its_unknown_labels_out(tmp_path: Path) -> None:
    result = prepare(tmp_path, load(), **LOAD, label_horizon="3 hours")
    parts = splits(tmp_path, result)
    hour = pd.Timedelta(hours=1)
    assert parts["valid"].t.min() - parts["train"].t.max() == 4 * hour
    assert parts["test"].t.min() - parts["valid"].t.max() == 4 * hour
    assert load().t.max() - parts["test"].t.max() == 3 * hour  # its label is the last load there is
    found = result.metrics
    assert (found["rows_label_unknown"], found["rows_in_gaps"], found["rows_without_target"]) == (3, 6, 0)
    assert (
        "3 whose label is not known yet left out; 6 left out whose label reaches into the next"
        in result.summary
    )
    train = info(tmp_path, result)
    assert train.label_horizon_s == 3 * 3600
    assert train.labels_until == (parts["train"].t.max() + 3 * hour).isoformat() + "+00:00"


def test_the_label_of_a_day_looks_from_its_end(tmp_path: Path) -> None:
    days = pd.DataFrame(
        {"t": pd.date_range("2024-01-01", periods=40).date, "load": np.sin(np.arange(40) ** 2)}
    )
    features = "SELECT *, lead(load, 2) OVER (ORDER BY t) AS coming, hash(load) % 7 AS x FROM snapshot"
    result = prepare(tmp_path, days, **(LOAD | {"features": features}), label_horizon="2 days")
    last = splits(tmp_path, result)["train"].t.max()
    span = info(tmp_path, result).span
    assert span == ["2024-01-01", f"{last + pd.Timedelta(days=2)}T23:59:59.999999+00:00"]


def test_a_label_horizon_beside_names_and_ids_of_any_kind(tmp_path: Path) -> None:
    data = load().rename(columns={"t": "n"}).assign(k=[None if i % 5 == 0 else i for i in range(400)])
    features = NEXT_HOUR.replace("ORDER BY t", "ORDER BY n")
    fields = LOAD | {"time_column": "n", "features": features, "id_columns": ["k"]}
    result = prepare(tmp_path, data, **fields, label_horizon="3 hours")
    assert result.metrics["rows_label_unknown"] == 3


def test_the_rows_before_a_cut_are_all_that_a_qualified_name_reads(tmp_path: Path) -> None:
    features = NEXT_HOUR.replace("lag(load)", "lead(load)").replace("FROM snapshot", "FROM temp.snapshot")
    with pytest.raises(BadInput, match="features look into the future: column 'before'"):
        prepare(tmp_path, load(), **(LOAD | {"features": features}), label_horizon="3 hours")


def test_columns_that_differ_by_case_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has the columns 'x' and 'X', which SQL does not tell apart"):
        prepare(tmp_path, table().assign(X=1.0), **TIME)


def test_a_grid_of_cut_offs_raises_no_alarm(tmp_path: Path) -> None:
    """Whether a customer buys again within 30 days, asked every week: rows at the end have a label that looks known."""
    data = purchases()
    last = data.bought_at.max()
    counts = []
    for until in ("", " - INTERVAL 30 DAY"):  # the query leaves the last month to us, or leaves it out itself
        features = BOUGHT.format(until=until)
        result = prepare(tmp_path, data, **AGAIN, features=features, label_horizon="30 days")
        parts = splits(tmp_path, result)
        assert last - parts["test"].cutoff.max() >= pd.Timedelta(days=30)
        assert parts["valid"].cutoff.min() - parts["train"].cutoff.max() > pd.Timedelta(days=30)
        counts.append((len(parts["train"]), len(parts["valid"]), len(parts["test"])))
    assert counts[0] == counts[1]
    later = prepare(
        tmp_path, data, **AGAIN, features=BOUGHT.format(until=""), label_horizon="30 days", complete_until="2025-02-01"
    )  # fmt: skip
    assert later.metrics["rows_label_unknown"] == 0
    window = Window("2024-12-01T00:00:00+00:00", "2024-12-15T00:00:00+00:00")
    by_window = prepare(
        tmp_path, data, **AGAIN, features=BOUGHT.format(until=""), label_horizon="30 days", complete_until="window_end",
        window=window,
    )  # fmt: skip
    assert splits(tmp_path, by_window)["test"].cutoff.max() <= pd.Timestamp("2024-11-15")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "target 'coming' is missing in 3 of 400 rows: .* where it looks ahead, say how far in label_horizon"),
        ({"drop_missing_target": True}, r"target 'coming' looks ahead: before .* say how far in label_horizon, such as '30 days'\."),
        ({"label_horizon": "2 hours", "drop_missing_target": True}, "the target looks further ahead than label_horizon='2 hours': target 'coming' before"),
        ({"label_horizon": "3 hours", "features": NEXT_HOUR.replace("lag(load)", "lead(load)")},
         "features look into the future: column 'before'"),
        ({"label_horizon": "3 hours", "features": NEXT_HOUR.replace("lag(load)", "lead(load, 9)")},
         "features look into the future: column 'before'"),
        ({"features": NEXT_HOUR + " QUALIFY coming IS NOT NULL"},
         "look into the future: the number of rows before .* where the target looks ahead, say how far in label_horizon"),
        ({"label_horizon": "1 month"}, "label_horizon='1 month': a month has no fixed length"),
        ({"label_horizon": "soon"}, "label_horizon='soon': expected a length of time such as"),
        ({"label_horizon": "-1 hour"}, "label_horizon='-1 hour': expected a length"),
        ({"label_horizon": "30 days"}, "no label of the 400 rows is known yet, since the data end at 2024-01-17 15:00"),
        ({"label_horizon": "6 days"}, "split '.*' has no row: .* label_horizon leaves out the rows of the 6 days before a cut"),
        ({"complete_until": "2024-01-02"}, "complete_until='2024-01-02' needs label_horizon"),
        ({"label_horizon": "3 hours", "complete_until": "soon"}, "complete_until='soon' is not a time"),
        ({"label_horizon": "3 hours", "target": None, "task": None}, "label_horizon='3 hours' needs target and time_column"),
        ({"label_horizon": "3 hours", "snapshot_time_column": "T2"}, "snapshot_time_column: the snapshot has no date or timestamp"),
    ],
)  # fmt: skip
def test_who_looks_ahead_without_leave_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((BadInput, BadConfiguration), match=message):
        prepare(tmp_path, load(), **(LOAD | changes))


# -- clusters that are known, rows without labels, ids -----------------------------------------------------------------


def test_later_rows_of_known_clusters(tmp_path: Path) -> None:
    """Customers by month: the question is next month's bill of the same customers."""
    months = pd.date_range("2024-01-01", periods=12, freq="MS")
    panel = pd.DataFrame({"customer": np.repeat(range(30), 12), "month": np.tile(months, 30)})
    panel = panel.assign(x=np.random.default_rng(0).normal(size=360), y=lambda f: (f.x > 0).astype(int))
    fields: dict[str, Any] = {"time_column": "month", "cluster_column": "customer", "leak_check": False}
    with pytest.raises(
        BadInput, match=r"next month of its customers.*set known_clusters=true; if it will meet new"
    ):
        prepare(tmp_path, panel, **fields)
    result = prepare(tmp_path, panel, **fields, known_clusters=True)
    parts = splits(tmp_path, result)
    assert [part.month.nunique() for part in parts.values()] == [7, 2, 3]
    assert all(part.customer.nunique() == 30 for part in parts.values())
    assert "later rows of known customer are predicted" in result.summary
    assert (info(tmp_path, result).known_clusters, info(tmp_path, result).cluster_column) == (
        True,
        "customer",
    )
    for changes in ({"split": "group"}, {"cluster_column": None}):
        with pytest.raises(
            BadConfiguration, match="known_clusters=true needs split='time' and cluster_column"
        ):
            prepare(tmp_path, panel, **(fields | changes), known_clusters=True)


def test_rows_without_labels_are_prepared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = table().drop(columns="y")
    for split in (
        TIME,
        RANDOM | {"time_column": "t"},
        {"split": "group", "cluster_column": "machine", "time_column": "t"},
    ):
        result = prepare(tmp_path, data, **split, target=None, test_fraction=1.0)
        assert set(result.artifacts) == {"test"}
        rows = info(tmp_path, result, "test")
        assert (rows.rows, rows.target, rows.task, rows.classes) == (1000, None, None, [])
        assert "no target, to predict or to watch; rows: 1000 test." in result.summary
    with pytest.raises(BadConfiguration, match="task='regression' needs target"):
        prepare(tmp_path, data, **TIME, target=None, task="regression")
    labelled = prepare(tmp_path, table(), **TIME, test_fraction=1.0)
    assert info(tmp_path, labelled, "test").classes == [0, 1]
    assert "missing in every row of train" not in caplog.text  # there is no train


def test_equal_rows_in_an_equal_division_are_one_division_in_any_window(tmp_path: Path) -> None:
    ids = set()
    for day in ("03", "08"):
        window = Window(f"2024-01-{day}T00:00:00+00:00", "2024-02-01T00:00:00+00:00")
        ids.add(info(tmp_path, prepare(tmp_path, table(), **TIME, window=window)).split_id)
    assert len(ids) == 1


def test_a_random_split_by_id_stays_when_the_features_change(tmp_path: Path) -> None:
    data = table().assign(number=range(1000))

    def test_rows(**fields: Any) -> set[int]:
        result = prepare(tmp_path, data, **RANDOM, id_columns=["t", "number"], **fields)
        return set(splits(tmp_path, result)["test"].number)

    assert test_rows() == test_rows(features="SELECT * EXCLUDE kind, -x AS w FROM snapshot ORDER BY x")
    assert test_rows() != test_rows(seed=1)


@pytest.mark.parametrize("kind", ["DECIMAL(38,0)", "HUGEINT"])
def test_long_ids_and_clusters_are_not_rounded(tmp_path: Path, kind: str) -> None:
    features = (
        f"SELECT * REPLACE (({10**25} + id)::{kind} AS id), ({10**25} + id // 10)::{kind} AS c FROM snapshot"
    )
    frame = pd.DataFrame({"id": range(200), "x": [i * 7 % 13 for i in range(200)], "y": [0, 1] * 100})
    result = prepare(
        tmp_path, frame, features=features, target="y", split="group", cluster_column="c",
        id_columns=["id"], time_column=None,
    )  # fmt: skip
    rows = pd.concat(splits(tmp_path, result).values())
    assert set(rows.id) == {str(10**25 + i) for i in range(200)}
    assert set(rows.c) == {str(10**25 + i) for i in range(20)}
    assert all(len(part) > 0 for part in splits(tmp_path, result).values())


def test_long_ids_reach_a_function_with_all_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unchanged.py").write_text("def rows(frame):\n    return frame\n")
    monkeypatch.syspath_prepend(tmp_path)
    ids = pa.array([Decimal(10**25 + i) for i in range(200)], pa.decimal128(38, 0))
    source = pa.table({"id": ids, "x": [i * 7 % 13 for i in range(200)], "y": [0, 1] * 100})
    pq.write_table(source, tmp_path / "s.parquet")
    result = prepare(
        tmp_path, str(tmp_path / "s.parquet"), features="unchanged:rows", split="random", id_columns=["id"]
    )
    rows = pd.concat(splits(tmp_path, result).values())
    assert set(rows.id) == {str(10**25 + i) for i in range(200)}


def test_nan_is_no_cluster(tmp_path: Path) -> None:
    groups = [float(i // 10) if i % 50 else float("nan") for i in range(200)]
    source = pa.table({"g": pa.array(groups), "x": [i * 7 % 13 for i in range(200)], "y": [0, 1] * 100})
    pq.write_table(source, tmp_path / "s.parquet")
    with pytest.raises(BadInput, match="column 'g' is missing in 4 rows"):
        prepare(tmp_path, str(tmp_path / "s.parquet"), split="group", cluster_column="g")


@pytest.mark.parametrize("labels", [["{}"] * 100, ["a", "b"] * 40 + ["{}"] * 20])
def test_a_class_is_cut_in_messages(tmp_path: Path, labels: list[str]) -> None:
    frame = pd.DataFrame({"t": pd.date_range("2024", periods=100), "x": range(100)})
    frame["y"] = [label.format("Dear Ann " * 300) for label in labels]
    with pytest.raises(BadInput, match="class 'Dear Ann") as caught:
        prepare(tmp_path, frame, time_column="t")
    assert str(caught.value).count("Ann") < 10
