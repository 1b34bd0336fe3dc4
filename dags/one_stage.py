"""A team's own DAG with one lepton stage in it: check the list of planes before anybody uses it."""

from datetime import UTC, datetime

from airflow.sdk import DAG, Variable, task

from lepton_airflow.operators import ValidateDataOperator

with DAG("one_stage", schedule=None, start_date=datetime(2026, 1, 1, tzinfo=UTC)):

    @task
    def export() -> str:
        """The team's own code; its result is where the data lies."""
        return Variable.get("flights_raw") + "/planes.parquet"

    ValidateDataOperator(task_id="check", dataset=export(), suite="../great_expectations/planes.json")
