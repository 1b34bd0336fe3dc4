from __future__ import annotations

import gzip
import io
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request, RunIdentity, Window
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, Skipped
from lepton_airflow.execution.run_stage import run_stage
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.stages import Result, RunInfo
from lepton_airflow.stages.ingest_data import IngestData

ROOT = Path(__file__).parents[2]
MAY = Window("2013-05-01T00:00:00+00:00", "2013-06-01T00:00:00+00:00")


def ingest(tmp_path: Path, sources: Any, query: str = "SELECT * FROM s", **kwargs: Any) -> Result:
    names = ("window", "connections")
    run = RunInfo.local(tmp_path, **{k: kwargs.pop(k) for k in names if k in kwargs})
    return IngestData(sources=sources, query=query, **kwargs).run(run)


def frame(tmp_path: Path, result: Result, name: str = "snapshot") -> pd.DataFrame:
    return pd.read_parquet(RunInfo.local(tmp_path).fetch(result.artifacts[name].uri))


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def flight_sources(raw: Path) -> dict[str, Any]:
    return {
        "flights": {
            "uri": f"{raw}/flights/2013-0[2-5].csv",
            "types": {"tailnum": "VARCHAR", "arr_delay": "INTEGER"},
        },
        "weather": f"{raw}/weather/*.jsonl",
        "planes": f"{raw}/planes.parquet",
        "airports": f"{raw}/airports.csv",
        "airlines": f"{raw}/airlines.tsv",
    }


# -- what it makes ----------------------------------------------------------------------------------------------------


def test_flights_weather_and_planes_become_one_windowed_snapshot(raw_flights: Path, tmp_path: Path) -> None:
    query = (ROOT / "dags/sql/flights_snapshot.sql").read_text()
    result = ingest(tmp_path, flight_sources(raw_flights), query, window=MAY, order_by=["scheduled_at"])
    rows = frame(tmp_path, result)
    expected = duckdb.sql(
        f"SELECT count(*) FROM read_csv('{raw_flights}/flights/2013-0[2-5].csv') WHERE arr_delay IS NOT NULL"
    ).fetchall()[0][0]
    assert len(rows) == result.values["rows"] == expected
    assert rows.scheduled_at.is_monotonic_increasing
    assert rows.scheduled_at.min().month == 2
    assert rows.scheduled_at.max().month == 5
    assert rows.temp.notna().mean() > 0.9  # the join on local hours finds nearly every hour's weather
    assert (
        result.values["sources"]["planes"]["rows"]
        == pq.read_metadata(raw_flights / "planes.parquet").num_rows
    )
    assert result.values["schema"]["late"] == "BOOLEAN"
    assert "rejected" not in result.artifacts


def test_equal_inputs_give_equal_bytes_whatever_threads_memory_and_file_order(tmp_path: Path) -> None:
    rows = [f"{i},{i * 0.37 % 1!r},{'abc'[i % 3]}\n" for i in range(100_000)]
    digests = set()
    for trial, (threads, memory) in enumerate([(1, 1024), (2, 1024), (4, 256)]):
        random.Random(trial).shuffle(rows)
        folder = tmp_path / str(trial)
        for part in range(3):
            write(folder / f"{part}.csv", "id,x,g\n" + "".join(rows[part::3]))
        result = ingest(
            tmp_path / f"run{trial}",
            {"s": f"{folder}/*.csv"},
            order_by=["g"],
            threads=threads,
            memory_limit_mb=memory,
        )
        digests.add(result.artifacts["snapshot"].sha256)
    assert len(digests) == 1


def test_all_formats_compression_names_with_spaces_and_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "mein Ordner ü"
    write(folder / "a b.csv", 'id,"naïve name, x",größe\n1,"two\nlines",3.5\n2,,4\n')
    write(folder / "t.tsv.gz", gzip.compress(b"id\tcity\n1\tK\xc3\xb6ln\n2\tRiga\n"))
    write(folder / "j.ndjson", '{"id": 1, "nested": {"deep": [1, 2]}}\n\n{"id": 2, "late field": true}\n')
    result = ingest(
        tmp_path,
        {"a": f"{folder}/a b.csv", "t": [f"{folder}/t.tsv.gz"], "j": f"file://{folder}/*.ndjson"},
        "SELECT * FROM a JOIN t USING (id) JOIN j USING (id);  -- all of it\n",
    )
    rows = frame(tmp_path, result)
    assert list(rows.columns) == ["id", "naïve name, x", "größe", "city", "nested", "late field"]
    assert rows["naïve name, x"].tolist() == ["two\nlines", None]
    assert rows.city.tolist() == ["Köln", "Riga"]
    assert list(rows.nested[0]["deep"]) == [1, 2]


