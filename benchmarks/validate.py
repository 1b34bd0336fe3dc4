"""What checking a large snapshot costs: Great Expectations on pandas against ValidateData on DuckDB.

The same 30 expectations on the same Parquet files of 10 columns: `seconds_…` is the wall time of `ValidateData.run` in a
fresh process, reading the file included, `gib_…` the largest resident memory of that process. Both engines run through
the same stage, which asks either one for examples only where something fails. pandas would not fit with 100 million
rows, so there only DuckDB is measured. The data are synthetic: DuckDB makes them from row numbers, the same every time.
While it runs, they and what is spilled take 20 GB of disk, in TMPDIR.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOALS = {"speedup_10m": "at least 4", "peak_gib_100m": "at most 6"}
ROUNDS = {1_000_000: 3, 10_000_000: 2}  # of both engines in turns
LARGEST = 100_000_000
MEMORY_LIMIT_MB = 4096  # the same for every size
THREADS = 2

_ROWS = """
SELECT
    i AS id,
    (i % 5000)::INTEGER AS store,
    (i // 5000)::INTEGER AS receipt,
    TIMESTAMP '2024-01-01' + to_seconds(i % 31536000) AS sold_at,
    round(5 + hash(i) % 99500 / 100, 2) AS amount,
    round((5 + hash(i) % 99500 / 100) * (0.80 + hash(i + 1) % 20 / 100), 2) AS net,
    (1 + hash(i + 2) % 40)::INTEGER AS quantity,
    ['DE', 'FR', 'IT', 'ES', 'PL', 'NL', 'BE', 'AT', 'CZ', 'PT'][1 + (hash(i + 3) % 10)::INTEGER] AS country,
    'customer' || (hash(i + 4) % 5000000) || '@example.org' AS email,
    CASE WHEN hash(i + 5) % 20 > 0 THEN 'ordered through channel ' || (hash(i + 6) % 50) END AS note
FROM range({rows}) r(i)
"""


def suite(rows: int) -> dict[str, Any]:
    """30 expectations as a shop would state them; two of them fail on a few rows, as warnings."""
    columns = ["id", "store", "receipt", "sold_at", "amount", "net", "quantity", "country", "email", "note"]
    return {
        "name": "orders",
        "expectations": [
            _expect("table_row_count_to_be_between", min_value=rows, max_value=rows),
            _expect("table_columns_to_match_set", column_set=columns, exact_match=True),
            *(_expect("column_values_to_not_be_null", column=name) for name in columns[:-3]),
            _expect("column_values_to_not_be_null", column="note", mostly=0.9),
            _expect("column_values_to_be_in_type_list", column="id", type_list=["BIGINT", "int64"]),
            _expect("column_values_to_be_in_type_list", column="net", type_list=["DOUBLE", "float64"]),
            _expect("column_values_to_be_unique", column="id"),
            _expect("compound_columns_to_be_unique", column_list=["store", "receipt"]),
            _expect("column_values_to_be_between", column="quantity", min_value=1, max_value=40),
            _expect(
                "column_values_to_be_between",
                severity="warning",
                column="amount",
                min_value=5,
                max_value=999.98,
            ),
            _expect("column_values_to_be_in_set", column="country", value_set=_COUNTRIES),
            _expect("column_values_to_not_be_in_set", column="country", value_set=["", "XX"]),
            _expect("column_value_lengths_to_equal", column="country", value=2),
            _expect("column_value_lengths_to_be_between", column="email", min_value=20, max_value=40),
            _expect("column_values_to_match_regex", column="email", regex=r"^[a-z0-9]+@[a-z]+\.org$"),
            _expect(
                "column_values_to_not_match_regex", severity="warning", column="note", regex="channel 49$"
            ),
            _expect(
                "column_pair_values_a_to_be_greater_than_b", column_A="amount", column_B="net", or_equal=True
            ),
            _expect("column_mean_to_be_between", column="amount", min_value=490, max_value=515),
            _expect("column_stdev_to_be_between", column="amount", min_value=280, max_value=295),
            _expect("column_median_to_be_between", column="quantity", min_value=20, max_value=21),
            _expect(
                "column_quantile_values_to_be_between",
                column="amount",
                quantile_ranges={"quantiles": [0.05, 0.95], "value_ranges": [[50, 60], [945, 955]]},
            ),
            _expect("column_min_to_be_between", column="amount", min_value=5, max_value=5.5),
            _expect("column_sum_to_be_between", column="quantity", min_value=20 * rows, max_value=21 * rows),
            _expect(
                "column_unique_value_count_to_be_between", column="store", min_value=5000, max_value=5000
            ),
        ],
    }


_COUNTRIES = ["DE", "FR", "IT", "ES", "PL", "NL", "BE", "AT", "CZ", "PT"]


def _expect(kind: str, severity: str = "critical", **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs, "severity": severity}


_RUN = """
import json, sys, tempfile, time
from lepton_airflow.stages import RunInfo
from lepton_airflow.stages.validate_data import ValidateData
path, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
stage, run = ValidateData(dataset=path, **options), RunInfo.local(folder)
start = time.monotonic()
metrics = stage.run(run).metrics
print(json.dumps(metrics | {"seconds": time.monotonic() - start}))
"""


def measure(rounds: dict[int, int] | None = None, largest: int = LARGEST) -> dict[str, float]:
    """Time and memory of both engines by number of rows; smaller sizes may be given to try it."""
    rounds = ROUNDS if rounds is None else rounds
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder:
        for rows in [*rounds, *([largest] if largest else [])]:
            path = _make(Path(folder, f"{rows}.parquet"), rows)
            size = f"{rows // 1_000_000}m"
            engines = ("duckdb", "pandas") if rows in rounds else ("duckdb",)
            runs: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
            for _ in range(rounds.get(rows, 1)):
                for engine in engines:
                    runs[engine].append(_validate(path, rows, engine))
                    print(f"{size} {engine}: %.1f s, %.2f GiB" % runs[engine][-1], flush=True)
            for engine in engines:
                numbers[f"seconds_{size}_{engine}"] = round(statistics.median(s for s, _ in runs[engine]), 2)
                numbers[f"gib_{size}_{engine}"] = round(max(gib for _, gib in runs[engine]), 2)
            if "pandas" in engines:
                ratio = numbers[f"seconds_{size}_pandas"] / numbers[f"seconds_{size}_duckdb"]
                numbers[f"speedup_{size}"] = round(ratio, 2)
            else:
                numbers[f"peak_gib_{size}"] = numbers.pop(f"gib_{size}_duckdb")
            path.unlink()
    return numbers


def _make(path: Path, rows: int) -> Path:
    import duckdb

    with duckdb.connect(config={"memory_limit": "2GB", "threads": THREADS}) as con:
        con.execute("SET enable_progress_bar = false")
        con.execute(f"COPY ({_ROWS.format(rows=rows)}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")
    print(f"{rows:,} rows: {path.stat().st_size / 1e9:.2f} GB of Parquet", flush=True)
    return path


def _validate(path: Path, rows: int, engine: str) -> tuple[float, float]:
    """Seconds and peak GiB of one validation in its own process; raises when it did not find what it should."""
    options: dict[str, Any] = {"suite": suite(rows), "engine": engine}
    options |= {"memory_limit_mb": MEMORY_LIMIT_MB, "threads": THREADS}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-c", _RUN, str(path), folder, json.dumps(options)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"validating {rows:,} rows on {engine} ended with {process.returncode}")
    found = json.loads(printed)
    assert (found["rows"], found["expectations"], found["failed"]) == (rows, 30, 2), found
    return found["seconds"], usage.ru_maxrss / 2**20
