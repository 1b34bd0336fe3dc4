"""IngestData from tables of a lake and from object stores: real Delta and Iceberg tables, on disk and on an S3 server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog import load_catalog

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Request, Window
from lepton_airflow.data.sources import lakes
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError
from lepton_airflow.execution.run_stage import run_stage
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.stages import Result, RunInfo
from lepton_airflow.stages.ingest_data import IngestData
from lepton_airflow.store import Store

ROOT = Path(__file__).parents[2]
MAY = Window("2013-05-01T00:00:00+00:00", "2013-06-01T00:00:00+00:00")
KEY, SECRET = "lepton-key", "lepton-secret"


def orders(first: int, last: int) -> pa.Table:
    """One order a day, from 1 April 2013 on."""
    ids = range(first, last)
    days = [date(2013, 4, 1) + timedelta(i) for i in ids]
    at = [datetime.combine(d, time(12)) for d in days]
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "day": days,
            "at": pa.array(at, pa.timestamp("us")),
            "at_utc": pa.array(at, pa.timestamp("us", tz="UTC")),
            "country": [("DE", "o'land", "FR")[i % 3] for i in ids],
        }
    )


class Delta:
    """A Delta table with the versions 0 (30 rows), 1 (60 rows) and 2 (one row deleted)."""

    def __init__(self, uri: str, options: dict[str, str] | None = None) -> None:
        self.spec: dict[str, Any] = {"format": "delta", "uri": uri}
        self.option, self.options = "version", options
        self.versions = [self.write(orders(0, 30)), self.write(orders(30, 60))]
        DeltaTable(uri, storage_options=options).delete("id = 5")
        self.versions.append(2)

    def write(self, rows: pa.Table) -> int:
        write_deltalake(self.spec["uri"], rows, mode="append", storage_options=self.options)
        return DeltaTable(self.spec["uri"], storage_options=self.options).version()


class Iceberg:
    """The same as an Iceberg table; its versions are ids of snapshots."""

    def __init__(self, folder: Path, warehouse: str = "", **properties: str) -> None:
        folder.mkdir(parents=True)
        catalog = {
            "type": "sql",
            "uri": f"sqlite:///{folder}/catalog.db",
            "warehouse": warehouse or f"file://{folder}/lake",
        }
        self.spec: dict[str, Any] = {"format": "iceberg", "catalog": catalog, "table": "shop.orders"}
        self.option, self.catalog = "snapshot_id", load_catalog("default", **catalog, **properties)
        self.catalog.create_namespace("shop")
        self.table = self.catalog.create_table("shop.orders", schema=orders(0, 1).schema)
        self.versions = [self.write(orders(0, 30)), self.write(orders(30, 60))]
        self.table.delete("id = 5")
        self.versions.append(self.current())

    def write(self, rows: pa.Table) -> int:
        self.table.append(rows)
        return self.current()

    def current(self) -> int:
        snapshot = self.table.current_snapshot()
        assert snapshot is not None
        return snapshot.snapshot_id


Lake = Delta | Iceberg


@pytest.fixture(params=["delta", "iceberg"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Lake:
    return (
        Delta(str(tmp_path / "lake ü" / "orders"))
        if request.param == "delta"
        else Iceberg(tmp_path / "lake ü")
    )


def ingest(tmp_path: Path, spec: Any, query: str = "SELECT * FROM s", **kwargs: Any) -> Result:
    names = ("window", "connections", "store")
    folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
    run = RunInfo.local(folder, **{k: kwargs.pop(k) for k in names if k in kwargs})
    return IngestData(sources={"s": spec}, query=query, order_by=["id"], **kwargs).run(run)


def frame(tmp_path: Path, result: Result) -> pd.DataFrame:
    return pd.read_parquet(Store(str(tmp_path)).fetch(result.artifacts["snapshot"].uri, tmp_path))


# -- which version ----------------------------------------------------------------------------------------------------


def test_every_version_can_be_read_and_the_current_one_is_the_default(lake: Lake, tmp_path: Path) -> None:
    first, second, third = (ingest(tmp_path, lake.spec | {lake.option: v}) for v in lake.versions)
    assert [r.values["rows"] for r in (first, second, third)] == [30, 60, 59]
    assert [r.values["sources"]["s"]["version"] for r in (first, second, third)] == lake.versions
    current = ingest(tmp_path, lake.spec)
    assert current.artifacts["snapshot"].sha256 == third.artifacts["snapshot"].sha256
    assert current.values["sources"] == third.values["sources"]
    rows = frame(tmp_path, current)
    assert rows.id.tolist() == [i for i in range(60) if i != 5]
    assert current.values["schema"]["at_utc"] == "TIMESTAMP WITH TIME ZONE"
    assert set(rows.country) == {"DE", "o'land", "FR"}


def test_a_run_used_twice_reads_the_version_that_is_asked_for(lake: Lake, tmp_path: Path) -> None:
    run, rows = RunInfo.local(tmp_path / "notebook"), []
    for version in (None, *lake.versions):
        spec = lake.spec | ({lake.option: version} if version is not None else {})
        stage = IngestData(sources={"s": spec}, query="SELECT * FROM s", order_by=["id"])
        rows.append(stage.run(run).values["rows"])
    assert rows == [59, 30, 60, 59]


def test_equal_versions_are_cached_and_a_write_is_a_miss(lake: Lake, tmp_path: Path) -> None:
    def run() -> tuple[str, Any]:
        given = {"sources": {"s": lake.spec}, "query": "SELECT * FROM s"}
        receipt = run_stage(Request("IngestData", given, str(tmp_path / "store")))
        return receipt.status, receipt.values["rows"]

    assert [run(), run()] == [("done", 59), ("cached", 59)]
    lake.write(orders(60, 61))
    assert [run(), run()] == [("done", 60), ("cached", 60)]


def test_a_stated_version_given_as_text_is_the_same_version(lake: Lake, tmp_path: Path) -> None:
    as_text = ingest(tmp_path, lake.spec | {lake.option: str(lake.versions[0])})
    assert as_text.values["sources"]["s"]["version"] == lake.versions[0]


def test_a_write_between_the_key_and_the_reading_changes_nothing(lake: Lake, tmp_path: Path) -> None:
    stage, run = IngestData(sources={"s": lake.spec}, query="FROM s"), RunInfo.local(tmp_path / "run")
    key = cache_key(stage, run)
    lake.write(orders(60, 70))
    result = stage.run(run)
    assert result.values["rows"] == 59
    assert result.values["sources"]["s"]["version"] == lake.versions[-1]
    assert cache_key(stage, run) == key
    assert cache_key(stage, RunInfo.local(tmp_path / "another")) != key


def test_a_table_made_anew_under_its_name_is_another_one(tmp_path: Path) -> None:
    def digest(folder: str) -> str:
        table = Delta(str(tmp_path / folder))
        found = ingest(tmp_path, table.spec | {"version": 0}).values["sources"]["s"]["digest"]
        return str(found)

    assert digest("one") != digest("two")


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([["at", ">=", "$window_start"], ["at", "<", "$window_end"]], range(30, 60)),
        ([["at_utc", ">=", "$window_start"], ["at_utc", "<", "$window_end"]], range(30, 60)),
        ([["day", ">=", "$window_start"], ["day", "<", "$window_end"]], range(30, 60)),
        ([["day", "<=", "2013-04-03"]], range(3)),
        ([["country", "=", "o'land"], ["id", "<", 9]], [1, 4, 7]),
        ([["country", "in", ["DE", "FR"]], ["id", "in", [1, 2, 3]]], [2, 3]),
        ([["id", ">", 58]], [59]),
        ([["id", ">", 59]], []),
    ],
)
def test_columns_and_filters(lake: Lake, tmp_path: Path, filters: Any, ids: Any) -> None:
    spec = lake.spec | {"columns": ["country", "id"], "filters": filters}
    result = ingest(tmp_path, spec, window=MAY, on_empty="keep")
    assert frame(tmp_path, result).id.tolist() == list(ids)
    assert list(result.values["schema"]) == ["country", "id"]
    assert result.values["sources"]["s"]["rows"] == len(ids)  # fewer rows were landed, not only selected


def test_a_window_within_a_day_compares_dates_as_their_midnights(lake: Lake, tmp_path: Path) -> None:
    noon = Window("2013-05-01T12:00:00+00:00", "2013-05-03T12:00:00+00:00")
    for low, high, days in ((">=", "<", [2, 3]), (">", "<=", [2, 3])):
        filters = [["day", low, "$window_start"], ["day", high, "$window_end"]]
        rows = frame(tmp_path, ingest(tmp_path, lake.spec | {"filters": filters}, window=noon))
        assert [d.day for d in rows.day] == days


def test_only_the_files_with_such_rows_are_read(tmp_path: Path) -> None:
    lake = Delta(str(tmp_path / "orders"))
    oldest = DeltaTable(str(tmp_path / "orders"), version=0).file_uris()
    spec = lake.spec | {"version": 1}
    for uri in oldest:
        Path(uri.removeprefix("file://")).unlink()
    assert ingest(tmp_path, spec | {"filters": [["id", ">=", 30]]}).values["rows"] == 30
    with pytest.raises(BadInput, match=r"source 's': files of delta table .*orders are gone; .*VACUUM"):
        ingest(tmp_path, spec)


def test_stated_types_reject_rows(lake: Lake, tmp_path: Path) -> None:
    spec = lake.spec | {"types": {"country": "INTEGER", "id": "SMALLINT"}}
    with pytest.raises(BadInput, match=r"59 of 59 rows \(100.00%\) cannot be read"):
        ingest(tmp_path, spec)
    result = ingest(tmp_path, lake.spec | {"types": {"id": "SMALLINT"}})
    assert result.values["schema"]["id"] == "SMALLINT"


def test_an_older_snapshot_has_its_own_columns(lake: Lake, tmp_path: Path) -> None:
    wider = orders(60, 61).append_column("note", pa.array(["new"]))
    if isinstance(lake, Delta):
        write_deltalake(lake.spec["uri"], wider, mode="append", schema_mode="merge")
    else:
        with lake.table.update_schema() as update:
            update.union_by_name(wider.schema)
        lake.table.append(wider)
    assert "note" in ingest(tmp_path, lake.spec).values["schema"]
    assert "note" not in ingest(tmp_path, lake.spec | {lake.option: lake.versions[0]}).values["schema"]


def test_deleted_rows_and_mapped_columns_of_delta_are_understood(tmp_path: Path) -> None:
    """A table as Spark writes it: deletion vectors and column mapping on, one column renamed."""
    uri = str(tmp_path / "orders")
    write_deltalake(
        uri,
        orders(0, 30),
        configuration={"delta.enableDeletionVectors": "true", "delta.columnMapping.mode": "name"},
    )
    table = DeltaTable(uri)
    table.delete("id = 5")
    assert {"deletionVectors", "columnMapping"} & set(DeltaTable(uri).protocol().reader_features or [])
    result = ingest(tmp_path, {"format": "delta", "uri": uri})
    assert frame(tmp_path, result).id.tolist() == [i for i in range(30) if i != 5]


_BOUNDED = """
import resource, sys, json
import duckdb, pandas, pyarrow.parquet, deltalake, pyiceberg.io.pyarrow, pyiceberg.catalog
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.ingest_data import IngestData
peak_mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak_mb()
query = "SELECT count(*) AS rows, sum(length(text)) AS size FROM s"
stage = IngestData(sources={"s": json.loads(sys.argv[1])}, query=query, memory_limit_mb=128)
print(stage.run(RunInfo.local(sys.argv[2])).values["sources"]["s"]["rows"], peak_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_table_several_times_larger_than_the_memory_limit_passes(kind: str, tmp_path: Path) -> None:
    rows = pa.table(
        {
            "id": pa.array(range(600_000), pa.int64()),
            "text": [hashlib.sha512(str(i).encode()).hexdigest() * 6 for i in range(600_000)],
        }
    )
    if kind == "delta":
        write_deltalake(str(tmp_path / "t"), rows)
        spec: dict[str, Any] = {"format": "delta", "uri": str(tmp_path / "t")}
    else:
        lake = Iceberg(tmp_path / "lake")
        lake.catalog.create_table("shop.large", schema=rows.schema).append(rows)
        spec = lake.spec | {"table": "shop.large"}
    assert rows.nbytes > 3 * 128e6
    del rows
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, json.dumps(spec), str(tmp_path / "run")],
        check=False, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    count, grown_mb = done.stdout.split()
    assert int(count) == 600_000
    assert float(grown_mb) < 400, grown_mb


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_versions_columns_and_windows_are_named(lake: Lake, tmp_path: Path) -> None:
    there = "its log goes from 0 to 2" if isinstance(lake, Delta) else f"known: {lake.versions[0]} .2"
    cases: list[tuple[dict[str, Any], type[LeptonError], str]] = [
        ({lake.option: 99}, BadInput, f"has no (version|snapshot) 99; {there}"),
        ({lake.option: "latest"}, BadConfiguration, f"{lake.option}='latest': expected a whole number"),
        ({"columns": ["idd"]}, BadInput, "column 'idd' is not in version .* did you mean 'id'"),
        ({"filters": [["idx", "=", 1]]}, BadInput, "column 'idx' is not in version .* did you mean 'id'"),
        ({"filters": [["id", "=", "x"]]}, BadInput, "cannot be read: .*(Cannot cast|Could not convert)"),
        ({"filters": [["id", "<>", 1]]}, BadConfiguration, r"expected \[column, sign, value\]"),
        ({"filters": [["id", "in", 1]]}, BadConfiguration, "a list of values goes with 'in'"),
        (
            {"filters": [["day", ">", "$window_start"]]},
            BadConfiguration,
            "filters use .window_start, and this run has no",
        ),
        ({"connection": "nowhere"}, BadConfiguration, "Connection 'nowhere' did not reach the stage"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            ingest(tmp_path, lake.spec | options)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadConfiguration, match=r"filters compare column 'id' \(int64\) with the window"):
        ingest(tmp_path, lake.spec | {"filters": [["id", ">", "$window_start"]]}, window=MAY)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "delta"}, "needs the one uri of a Delta table"),
        ({"format": "delta", "uri": ["a", "b"]}, "needs the one uri of a Delta table"),
        ({"format": "delta", "uri": "nowhere/orders"}, "there is no Delta table at nowhere/orders"),
        ({"format": "iceberg", "uri": "x"}, "needs a table, as namespace.table"),
        ({"format": "iceberg", "table": "a.b"}, "needs a table, as namespace.table"),
        ({"uri": "s.csv", "columns": ["a"]}, "has the option 'columns', which only tables of a lake take"),
        ({"uri": "s.csv", "version": 3}, "has the option 'version', which a source of files does not take"),
        ({"format": "delta", "uri": "x", "snapshot_id": 3}, "'snapshot_id', which a source of delta does not take"),
        ({"format": "delta", "uri": "x", "null_values": ["NA"]}, "'null_values', which a source of delta does not"),
        (
            {"format": "iceberg", "table": "a.b", "catalog": {"type": "sql"}, "version": 3},
            "'version', which a source of iceberg does not take; it takes .* snapshot_id",
        ),
        ({"connection": "db", "sql": "SELECT 1", "union": True}, "'union', which a source of a database does not"),
        ({"format": "delta", "uri": "x", "columns": "day"}, "columns='day': expected a list of names"),
        ({"format": "delta", "uri": "x", "filters": "day"}, "filters='day': expected a list of"),
        ({"format": "delta", "uri": "x", "filters": [[1, "=", 1]]}, r"expected \[column, sign, value\]"),
        ({"format": "delta", "uri": "x", "filters": [["a", "=", None]]}, "no row compares with nothing"),
        ({"format": "delta", "uri": "x", "filters": [["a", "in", [1, None]]]}, "no row compares with nothing"),
        ({"format": "delta", "uri": "x", "filters": [["a", "in", []]]}, "no row compares with nothing"),
        ({"format": "delat", "uri": "x"}, "did you mean 'delta'"),
        (
            {"format": "iceberg", "table": "a.b", "catalog": {"type": "rest", "token": "hunter2"}},
            r"catalog\['token'\] is a secret, which a DAG must not hold",
        ),
        (
            {"format": "iceberg", "table": "a.b", "catalog": {"type": "sql", "adls.account-key": "hunter2"}},
            r"catalog\['adls.account-key'\] is a secret, which a DAG must not hold",
        ),
        (
            {"format": "iceberg", "table": "a.b", "catalog": {"auth": {"type": "basic", "basic": {"password": "hunter2"}}}},
            r"catalog\['auth'\] is a secret, which a DAG must not hold",
        ),
        (
            {"format": "iceberg", "table": "a.b", "catalog": {"uri": "postgresql://me:hunter2@db/lake"}},
            r"catalog\['uri'\] is a secret, which a DAG must not hold",
        ),
        ({"format": "iceberg", "table": "a.b", "catalog": {"type": "sqll"}}, "'sqll' is not a valid CatalogType"),
    ],
)  # fmt: skip
def test_what_is_no_table_gets_one_sentence(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInput, BadConfiguration), match=message) as caught:
        ingest(tmp_path, spec)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_unknown_iceberg_table_names_those_there_are(tmp_path: Path) -> None:
    lake = Iceberg(tmp_path / "lake")
    for table, message in (
        ("shop.order", "has no table 'shop.order'; did you mean 'shop.orders'"),
        ("shp.orders", "nor a namespace 'shp'; did you mean 'shop'"),
        ("orders", "needs a table, as namespace.table, and its catalog"),
    ):
        with pytest.raises((BadInput, BadConfiguration), match=message):
            ingest(tmp_path, lake.spec | {"table": table})
    lake.catalog.create_table("shop.new", schema=orders(0, 1).schema)
    with pytest.raises(BadInput, match=r"table shop\.new has no snapshot: nothing was ever written"):
        ingest(tmp_path, lake.spec | {"table": "shop.new"})