def test_any_fsspec_uri_and_glob(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for month in (1, 2):
        memory.pipe_file(f"/ingest-test/{month}.csv", f"m,v\n{month},{month * 10}\n".encode())
    result = ingest(tmp_path, {"s": "memory://ingest-test/*.csv"})
    assert frame(tmp_path, result).v.tolist() == [10, 20]


def test_window_and_parameters_are_bound_not_pasted(tmp_path: Path) -> None:
    source = write(tmp_path / "s.csv", "t,who\n2013-04-30,o'brien\n2013-05-01,o'brien\n2013-05-02,x\n")
    result = ingest(
        tmp_path,
        {"s": source},
        "SELECT * FROM s WHERE t >= $window_start AND t < $window_end AND who = $who",
        window=MAY,
        parameters={"who": "o'brien", "unused": 1},
    )
    assert result.values["rows"] == 1


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_times_as_pandas_writes_them_are_compared_with_the_window(tmp_path: Path, zone: str | None) -> None:
    times = pd.Series(pd.date_range("2013-04-30 12:00", "2013-06-01 12:00", freq="12h")).dt.tz_localize(
        zone and "UTC"
    )
    units = ("s", "ms", "us", "ns")
    written = pd.DataFrame(
        {
            unit: times.dt.as_unit(unit).dt.tz_convert(zone) if zone else times.dt.as_unit(unit)
            for unit in units
        }
    )
    written["day"] = times.dt.date
    written.to_parquet(tmp_path / "s.parquet")
    within = " AND ".join(f"{c} >= $window_start AND {c} < $window_end" for c in written)
    result = ingest(
        tmp_path, {"s": str(tmp_path / "s.parquet")}, f"SELECT * FROM s WHERE {within}", window=MAY
    )
    kind = "TIMESTAMP WITH TIME ZONE" if zone else "TIMESTAMP"
    assert result.values["schema"] == dict.fromkeys(units, kind) | {"day": "DATE"}
    assert result.values["rows"] == 62
    assert frame(tmp_path, result).ns.dt.tz_localize(None).min() == pd.Timestamp("2013-05-01")


def test_finer_times_than_microseconds_are_kept(tmp_path: Path) -> None:
    fine = pd.Series(pd.date_range("2013-04-30", "2013-06-01", freq="D")) + pd.Timedelta(1, "ns")
    fine.to_frame("t").to_parquet(tmp_path / "s.parquet")
    sources = {"s": str(tmp_path / "s.parquet")}
    with pytest.raises(
        BadConfiguration, match=r"Cannot compare values of type TIMESTAMP_NS .*line 1, at 't >= "
    ):
        ingest(tmp_path, sources, "FROM s WHERE t >= $window_start", window=MAY)
    query = "FROM s WHERE t >= $window_start::TIMESTAMP AND t < $window_end::TIMESTAMP"
    rows = frame(tmp_path, ingest(tmp_path, sources, query, window=MAY))
    assert (len(rows), rows.t.min()) == (31, pd.Timestamp("2013-05-01 00:00:00.000000001"))


def test_types_do_not_depend_on_where_in_the_file_a_value_stands(tmp_path: Path) -> None:
    lines = "".join(f"{i},01/02/2013\n" for i in range(50_000))
    source = write(tmp_path / "s.csv", "n,day\n" + lines + "late text,13/02/2013\n")
    schema = ingest(tmp_path, {"s": source}).values["schema"]
    assert schema == {"n": "VARCHAR", "day": "VARCHAR"}  # a day-first date is not guessed
    stated = {"s": {"uri": source, "date_format": "%d/%m/%Y"}}
    assert ingest(tmp_path, stated).values["schema"]["day"] == "DATE"


def test_null_values_delimiter_encoding_and_union(tmp_path: Path) -> None:
    write(tmp_path / "in/1.csv", "a;b\nNA;é\n".encode("latin-1"))
    write(tmp_path / "in/2.csv", b"b;a;c\nx;2;3\n")
    spec = {
        "uri": f"{tmp_path}/in/*.csv",
        "delimiter": ";",
        "null_values": ["NA"],
        "encoding": "latin-1",
        "union": True,
    }
    rows = frame(tmp_path, ingest(tmp_path, {"s": spec}, order_by=["b"]))
    assert rows.b.tolist() == ["x", "é"]
    assert rows.a.isna().tolist() == [False, True]
    assert rows.c.isna().tolist() == [False, True]


def test_numbers_spoiled_by_a_few_texts_are_named(tmp_path: Path, caplog: Any) -> None:
    rows = "".join(f"{i},{'NA' if i == 30_000 else i / 2},x{i},n/a\n" for i in range(40_000))
    source = write(tmp_path / "s.csv", "id,delay,name,empty\n" + rows)
    result = ingest(tmp_path, {"s": source})
    assert result.values["schema"]["delay"] == "VARCHAR"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(
        "source 's': column 'delay' is text because of 'NA' among 39999 numbers: pass null_values=['NA']"
    )
    caplog.clear()
    assert (
        ingest(tmp_path, {"s": {"uri": source, "null_values": ["NA"]}}).values["schema"]["delay"] == "DOUBLE"
    )
    caplog.clear()
    ingest(tmp_path, {"s": {"uri": source, "types": {"delay": "VARCHAR"}}})
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_hundreds_of_columns_of_text_take_little_memory(tmp_path: Path) -> None:
    rows = "".join(
        ",".join("t" if (row + column) % 7 == 0 else "" for column in range(300)) + "\n"
        for row in range(3000)
    )
    source = write(tmp_path / "s.csv", ",".join(f"c{column}" for column in range(300)) + "\n" + rows)
    assert ingest(tmp_path, {"s": source}).values["rows"] == 3000


def test_a_type_that_another_run_found_otherwise_is_warned_of(tmp_path: Path, caplog: Any) -> None:
    one = write(tmp_path / "1.csv", "id,code,day\n1,F,2013-05-01\n")
    two = write(tmp_path / "2.csv", "id,code,day\nA1,T,\n")

    def warnings(task: str, source: str, **options: Any) -> list[str]:
        caplog.clear()
        run = RunInfo.local(tmp_path, identity=RunIdentity(dag_id="d", task_id=task))
        IngestData(sources={"s": {"uri": source} | options}, query="FROM s").run(run)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert warnings("a", one) == []
    assert warnings("another", two) == []
    says = "source 's': column %r is VARCHAR by its values, and was %s in the run before: state types={%r: %r} so that every run gives it the same."
    assert warnings("a", two) == [says % (c, k, c, k) for c, k in {"id": "BIGINT", "day": "DATE"}.items()]
    assert warnings("a", two) == []
    assert warnings("a", two, types={"id": "VARCHAR", "day": "DATE"}) == []


def test_columns_that_are_gone_since_the_run_before_are_warned_of(tmp_path: Path, caplog: Any) -> None:
    noted = write(tmp_path / "1.csv", "# of May\nid,code\n1,F\n")
    plain = write(tmp_path / "2.csv", "id,code\nx,F\ny,G\n")
    for source in (noted, plain):
        caplog.clear()
        run = RunInfo.local(tmp_path, identity=RunIdentity(dag_id="d", task_id="t"))
        IngestData(sources={"s": {"uri": source, "skip_lines": 1}}, query="FROM s").run(run)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("source 's': 2 columns of the run before are not there any more: id, code.")


def test_columns_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path / "in/1.csv", "a,b\n1,2\n")
    write(tmp_path / "in/2.csv", "b,a\n4,3\n")
    rows = frame(tmp_path, ingest(tmp_path, {"s": f"{tmp_path}/in/*.csv"}))
    assert rows[["a", "b"]].to_numpy().tolist() == [[1, 2], [3, 4]]


