"""DAGs for drills on a real Airflow."""

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, Asset, Param
from probes import CountLetters, WaitForFile

from lepton_airflow.operators import StageOperator


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
