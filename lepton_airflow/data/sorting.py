"""Sort a Parquet file that may be much larger than memory, into bytes that depend on its rows only.

DuckDB's own sort spills to disk, but to merge many spilled runs of wide rows it needs more memory than its limit (measured
with DuckDB 2.0: 1 GB of 540-byte rows fail at 256 MB). So a large file is first cut by ranges of its sort key, and a piece
that is still too large is cut again. Then the pieces are sorted one at a time and written one after the other.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.sql import interruptible, literal, quote, total_order

if TYPE_CHECKING:
    import duckdb

MIN_MEMORY_MB = 128  # enough for one thread of DuckDB and the buffers of 16 Parquet writers
_PIECES = 16  # at most so many pieces are cut at a time, since each has an open Parquet writer
_CUT = "FORMAT parquet, ROW_GROUP_SIZE 24576, ROW_GROUP_SIZE_BYTES '1MB'"
_VECTOR = 2048  # rows that DuckDB moves at once
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 24576, 16 << 20
_KEY, _PIECE = quote("lepton sort key"), "lepton piece"
_FIXED_WIDTH = re.compile(
    r"BOOLEAN|U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|DECIMAL\(\d+,\d+\)|DATE|TIME[A-Z_ ]*|UUID|INTERVAL"
)


def sort_parquet(
    source: Path,
    target: Path,
    order_by: Sequence[str],
    *,
    scratch: Path,
    memory_limit_mb: int,
    threads: int = 2,
    check_stop: Callable[[], None] = lambda: None,
) -> int:
    """Write the rows of a Parquet file in a fixed order; returns their number.

    Equal rows give equal bytes, whatever their order in ``source``, the memory and the number of threads.

    :param source: deleted once it is read, so that the disk holds the rows twice and not three times.
    :param order_by: columns to sort by; rows that are equal in them get a fixed order, too; empty: all columns.
    :param scratch: a directory for what does not fit in memory.
    :param memory_limit_mb: what DuckDB may hold, at least 128 [MB].
    :param check_stop: called between pieces; it raises to end the work.
    """
    import duckdb

    scratch.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect(
        config={
            "memory_limit": f"{memory_limit_mb}MB",
            "threads": max(1, min(threads, memory_limit_mb // MIN_MEMORY_MB)),
            "temp_directory": str(scratch / "spill"),
            "preserve_insertion_order": False,
            # The default, 524288 rows, takes too much memory where rows are wide.
            "partitioned_write_flush_threshold": _VECTOR,
        }
    )
    try:
        con.execute("SET TimeZone = 'UTC'")
        con.execute("SET enable_progress_bar = false")
        rows = _Rows(con, scratch, source, order_by, budget=(memory_limit_mb << 20) // 3)
        return interruptible(con, lambda: rows.write(source, target, check_stop))
    finally:
        con.close()
        shutil.rmtree(scratch, ignore_errors=True)


class _Rows:
    """The rows to sort: their columns, their total order, and how many bytes of them may be sorted at once."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        scratch: Path,
        source: Path,
        order_by: Sequence[str],
        budget: int,
    ) -> None:
        self.con, self.scratch, self.budget, self.cuts = con, scratch, budget, 0
        described = con.execute(f"DESCRIBE {_scan([source])}").fetchall()
        self.columns = {str(r[0]): str(r[1]) for r in described}
        self.order = total_order(order_by, list(self.columns))
        # The bytes of this key compare as ORDER BY compares the rows.
        self.key = f"create_sort_key(row({self.order}), 'ASC NULLS LAST')"

    def write(self, source: Path, target: Path, check_stop: Callable[[], None]) -> int:
        """Write all rows in order, in row groups of exactly one size; returns their number.

        PyArrow writes them: the bytes of DuckDB's own writer depend on the portions in which the rows arrive.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        count, size = self.measure([source])
        # The size depends on the rows alone, never on the memory limit: row groups show in the bytes.
        group = min(max(_ROW_GROUP_BYTES * count // max(size, 1), _VECTOR), _ROW_GROUP_ROWS)
        schema = self.con.sql(_scan([source])).limit(0).to_arrow_table().schema
        held: list[pa.RecordBatch] = []
        with pq.ParquetWriter(target, schema, compression="zstd", store_schema=False) as writer:
            for files, equal in self.pieces([source], size):
                check_stop()
                sql = _scan(files) + ("" if equal else f" ORDER BY {self.order}")
                for batch in self.con.sql(sql).to_arrow_reader(_VECTOR):
                    held.append(batch)
                    while sum(map(len, held)) >= group:
                        table = pa.Table.from_batches(held)
                        writer.write_table(table.slice(0, group).combine_chunks(), row_group_size=group)
                        held = table.slice(group).to_batches()
                for path in files:
                    path.unlink()
            if held or not count:
                writer.write_table(pa.Table.from_batches(held, schema).combine_chunks(), row_group_size=group)
        return count

    def measure(self, files: Sequence[Path]) -> tuple[int, int]:
        """The number of rows, and an estimate of their bytes in memory, which is equal for equal rows."""
        texts = [
            f"sum(strlen({quote(name)}::VARCHAR))"
            for name, kind in self.columns.items()
            if not _FIXED_WIDTH.fullmatch(kind)
        ]
        count, *lengths = self._all(f"SELECT {', '.join(['count(*)', *texts])} FROM ({_scan(files)})")[0]
        return count, 16 * len(self.columns) * count + sum(int(length or 0) for length in lengths)

    def pieces(self, files: list[Path], size: int) -> Iterator[tuple[list[Path], bool]]:
        """Yield files that fit in memory, in order; with True, files that do not but whose rows all have one sort key."""
        if size <= self.budget:
            yield files, False
            return
        lots = self._cut(files, size)
        if len(lots) == 1:
            yield lots[0], True
            return
        for lot in lots:
            yield from self.pieces(lot, self.measure(lot)[1])

    def _cut(self, files: list[Path], size: int) -> list[list[Path]]:
        """Cut files by ranges of the sort key, in order. A key that fills more than a range gets a range of its own."""
        count, _ = self.measure(files)
        wanted = max(3, min(_PIECES, math.ceil(1.5 * size / self.budget)))
        sample = max(100, min(10_000, self.budget // 4 * count // size))
        keys = sorted(
            key for (key,) in self._all(f"SELECT {self.key} FROM ({_scan(files)}) USING SAMPLE {sample} ROWS")
        )
        quantiles = [keys[len(keys) * i // wanted] for i in range(1, wanted)]
        # key + \0 is the smallest key above it.
        above = {key + b"\0" for key in quantiles if quantiles.count(key) > 1}
        bounds = sorted({*quantiles, *above})
        cases = " ".join(f"WHEN {_KEY} < ${i + 1} THEN {i}" for i in range(len(bounds)))
        self.cuts += 1
        folder = self.scratch / f"cut-{self.cuts}"
        self.con.execute(
            f"COPY (SELECT * EXCLUDE ({_KEY}), CASE {cases} ELSE {len(bounds)} END AS {quote(_PIECE)} "
            f"FROM (SELECT *, {self.key} AS {_KEY} FROM ({_scan(files)}))) "
            f"TO {literal(folder)} ({_CUT}, PARTITION_BY ({quote(_PIECE)}))",
            bounds,
        )
        for path in files:
            path.unlink()
        lots = sorted(folder.iterdir(), key=lambda lot: int(lot.name.rpartition("=")[2]))
        return [sorted(lot.iterdir()) for lot in lots]

    def _all(self, sql: str) -> list[tuple[Any, ...]]:
        return self.con.execute(sql).fetchall()


def _scan(files: Sequence[Path]) -> str:
    return f"SELECT * FROM read_parquet([{', '.join(map(literal, files))}], hive_partitioning=false)"