def test_the_receipt_stays_small_with_a_thousand_columns(tmp_path: Path) -> None:
    names = ",".join(f"column_number_{i}" for i in range(1000))
    result = ingest(tmp_path, {"s": write(tmp_path / "s.csv", names + "\n" + ",".join("1" * 1000) + "\n")})
    receipt = Receipt(
        "IngestData", "k", None, "done", result.summary, result.artifacts, result.values, result.metrics
    )
    assert len(receipt.to_json()) < 8192
    assert result.values["schema"]["…"].endswith(" more")
    assert len(frame(tmp_path, result).columns) == 1000


# -- rejected rows ----------------------------------------------------------------------------------------------------


def test_rejected_csv_rows_are_counted_and_kept_with_their_line(tmp_path: Path) -> None:
    good = "".join(f"{i},x,1.5\n" for i in range(100))
    bad = b"1,ragged\nabc,bad type,2.5\n5,\xff\xfe,4\n6,too,many,1\n"
    source = write(tmp_path / "raw.csv", b"a,b,c\n" + good.encode() + bad)
    spec = {"uri": source, "types": {"a": "BIGINT"}}
    result = ingest(tmp_path, {"s": spec}, max_rejected_share=0.05)
    rejected = frame(tmp_path, result, "rejected")
    assert result.values["sources"]["s"] == result.values["sources"]["s"] | {"rows": 100, "rejected": 4}
    assert sorted(set(rejected.line)) == [102, 103, 104, 105]  # the last is wrong in two ways
    assert set(rejected.source) == {"s"}
    assert all(file.endswith("raw.csv") for file in rejected.file)
    assert "abc,bad type,2.5" in rejected.raw.tolist()
    with pytest.raises(BadInput, match=r"4 of 104 rows \(3.85%\) cannot be read, at most 1.00%.*") as caught:
        ingest(tmp_path, {"s": spec})
    assert "raw.csv line 102: CELLS: 2, and the header has 3. All are kept in" in str(caught.value)
    kept = RunInfo.local(tmp_path).store.keys("artifacts")
    assert any(key.endswith("rejected.parquet") for key in kept)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("s.csv", "id,name,sum\n7,Meier,x1.5\n", "s.csv line 2, column 'sum': CAST: not exactly a DOUBLE: 'x1.5'."),
        ("s.csv", f"id,name,sum\n7,Meier,{'x' * 60}\n", f"CAST: not exactly a DOUBLE: '{'x' * 38}…."),
        ("s.csv", "id,name,sum\n7,Meier,Größe\n".encode("cp1252"), "s.csv line 2: ENCODING: no text in utf-8."),
        ("s.jsonl", '{"id": 7, "name": "Meier", "sum": "x1.5"}\n', "line 1, column 'sum': CAST: not exactly a DOUBLE: 'x1.5'."),
        ("s.jsonl", '{"id": 7, "name": "Meier", "sum": 1\n{"sum": 2}\n', "s.jsonl line 1: JSON: Expecting ',' delimiter at character 36."),
        ("s.parquet", "id,name,sum\n7,Meier,x1.5\n", "the first is a row, column 'sum': CAST: not exactly a DOUBLE: x1.5."),
    ],
)  # fmt: skip
def test_a_message_about_rejected_rows_holds_no_row(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    source = str(tmp_path / name)
    if name == "s.parquet":
        pd.read_csv(io.StringIO(str(content))).to_parquet(source)
    else:
        write(tmp_path / name, content)
    with pytest.raises(BadInput) as caught:
        ingest(tmp_path, {"s": {"uri": source, "types": {"sum": "DOUBLE"}}})
    assert said in str(caught.value)
    assert "Meier" not in str(caught.value)


def test_bad_json_lines_are_rejected_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"a": i}) for i in range(50)] + ['{"a": 2,', "[1]", '"text"']
    source = write(tmp_path / "s.jsonl", "\n".join(lines) + "\n")
    result = ingest(tmp_path, {"s": source}, max_rejected_share=0.1)
    assert result.values["sources"]["s"]["rejected"] == 3
    assert frame(tmp_path, result, "rejected").line.tolist() == [51, 52, 53]


