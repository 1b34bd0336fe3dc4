"""DAGs for drills on a real Airflow."""

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, Asset, Param
from airflow.timetables.interval import CronDataIntervalTimetable
from probes import CountLetters, WaitForFile

from lepton_airflow.operators import (
    IngestDataOperator,
    PrepareDataOperator,
    PromoteModelOperator,
    RegisterModelOperator,
    StageOperator,
    TrainModelOperator,
)


class WaitForFileOperator(StageOperator, stage=WaitForFile):
    pass


class CountLettersOperator(StageOperator, stage=CountLetters):
    pass


START = datetime(2026, 1, 1, tzinfo=UTC)

with DAG(
    "wait",
    schedule=None,
    start_date=START,
    params={"folder": Param("", type="string")},
    default_args={"retries": 3, "retry_delay": timedelta(seconds=1)},
):
    WaitForFileOperator(task_id="wait", folder="{{ params.folder }}")

with DAG(
    "count",
    schedule=[Asset("letters-arrived")],
    start_date=START,
    params={"text": Param("abc", type="string"), "refresh_cache": Param(False, type="boolean")},
):
    each = CountLettersOperator.partial(task_id="each").expand(text=["a", "bb", "ccc"])
    own = CountLettersOperator(task_id="own", text="{{ params.text }}")
    total = CountLettersOperator(
        task_id="total", text="", earlier=[own.output["count"]], database="drill_database", cache="off"
    )
    CountLettersOperator(task_id="sum", text="", earlier=each.output["count"])
    each >> total

with DAG("keep", schedule=None, start_date=START, params={"store": Param("", type="string")}):
    CountLettersOperator(task_id="keep", text="letters", store="{{ params.store }}")

with DAG(  # from raw data to a champion in few seconds: some flights of one month
    "monthly",
    schedule=CronDataIntervalTimetable("@monthly", timezone="UTC"),
    start_date=datetime(2013, 1, 1, tzinfo=UTC),
    end_date=datetime(2013, 12, 1, tzinfo=UTC),
    catchup=False,
    params={"model": Param("drill", type="string"), "on_backfill": Param("register_only", type="string")},
    default_args={"retries": 5, "retry_delay": timedelta(seconds=1), "mlflow": "mlflow_default"},
):
    ingest = IngestDataOperator(
        task_id="ingest",
        sources={
            "flights": "{{ var.value.flights_raw }}/flights/{{ data_interval_start.strftime('%Y-%m') }}.csv"
        },
        query="""
            SELECT make_timestamp(year, month, day, hour, minute, 0) AS scheduled_at, day, carrier, origin, distance,
                hour, arr_delay > 15 AS late
            FROM flights WHERE arr_delay IS NOT NULL AND flight % 10 = 0
        """,
    )
    prepare = PrepareDataOperator(
        task_id="prepare",
        snapshot=ingest.output["snapshot"],
        target="late",
        time_column="scheduled_at",
        cluster_column="day",
        leak_check=False,
    )
    train = TrainModelOperator(
        task_id="train", dataset=prepare.output["train"], trainer="logistic_regression"
    )
    register = RegisterModelOperator(
        task_id="register",
        model=train.output["model"],
        name="{{ params.model }}",
        on_backfill="{{ params.on_backfill }}",
    )
    PromoteModelOperator(
        task_id="promote",
        name=register.output["name"],
        version=register.output["version"],
        dataset=prepare.output["test"],
        on_backfill="{{ params.on_backfill }}",
    )
