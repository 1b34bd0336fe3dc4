"""What running flights_retrain as Airflow tasks costs over a plain script, and what the cache saves.

One month: by a plain script that calls the same libraries in one process, by a real Airflow, and three times more by that
Airflow with the run cleared; of these three, each task's median counts. Airflow's database is PostgreSQL where that is
installed, else sqlite. `overhead_seconds_per_task` and `overhead_ratio` compare the sum of the task durations that Airflow
shows with the script's wall time. `cached_speedup` is the task time of the first run over the sum of those medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GOALS = {"cached_speedup": "at least 10"}
DAG, MONTH, NEXT = "flights_retrain", "2013-05-01T00:00:00+00:00", "2013-06-01T00:00:00+00:00"


def measure() -> dict[str, float]:
    """Seconds of the plain script, of the first run, and of one from the cache."""
    from lepton_airflow.testing import LocalAirflow, LocalEndpoint, LocalMlflow, LocalPostgres
    from lepton_airflow.testing.local_postgres import pg_ctl

    sys.path.insert(0, str(ROOT / "demo"))
    from flights import land

    raw = land(ROOT / ".cache" / "flights")
    with tempfile.TemporaryDirectory() as folder, LocalPostgres() if pg_ctl() else nullcontext() as server:
        home, database = Path(folder), server.new_database() if server else None
        env = {"AIRFLOW__LEPTON__STORE": str(home / "store"), "AIRFLOW_VAR_FLIGHTS_RAW": str(raw)}
        with LocalMlflow(home / "mlflow") as mlflow:
            env["AIRFLOW_CONN_MLFLOW_DEFAULT"] = mlflow.connection
            with (
                LocalAirflow(home / "airflow", ROOT / "dags", env=env, database=database) as airflow,
                LocalEndpoint("flights-late", str(home / "store"), home / "endpoint"),
                LocalEndpoint("plain", str(home / "plain" / "store"), home / "plain endpoint"),
            ):
                airflow.wait_for_dag(DAG)
                plain = _plain_seconds(raw, home / "plain", mlflow.url)
                first = _backfill(airflow, "none")
                again = [_backfill(airflow, "completed") for _ in range(3)]
    cached = {name: statistics.median(run[name] for run in again) for name in first}
    for name in first:
        print(
            f"{name:<10} plain {plain[name]:6.1f} s   first run {first[name]:6.1f} s   from the cache {cached[name]:6.1f} s"
        )
    script, one, two = plain["all"], sum(first.values()), sum(cached.values())
    return {
        "overhead_seconds_per_task": round((one - script) / len(first), 2),
        "overhead_ratio": round(one / script, 3),
        "cached_speedup": round(one / two, 1),
        "plain_seconds": round(script, 1),
        "first_run_task_seconds": round(one, 1),
        "cached_task_seconds": round(two, 1),
    }


def _plain_seconds(raw: Path, folder: Path, mlflow_url: str) -> dict[str, float]:
    """Run this file as the plain script; seconds by stage, and of the whole process as ``all``."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, str(raw), str(folder), mlflow_url],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"all": time.monotonic() - started}


def _backfill(airflow: Any, reprocess: str) -> dict[str, float]:
    """Backfill the month through Airflow; the duration of each task in seconds."""
    backfill = airflow.backfill(DAG, MONTH[:10], MONTH[:10], {"on_backfill": "full"}, reprocess=reprocess)
    airflow.wait_for_backfill(backfill, 900)
    (run,) = (run for run in airflow.runs(DAG) if run["run_type"] == "backfill")
    tasks = airflow.tasks(DAG, run["dag_run_id"])
    assert {t["state"] for t in tasks.values()} == {"success"}, {n: t["state"] for n, t in tasks.items()}
    return {
        name: task["duration"] for name, task in sorted(tasks.items(), key=lambda item: item[1]["start_date"])
    }


def plain_script(raw: Path, folder: Path, mlflow_url: str) -> dict[str, float]:
    """The chain of dags/flights_retrain.py as a script without Airflow; seconds by stage."""
    from lepton_airflow.contract import Window
    from lepton_airflow.stages import RunInfo, Stage
    from lepton_airflow.stages.deploy_model import DeployModel
    from lepton_airflow.stages.evaluate_model import EvaluateModel
    from lepton_airflow.stages.ingest_data import IngestData
    from lepton_airflow.stages.prepare_data import PrepareData
    from lepton_airflow.stages.promote_model import PromoteModel
    from lepton_airflow.stages.quantize_model import QuantizeModel
    from lepton_airflow.stages.register_model import RegisterModel
    from lepton_airflow.stages.train_model import TrainModel
    from lepton_airflow.stages.tune_model import TuneModel
    from lepton_airflow.stages.validate_data import ValidateData

    seconds: dict[str, float] = {}

    def call(name: str, stage: Stage) -> Any:
        run = RunInfo.local(folder, window=Window(MONTH, NEXT), run_key=f"plain-{name}", cache_key="0" * 64)
        started = time.monotonic()
        result = stage.run(run)
        seconds[name] = time.monotonic() - started
        return result

    sources = {
        "flights": f"{raw}/flights/*.csv",
        "weather": f"{raw}/weather/*.jsonl",
        "planes": f"{raw}/planes.parquet",
        "airports": f"{raw}/airports.csv",
        "airlines": f"{raw}/airlines.tsv",
    }
    sql = ROOT / "dags" / "sql"
    order = ["scheduled_at", "origin", "carrier", "flight"]
    query = (sql / "flights_snapshot.sql").read_text()
    ingested = call("ingest", IngestData(sources=sources, query=query, order_by=order))
    snapshot = ingested.artifacts["snapshot"].uri
    suite = str(ROOT / "great_expectations" / "flights.json")
    call("validate", ValidateData(dataset=snapshot, suite=suite))
    prepared = call(
        "prepare",
        PrepareData(
            snapshot=snapshot,
            features=(sql / "flights_features.sql").read_text(),
            target="late",
            time_column="scheduled_at",
            cluster_column="day",
            test_start="window_start",
            valid_fraction=0.1,
        ),
    )
    train, valid, test = (prepared.artifacts[split].uri for split in ("train", "valid", "test"))
    tuned = call("tune", TuneModel(dataset=train, trials=8, folds=3, workers=2, max_rows=20_000))
    trained = call(
        "train",
        TrainModel(
            dataset=train,
            valid=valid,
            hyperparameters=tuned.values["best"],
            profile=prepared.artifacts["profile"].uri,
        ),
    )
    quantized = call(
        "quantize",
        QuantizeModel(model=trained.artifacts["model"].uri, calibration=train, dataset=valid),
    )
    model = quantized.artifacts["model"].uri
    evaluated = call("evaluate", EvaluateModel(model=model, dataset=test, slices=["origin"]))
    registered = call(
        "register",
        RegisterModel(model=model, name="plain", metrics=evaluated.metrics, tracking_uri=mlflow_url),
    )
    call(
        "promote",
        PromoteModel(
            name="plain",
            version=registered.values["version"],
            dataset=test,
            metric="roc_auc",
            tracking_uri=mlflow_url,
        ),
    )
    call("deploy", DeployModel(endpoint="plain", name="plain", golden=test))
    return seconds


if __name__ == "__main__":
    print(json.dumps(plain_script(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