def test_stated_types_reject_rows_of_json_and_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": ["1", "2", "x", "x"], "k": ["a", "b", "c", "c"]}), tmp_path / "s.parquet")
    spec = {"uri": str(tmp_path / "s.parquet"), "types": {"n": "INTEGER"}}
    result = ingest(tmp_path, {"s": spec}, max_rejected_share=0.5)
    assert frame(tmp_path, result).n.tolist() == [1, 2]
    assert result.values["sources"]["s"]["rejected"] == 2


# -- memory -----------------------------------------------------------------------------------------------------------

_BOUNDED = """
import resource, sys
import duckdb, pandas, pyarrow.parquet
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.ingest_data import IngestData
peak_mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak_mb()
types = {"id": "BIGINT", "x": "UBIGINT", "text": "VARCHAR"}
source = {"uri": sys.argv[1], "types": types}
stage = IngestData(sources={"s": source}, query="SELECT DISTINCT * FROM s", order_by=["x"], memory_limit_mb=128)
result = stage.run(RunInfo.local(sys.argv[2]))
print(result.values["rows"], peak_mb() - before)
"""


@pytest.mark.slow
def test_a_csv_several_times_larger_than_the_memory_limit_passes(tmp_path: Path) -> None:
    source = tmp_path / "large.csv"
    duckdb.sql(
        f"COPY (SELECT i AS id, hash(i) AS x, repeat(md5(i::TEXT), 16) AS text FROM range(720_000) r(i)) TO '{source}' (HEADER)"
    )
    assert source.stat().st_size > 3 * 128e6
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(source), str(tmp_path / "run")],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, grown_mb = done.stdout.split()
    assert int(rows) == 720_000
    # DuckDB's limit does not count its CSV buffers, PyArrow and what the allocators keep.
    assert float(grown_mb) < 128 * 2


