"""A team's own DAG with one lepton stage in it: check what the night's export brought, before anybody uses it."""

from datetime import UTC, datetime

from airflow.sdk import DAG, task

from lepton_airflow.operators import ValidateDataOperator

with DAG("one_stage", schedule="@daily", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False):

    @task
    def export() -> str:
        import os  # the team's own code: here it only says where the night's export lies

        return os.environ["NIGHTLY_EXPORT"]

    ValidateDataOperator(task_id="check", dataset=export(), suite="../great_expectations/airports.json")
