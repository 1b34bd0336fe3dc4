"""Stages in pods that are given a secret: one looks where it lies, one is careless with it; each waits in both ways."""

import json
import os
from datetime import UTC, datetime

from airflow.sdk import DAG

from lepton_airflow.operators import StageOperator
from lepton_airflow.runners import Pod
from lepton_airflow.testing.probe_stages import Look

SETTINGS = json.loads(os.environ["LEPTON_SECRETS"])  # what test_secrets.py found


class LookOperator(StageOperator, stage=Look):
    pass


with DAG("look", schedule=None, start_date=datetime(2026, 1, 1, tzinfo=UTC)):
    for name, deferrable in {"sync": False, "deferred": True}.items():
        pod = Pod(**SETTINGS["pod"], deferrable=deferrable, keep_pod="always")
        for say in (False, True):
            LookOperator(
                task_id=f"{name}_careless" if say else name,
                connection="drill_database",
                password_is=SETTINGS["password_is"],
                say=say,
                runner=pod,
            )