@pytest.fixture
def overloaded() -> Iterator[str]:
    """The address of a service that is too busy to serve."""

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_catalog_that_does_not_answer_may_be_tried_again(tmp_path: Path, overloaded: str) -> None:
    for kind, uri, said in (
        ("rest", "http://127.0.0.1:9", "refused"),
        ("rest", overloaded, "Unavailable"),
        ("sql", "postgresql+psycopg2://me@127.0.0.1:9/lake", "refused"),
    ):
        spec = {"format": "iceberg", "table": "a.b", "catalog": {"type": kind, "uri": uri}}
        with pytest.raises(LeptonError, match=rf"iceberg table a\.b cannot be read: .*{said}") as caught:
            ingest(tmp_path, spec)
        assert caught.value.exit_code == 1


def test_a_store_that_goes_away_while_it_is_read_may_be_tried_again() -> None:
    source = Source.parse("s", {"format": "delta", "uri": "s3://lake/orders"})
    # As deltalake's stream says it, for a store that has stopped answering.
    gone = (
        "C Data interface error: External error: Object Store error: Generic S3 error: Error performing GET …"
    )
    with pytest.raises(LeptonError) as caught, lakes._in_one_sentence(source, None):
        raise pa.ArrowInvalid(gone)
    assert caught.value.exit_code == 1
    with pytest.raises(BadInput), lakes._in_one_sentence(source, None):
        raise pa.ArrowInvalid("Could not convert 'x' with type str: tried to convert to int64")