# -- databases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S.000Z"]
)
def test_sqlite_rows_within_the_window(tmp_path: Path, form: str) -> None:
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE orders (at TEXT, amount REAL)")
        days = pd.date_range("2013-04-30", "2013-06-01", freq="D")
        db.executemany("INSERT INTO orders VALUES (?, ?)", [(day.strftime(form), None) for day in days])
    db.close()
    connections = {"shop": Connection("shop", "sqlite", host=str(tmp_path / "shop.db"))}

    def rows(sql: str, window: Window) -> int:
        source = {"connection": "shop", "sql": f"SELECT * FROM orders WHERE {sql}"}
        result = ingest(tmp_path, {"orders": source}, "FROM orders", window=window, connections=connections)
        assert result.values["sources"]["orders"]["digest"] is None
        return int(result.values["rows"])

    assert rows("at >= $window_start AND at < $window_end", MAY) == 31
    noon = Window("2013-05-01T12:00:00+00:00", "2013-05-02T14:00:00+02:00")
    with pytest.raises(BadConfiguration, match=r"compare datetime\(column\) with datetime\(\$window_start\)"):
        rows("at >= $window_start AND at < datetime($window_end)", noon)
    assert rows("datetime(at) >= datetime($window_start) AND datetime(at) < datetime($window_end)", noon) == 1


def test_postgres_rows_of_many_types_join_a_file(postgres: Any, tmp_path: Path) -> None:
    import psycopg2

    with psycopg2.connect(**postgres) as con, con.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE orders (id int, at timestamptz, amount numeric(10,2), note text, ok boolean, day date)"
        )
        cursor.execute(
            "INSERT INTO orders SELECT i, timestamptz '2013-04-30 23:00:00+00' + i * interval '1 minute', i / 4.0, "
            "CASE WHEN i % 3 = 0 THEN NULL ELSE 'note ü ' || i END, i % 2 = 0, '2013-05-01' FROM generate_series(1, 100000) i"
        )
    con.close()
    write(tmp_path / "names.csv", "id,name\n60,sixty\n61,sixty one\n")
    connections = {
        "shop_db": Connection(
            "shop_db",
            "postgres",
            postgres["host"],
            postgres["user"],
            postgres["password"],
            postgres["dbname"],
            postgres["port"],
        )
    }
    stage = IngestData(
        sources={
            "orders": {
                "connection": "shop_db",
                "sql": "SELECT * FROM orders WHERE at >= $window_start AND at < $window_end",
                "types": {"amount": "DECIMAL(10,2)"},
            },
            "names": str(tmp_path / "names.csv"),
        },
        query="SELECT * FROM orders LEFT JOIN names USING (id)",
        order_by=["id"],
    )
    run = RunInfo.local(tmp_path, window=MAY, connections=connections)
    rows = frame(tmp_path, stage.run(run))
    # From minute 60 (midnight) to the last before 1 June: 31 days of minutes.
    assert (len(rows), rows.id.min(), rows.id.max()) == (31 * 1440, 60, 31 * 1440 + 59)
    assert str(rows.amount[0]) == "15.00"
    assert rows.name[:3].tolist() == ["sixty", "sixty one", None]
    assert stage.connection_ids() == ["shop_db"]
    assert stage.input_digests(run) is None  # a live database is never taken from the cache …
    stage.sources["orders"]["version"] = "2013-06-01"
    assert set(stage.input_digests(run) or {}) == {"orders", "names"}  # … unless the user names its state


def test_a_type_of_a_database_that_parquet_lacks_gets_a_sentence(postgres: Any, tmp_path: Path) -> None:
    where = [postgres[key] for key in ("host", "user", "password", "dbname", "port")]
    with pytest.raises(
        BadInput, match=r"its table has a type that Parquet cannot hold \(.*interval.*cast it in sql"
    ):
        ingest(
            tmp_path,
            {"s": {"connection": "db", "sql": "SELECT interval '1 day' AS late"}},
            connections={"db": Connection("db", "postgres", *where)},
        )


