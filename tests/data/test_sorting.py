from __future__ import annotations

import hashlib
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.sorting import sort_parquet

# What is hard to order: missing values and NaN in the first key, few distinct keys, nested values, equal rows.
ROWS = """
SELECT CASE WHEN i % 7 = 0 THEN NULL WHEN i % 11 = 0 THEN 'nan'::DOUBLE ELSE (hash(i) % 1000)::DOUBLE - 500 END AS g,
    CASE WHEN i % 5 = 0 THEN NULL ELSE repeat(md5((i % 50000)::TEXT), 10) END AS t,
    [i % 4, NULL] AS l, {'a': i % 9, 'b': NULL::INT} AS s, (i % 100 / 7)::DECIMAL(9, 2) AS d,
    TIMESTAMPTZ '2020-01-01 00:00:00+00' + INTERVAL (i % 1000) MINUTE AS moment
FROM range(300_000) r(i)
"""


def sort(tmp_path: Path, sql: str, order_by: list[str], memory_limit_mb: int = 128, threads: int = 2) -> int:
    """Sort the rows of a query into out.parquet; returns in how many pieces."""
    duckdb.sql(f"COPY ({sql}) TO '{tmp_path}/in.parquet' (FORMAT parquet)")
    pieces: list[None] = []
    sort_parquet(
        tmp_path / "in.parquet",
        tmp_path / "out.parquet",
        order_by,
        scratch=tmp_path / "scratch",
        memory_limit_mb=memory_limit_mb,
        threads=threads,
        check_stop=lambda: pieces.append(None),
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out.parquet"]  # nothing is left behind
    return len(pieces)


@pytest.mark.parametrize("order_by", [["g"], ["l", "moment"], []])
def test_pieces_give_the_order_and_the_bytes_of_one_sort(tmp_path: Path, order_by: list[str]) -> None:
    digests = set()
    for trial, (memory, threads) in enumerate([(1024, 1), (256, 2)]):
        pieces = sort(tmp_path, f"{ROWS} ORDER BY hash(i + {trial})", order_by, memory, threads)
        assert (pieces > 1) == (memory < 1024)
        digests.add(hashlib.sha256((tmp_path / "out.parquet").read_bytes()).hexdigest())
    assert len(digests) == 1
    columns = ", ".join(order_by or ["g", "t", "l", "s", "d", "moment"])
    (wrong,) = duckdb.sql(
        f"SELECT count(*) FROM (SELECT row({columns}) AS found FROM '{tmp_path}/out.parquet') "
        f"POSITIONAL JOIN (SELECT row({columns}) AS expected FROM ({ROWS}) ORDER BY {columns}) "
        "WHERE found IS DISTINCT FROM expected"
    ).fetchall()[0]
    assert wrong == 0


def test_a_key_of_most_rows_and_one_row_repeated_end(tmp_path: Path) -> None:
    text = "repeat('x', 400)"
    sql = f"SELECT CASE WHEN i % 10 = 0 THEN i ELSE -7 END AS k, {text} AS t FROM range(400_000) r(i)"
    assert sort(tmp_path, sql, ["k"]) >= 2
    keys = pq.read_table(tmp_path / "out.parquet", columns=["k"])["k"].to_pylist()
    assert keys == sorted(i if i % 10 == 0 else -7 for i in range(400_000))


@pytest.mark.parametrize("width", [0, 1, 5000])
def test_row_groups_are_small_in_rows_and_in_bytes(tmp_path: Path, width: int) -> None:
    sort(tmp_path, f"SELECT i, repeat('x', {width}) AS t FROM range(30_000) r(i)", ["i"], 1024)
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(rows) == 30_000
    assert len(set(rows[:-1])) == 1
    assert rows[0] <= 24576
    assert rows[0] * (width + 32) <= 17e6


def test_no_row_is_a_table_still(tmp_path: Path) -> None:
    sort(tmp_path, "SELECT 1 AS x, 'a' AS y WHERE false", ["x"])
    assert pq.read_schema(tmp_path / "out.parquet").types == [pa.int32(), pa.string()]
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 0