# -- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Connection]:
    """A new bucket, and the Connection that opens it: nothing else on this machine does."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    extra = {"endpoint_url": s3, "region_name": "us-east-1"}
    connection = Connection("lake", "aws", login=KEY, password=SECRET, extra=extra)
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    regionless = Connection("lake", "aws", login=KEY, password=SECRET, extra={"endpoint_url": s3})
    Store(f"s3://{name}", regionless).fs.mkdir(name)  # S3 takes no us-east-1 here, which is its default
    return name, connection


def test_tables_on_s3_open_with_the_sources_connection(
    bucket: tuple[str, Connection], tmp_path: Path
) -> None:
    name, connection = bucket
    endpoint = connection.extra["endpoint_url"]
    options = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
               "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}  # fmt: skip
    delta = Delta(f"s3://{name}/lake/orders", options)
    properties = {
        "s3.endpoint": endpoint,
        "s3.access-key-id": KEY,
        "s3.secret-access-key": SECRET,
        "s3.region": "us-east-1",
    }
    iceberg = Iceberg(tmp_path / "lake", f"s3://{name}/warehouse", **properties)
    digests = set()
    for lake in (delta, iceberg):
        spec = lake.spec | {"connection": "lake", lake.option: lake.versions[1]}
        result = ingest(tmp_path, spec, connections={"lake": connection})
        assert result.values["rows"] == 60
        digests.add(frame(tmp_path, result).to_csv())
    assert len(digests) == 1
    with pytest.raises(BadInput, match="there is no Delta table at"):
        ingest(
            tmp_path,
            delta.spec | {"uri": f"s3://{name}/nowhere", "connection": "lake"},
            connections={"lake": connection},
        )


def test_ingest_validate_and_prepare_with_their_store_on_s3(
    bucket: tuple[str, Connection], raw_flights: Path, tmp_path: Path
) -> None:
    name, connection = bucket
    store = f"s3://{name}/store"
    fs = Store(store, connection).fs
    for month in (1, 2):
        fs.put_file(str(raw_flights / f"flights/2013-0{month}.csv"), f"{name}/raw/2013-0{month}.csv")

    def run(stage: str, **parameters: Any) -> Any:
        request = Request(stage, parameters, store, store_connection="lake")
        receipt = run_stage(request, {"lake": connection})
        assert receipt.status in ("done", "cached"), receipt.summary
        return receipt

    source = {"uri": f"s3://{name}/raw/2013-*.csv", "connection": "lake", "types": {"arr_delay": "INTEGER"}}
    query = "SELECT * EXCLUDE (time_hour), make_timestamp(year, month, day, hour, 0, 0) AS at FROM s WHERE arr_delay IS NOT NULL"
    ingested = run("IngestData", sources={"s": source}, query=query, order_by=["at"])
    assert ingested.artifacts["snapshot"].uri.startswith(f"{store}/artifacts/")
    suite = {
        "name": "flights",
        "expectations": [{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "arr_delay"}}],
    }
    snapshot = ingested.artifacts["snapshot"].uri
    assert run("ValidateData", dataset=snapshot, suite=suite).values["passed"]
    prepared = run(
        "PrepareData",
        snapshot=snapshot,
        target="arr_delay",
        time_column="at",
        drop=["dep_delay"],
        test_start="2013-02-15",
    )
    assert prepared.artifacts["test"].uri.startswith(f"{store}/artifacts/")
    assert run("IngestData", sources={"s": source}, query=query, order_by=["at"]).status == "cached"