def test_what_must_be_read_to_know_the_inputs_is_known_of_local_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunInfo.local(tmp_path).store
    one, two = write(tmp_path / "a 1.csv", "x\n1\n"), write(tmp_path / "a 2.csv", "x\n22\n")
    remote = "memory://somewhere/a.csv"
    for sources, size in (
        ({"a": one}, 4),
        ({"a": str(tmp_path / "a *.csv"), "b": [two]}, 4 + 5 + 5),
        ({"a": one, "b": remote}, None),
        ({"a": one, "b": {"connection": "shop_db", "sql": "SELECT 1 AS x"}}, None),
        ({"a": one, "b": {"format": "delta", "uri": str(tmp_path)}}, None),
        ({"a": str(tmp_path / "absent.csv")}, None),
        ({"a": "a 1.csv"}, None),  # in another working directory it is another file
    ):
        assert IngestData(sources=sources, query="SELECT 1").bytes_to_digest(store) == size, sources


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM absent",
        "SELECT 1 / 0 AS x",
        "SELECT 1 / (90000 - i) AS x FROM generate_series(1, 100000) i",  # while the rows arrive
    ],
)
def test_a_failing_database_query_shows_no_secret(
    postgres: Any, tmp_path: Path, sql: str, caplog: Any
) -> None:
    connection = Connection(
        "db",
        "postgres",
        postgres["host"],
        postgres["user"],
        postgres["password"],
        postgres["dbname"],
        postgres["port"],
    )
    with pytest.raises(
        BadInput, match=r"source 's': Connection 'db' or its sql failed: .*(absent|zero)"
    ) as caught:
        ingest(tmp_path, {"s": {"connection": "db", "sql": sql}}, connections={"db": connection})
    assert postgres["password"] not in str(caught.value) + repr(caught.value.__cause__) + caplog.text


def test_a_database_that_is_away_may_be_tried_again(tmp_path: Path, postgres: Any) -> None:
    away = Connection("db", "postgres", "127.0.0.1", "me", "hush", "shop", 9)
    with pytest.raises(LeptonError, match=r"Connection 'db' or its sql failed: .*port 9") as caught:
        ingest(tmp_path, {"s": {"connection": "db", "sql": "SELECT 1 AS x"}}, connections={"db": away})
    assert caught.value.exit_code == 1
    here = [postgres[key] for key in ("host", "user", "password", "dbname", "port")]
    with pytest.raises(LeptonError, match="administrator command") as caught:
        ingest(
            tmp_path,
            {"s": {"connection": "db", "sql": "SELECT pg_terminate_backend(pg_backend_pid())"}},
            connections={"db": Connection("db", "postgres", *here)},
        )
    assert caught.value.exit_code == 1


def test_a_wrong_password_shows_no_secret(postgres: Any, tmp_path: Path) -> None:
    secret = "p@ss/wörd:?"
    connection = Connection(
        "db", "postgres", postgres["host"], postgres["user"], secret, "postgres", postgres["port"]
    )
    with pytest.raises(BadInput, match="password authentication failed") as caught:
        ingest(tmp_path, {"s": {"connection": "db", "sql": "SELECT 1 AS x"}}, connections={"db": connection})
    assert secret not in str(caught.value)
    assert quote(secret, safe="") not in str(caught.value)


# -- cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_key_follows_the_bytes_of_the_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in/1.csv", "a\n1\n")
    stage, run = IngestData(sources={"s": f"{tmp_path}/in/*.csv"}, query="FROM s"), RunInfo.local(tmp_path)
    first = cache_key(stage, run)
    assert cache_key(stage, run) == first
    write(tmp_path / "in/2.csv", "a\n2\n")
    second = cache_key(stage, run)
    write(Path(source), "a\n3\n")
    assert len({first, second, cache_key(stage, run)}) == 3


# -- refusals: each its one sentence, and a store left as it was ------------------------------------------------------

