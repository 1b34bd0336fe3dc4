"""What judging a whole window for drift costs: ours from a profile in DuckDB, against Evidently on the same rows.

A window of `ROWS` rows and ten features in clusters of 1,000, and as many reference rows. `seconds_ours` is the wall time
of `judge_columns` from the Parquet file and the reference's profile; `seconds_evidently` that of reading both Parquet
files into pandas and of Evidently's drift metrics (PSI too) without a page. Each runs in a new process, in turns; imports are not
counted. `mib_…` is the largest resident memory of that process, libraries included. The data are synthetic: DuckDB makes them from
row numbers, the same every time.
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

GOALS = {"speedup": "at least 5", "mib_ours": "at most 1024"}
ROWS = int(os.environ.get("LEPTON_BENCH_DRIFT_ROWS", "2000000"))
ROUNDS = 3

_TABLE = """
SELECT i // 1000 AS cluster,
       {numbers},
       {categories}
FROM range({start}, {start} + {rows}) r(i)
"""


def measure() -> dict[str, float]:
    """Both sides in turns."""
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "evidently": []}
        for _ in range(ROUNDS):
            for side, runs in found.items():
                runs.append(_run(side, folder))
        print({side: [(round(s, 2), round(m)) for s, m in runs] for side, runs in found.items()})
    numbers: dict[str, float] = {"rows": ROWS}
    for side, runs in found.items():
        numbers[f"seconds_{side}"] = round(statistics.median(s for s, _ in runs), 2)
        numbers[f"mib_{side}"] = round(max(m for _, m in runs))
    return numbers | {"speedup": round(numbers["seconds_evidently"] / numbers["seconds_ours"], 1)}


def _make(folder: Path) -> None:
    """The reference, its profile, and the current window, in which two columns have moved."""
    import duckdb

    from lepton_airflow.data.dataset import DatasetInfo
    from lepton_airflow.data.profile import reference_profile

    con = duckdb.connect()
    for name, start, shift in (("before", 0, 0), ("now", ROWS, 50)):
        numbers = ", ".join(
            f"(hash(i + {k}) % 1000 + {shift if k == 0 else 0}) / 10 + hash(i // 1000 + {k}) % 30 AS n{k}"
            for k in range(5)
        )
        categories = ", ".join(
            f"'c' || (hash(i * 7 + {k}) % {10 * (k + 1)} + {shift // 10 if k == 4 else 0}) AS c{k}"
            for k in range(5)
        )
        query = _TABLE.format(numbers=numbers, categories=categories, start=start, rows=ROWS)
        con.execute(f"COPY ({query}) TO '{folder}/{name}.parquet' (FORMAT parquet)")
    con.execute(f"CREATE VIEW before AS SELECT * FROM read_parquet('{folder}/before.parquet')")
    features = [f"{kind}{k}" for kind in "nc" for k in range(5)]
    info = DatasetInfo(features=features, categorical=features[5:], cluster_column="cluster", rows=ROWS)
    (folder / "profile.json").write_text(json.dumps(reference_profile(con, "before", info, None)))


def _run(side: str, folder: str) -> tuple[float, float]:
    """Seconds and MiB of one side in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _SIDES[side] + _REPORT, folder],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"DO_NOT_TRACK": "1"},
    )
    found: Any = json.loads(done.stdout.splitlines()[-1])
    assert set(found["drifted"]) >= {"c4"}, found
    return found["seconds"], found["mib"]


_SIDES = {
    "ours": """
import json, resource, sys, time
from pathlib import Path
import numpy, scipy.stats
from lepton_airflow.data.sql import connect, literal
from lepton_airflow.evaluation.drift import judge_columns
folder = Path(sys.argv[1])
(folder / "work").mkdir(exist_ok=True)
start = time.perf_counter()
con = connect(folder / "work", readable=[folder / "now.parquet"])
con.execute(f"CREATE TEMP VIEW now AS SELECT * FROM read_parquet({literal(folder / 'now.parquet')})")
profile = json.loads((folder / "profile.json").read_text())
drifted = [v.name for v in judge_columns(con, "now", profile, "cluster", threshold=0.05) if v.drifted]
""",
    "evidently": """
import json, resource, sys, time
import pandas
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset
names = [f"{kind}{k}" for kind in "nc" for k in range(5)]
start = time.perf_counter()
definition = DataDefinition(numerical_columns=names[:5], categorical_columns=names[5:])
before, now = (
    Dataset.from_pandas(pandas.read_parquet(f"{sys.argv[1]}/{side}.parquet", columns=names), definition)
    for side in ("before", "now")
)
found = Report([DataDriftPreset(method="psi", threshold=0.05)]).run(now, before).dict()
drifted = [
    m["config"]["column"] for m in found["metrics"] if "column" in m["config"] and float(m["value"]) >= 0.05
]
""",
}
_REPORT = """
seconds = time.perf_counter() - start
mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "mib": mib, "drifted": drifted}))
"""