CSV = "a,b\n1,2\n"
REFUSALS: list[tuple[dict[str, str | bytes], dict[str, Any], type[LeptonError], str]] = [
    ({}, {"sources": {"s": "absent.csv"}}, BadInput, "source 's': there is no file .*absent.csv"),
    ({}, {"sources": {"s": "*.csv"}}, BadInput, r"source 's': no file matches .*\*.csv"),
    ({"s.csv": ""}, {}, BadInput, r"s.csv is empty \(0 bytes\)"),
    ({"s.csv": "a,b,A\n1,2,3\n"}, {}, BadInput, "the column 'A' twice"),
    ({"s.csv": "a,,c\n1,2,3\n"}, {}, BadInput, "column 2 of .* has no name"),
    ({"s.csv": "a;b\n1;2\n"}, {}, BadInput, "looks separated by ';': set delimiter=';'"),
    ({"s.csv": "a,b\n"}, {}, BadInput, "the query gives no row; rows read: s 0"),
    (
        {"s.csv.gz": "not gzip"},
        {"sources": {"s": "s.csv.gz"}},
        BadInput,
        "s.csv.gz cannot be read: Not a gzipped file",
    ),
    (
        {"s.parquet": b"a,b\n1,2\n"},
        {"sources": {"s": "s.parquet"}},
        BadInput,
        "s.parquet is not a whole Parquet file .* bring it again. Of another format, state format.",
    ),
    (
        {"s.jsonl": "[\n1,\n2]\n"},
        {"sources": {"s": "s.jsonl"}},
        BadInput,
        "has no line that is a JSON object",
    ),
    (
        {"1.csv": CSV, "2.csv": "a,c\n1,2\n"},
        {"sources": {"s": "[12].csv"}},
        BadInput,
        "2.csv lacks b and also has c, compared",
    ),
    ({"s.dat": CSV}, {"sources": {"s": "s.dat"}}, BadConfiguration, "the format of s.dat is not clear"),
    ({"s.csv": CSV, "s.tsv": CSV}, {"sources": {"s": "s.*"}}, BadConfiguration, "mixes csv and tsv"),
    ({}, {"sources": {}}, BadConfiguration, "sources is empty"),
    ({}, {"sources": {"s": 3}}, BadConfiguration, "source 's' is 3: expected a URI"),
    ({}, {"sources": {"s t": "s.csv"}}, BadConfiguration, "source name 's t' is not a table name"),
    (
        {},
        {"sources": {"s": {"uri": "s.csv", "formt": "csv"}}},
        BadConfiguration,
        "no option 'formt'; did you mean 'format'",
    ),
    ({}, {"sources": {"s": {"uri": "s.csv", "format": "cvs"}}}, BadConfiguration, "did you mean 'csv'"),
    ({}, {"sources": {"s": {"sql": "SELECT 1"}}}, BadConfiguration, "has a sql and no connection"),
    (
        {},
        {"sources": {"s": {"uri": "s.csv", "types": {"a": "INT); DROP"}}}},
        BadConfiguration,
        "is not a DuckDB type",
    ),
    (
        {"s.csv": CSV},
        {"sources": {"s": {"uri": "s.csv", "types": {"A1": "INTEGER"}}}},
        BadInput,
        "types names column 'A1'",
    ),
    (
        {"s.csv": CSV},
        {"sources": {"s": {"uri": "s.csv", "types": {"a": "INTEGR"}}}},
        BadConfiguration,
        "INTEGR",
    ),
    (
        {"s.csv": CSV},
        {"query": "SELECT 1; SELECT 2"},
        BadConfiguration,
        "must be one SELECT, and is SELECT, SELECT",
    ),
    ({"s.csv": CSV}, {"query": "DELETE FROM s"}, BadConfiguration, "must be one SELECT, and is DELETE"),
    ({"s.csv": CSV}, {"query": ""}, BadConfiguration, "must be one SELECT, and is nothing"),
    ({"s.csv": CSV}, {"query": "SELEC a FROM s"}, BadConfiguration, 'syntax error at or near "SELEC"'),
    ({"s.csv": CSV}, {"query": "SELECT c FROM s"}, BadConfiguration, r"\"c\" not found.*Sources: s\(a, b\)"),
    ({"s.csv": CSV}, {"query": "SELECT a, b AS a FROM s"}, BadConfiguration, "the column 'a' twice"),
    (
        {"s.csv": CSV},
        {"query": "SELECT a FROM s WHERE a > $window_start"},
        BadConfiguration,
        "uses \\$window_start, and this run",
    ),
    (
        {"s.csv": CSV},
        {"query": "SELECT $shre AS x", "parameters": {"share": 1}},
        BadConfiguration,
        "did you mean 'share'",
    ),
    ({"s.csv": CSV}, {"query": "SELECT * FROM s WHERE a > 5"}, BadInput, "the query gives no row"),
    ({"s.csv": CSV}, {"query": "SELECT error(b::TEXT) FROM s"}, BadInput, "query: Invalid Input Error: 2"),
    ({"s.csv": CSV}, {"order_by": ["aa"]}, BadConfiguration, "order_by names 'aa'; did you mean 'a'"),
    (
        {"s.csv": "a\n1\n"},
        {"query": "SELECT INTERVAL 1 DAY AS late"},
        BadConfiguration,
        r"type that the snapshot cannot hold .*epoch\(\)",
    ),
    (
        {"s.csv": CSV},
        {"memory_limit_mb": 64},
        BadConfiguration,
        "memory_limit_mb=64: DuckDB needs at least 128",
    ),
    ({"s.csv": CSV}, {"max_rejected_share": 2.0}, BadConfiguration, "expected a share from 0 to 1"),
]


@pytest.mark.parametrize(("files", "parameters", "kind", "message"), REFUSALS)
def test_what_cannot_work_gets_one_sentence(
    tmp_path: Path,
    monkeypatch: Any,
    files: dict[str, Any],
    parameters: dict[str, Any],
    kind: type[LeptonError],
    message: str,
) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    run = RunInfo.local(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        IngestData(**({"sources": {"s": "s.csv"}, "query": "SELECT * FROM s"} | parameters)).run(run)
    assert "\n" not in str(caught.value)
    assert run.store.keys("artifacts") == []


def test_a_window_without_data_names_the_window_and_what_was_read(tmp_path: Path) -> None:
    source = write(tmp_path / "s.csv", "t\n2012-01-01\n")
    query = "SELECT * FROM s WHERE t >= $window_start"
    with pytest.raises(BadInput, match=r"no row for the window 2013-05-01.* to 2013-06-01.*; rows read: s 1"):
        ingest(tmp_path, {"s": source}, query, window=MAY)
    assert ingest(tmp_path, {"s": source}, query, window=MAY, on_empty="keep").values["rows"] == 0


def test_a_month_without_data_can_be_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "s.csv", "t\n2012-01-01\n")
    query = "SELECT * FROM s WHERE t >= $window_start"
    with pytest.raises(Skipped, match=r"the query gives no row for the window 2013-05.*; rows read: s 1\.$"):
        ingest(tmp_path, {"s": source}, query, window=MAY, on_empty="skip")
    absent = {"s": f"{tmp_path}/2013-05/*.csv"}
    with pytest.raises(Skipped, match=r"no file matches .*2013-05"):
        ingest(tmp_path, absent, on_empty="skip")
    request = Request(
        "IngestData", {"sources": absent, "query": "FROM s", "on_empty": "skip"}, str(tmp_path / "store")
    )
    assert run_stage(request).status == "skipped"  # the files are looked for before the stage itself runs
    with pytest.raises(BadInput, match="no file matches"):
        ingest(tmp_path, absent, on_empty="keep")


def test_a_truncated_parquet_file_is_refused(raw_flights: Path, tmp_path: Path) -> None:
    whole = (raw_flights / "planes.parquet").read_bytes()
    write(tmp_path / "cut.parquet", whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"cut.parquet is not a whole Parquet file .*bring it again"):
        ingest(tmp_path, {"s": str(tmp_path / "cut.parquet")})


def test_parquet_with_doubled_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "s.parquet"
    )
    with pytest.raises(BadInput, match="has the column 'a' twice"):
        ingest(tmp_path, {"s": str(tmp_path / "s.parquet")})


@pytest.mark.parametrize(
    "steal",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM s WHERE a = (SELECT content FROM read_text('{secret}'))",
        "SELECT * FROM read_text('{landed}/../../../secret.csv')",
        "SELECT * FROM secret_frame",
    ],
)
def test_the_query_reads_nothing_but_its_sources(tmp_path: Path, steal: str) -> None:
    secret = write(tmp_path / "elsewhere/secret.csv", "password\nhunter2\n")
    secret_frame = pd.DataFrame({"password": ["hunter2"]})  # DuckDB would find it by its name
    source = write(tmp_path / "in/s.csv", CSV)
    query = steal.format(secret=secret, folder=tmp_path / "elsewhere", landed=tmp_path / "run/work/landed")
    with pytest.raises((BadConfiguration, BadInput)) as caught:
        ingest(tmp_path / "run", {"s": source}, query)
    assert "hunter2" not in str(caught.value)
    assert len(secret_frame) == 1


def test_an_unknown_connection_type_names_the_known_ones(tmp_path: Path) -> None:
    connections = {"db": Connection("db", "oracle", password="hunter2")}
    with pytest.raises(BadConfiguration, match="type 'oracle'; known: postgres, sqlite") as caught:
        ingest(tmp_path, {"s": {"connection": "db", "sql": "SELECT 1"}}, connections=connections)
    assert "hunter2" not in str(caught.value)
