"""Retrain the model of late arrivals in Kubernetes: each task in a pod of its own, as large as its stage needs.

Two candidates are trained side by side, boosted trees and a network (on a GPU where FLIGHTS_GPUS says how many it gets), and
judged in turn: the network becomes champion only if it is better than the trees that may have become it a moment before.
``flights_retrain`` is the same on the installation's default runner; ``[lepton] runner = {"Pod": {"image": …}}`` moves that
one into pods without a change to its file.

Airflow Variables: ``flights_image``, an image with the stages' libraries (``make images``); ``flights_namespace``, where the
pods are made; ``flights_raw``, the folder of the raw data. Pods must reach the raw data and the store, so both lie on S3 (or
in a folder that ``volumes`` mounts at the same path), and MLflow, the Connection ``mlflow_default``. The champion is served by
``python -m lepton_airflow serve flights-late-pods``. The data are of 2013: run it as a backfill, as ``flights_retrain``.
"""

import os
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Param
from airflow.timetables.interval import CronDataIntervalTimetable

from lepton_airflow.operators import (
    DeployModelOperator,
    EvaluateModelOperator,
    IngestDataOperator,
    PrepareDataOperator,
    PromoteModelOperator,
    RegisterModelOperator,
    TrainModelOperator,
    ValidateDataOperator,
)
from lepton_airflow.runners import Pod

RAW = "{{ var.value.flights_raw }}"
MODEL = "flights_late_pods"


def pod(**settings: Any) -> Pod:
    """A pod of this team: its image, its namespace, and what the stage needs."""
    return Pod(
        image="{{ var.value.flights_image }}", namespace="{{ var.value.flights_namespace }}", **settings
    )


SMALL = pod(cpu="250m", memory="1Gi")
TABLES = pod(cpu="1", memory="2Gi")  # DuckDB holds 1 GiB of it, Python and the Parquet writers the rest
TRAIN = pod(cpu="1", memory="3Gi")
# A number is no template, so it is read where the file is parsed. Without a GPU the network trains on the CPU.
TRAIN_ON_GPU = pod(cpu="1", memory="4Gi", gpus=int(os.environ.get("FLIGHTS_GPUS", "0")))

with DAG(
    dag_id="flights_retrain_pods",
    schedule=CronDataIntervalTimetable("@monthly", timezone="UTC"),
    # March has two months before it to train on, every later month three.
    start_date=datetime(2013, 3, 1, tzinfo=UTC),
    catchup=False,
    default_args={"retries": 1, "mlflow": "mlflow_default", "runner": SMALL},
    params={
        "on_backfill": Param(
            "register_only",
            title="In a backfill",
            enum=["register_only", "skip", "full"],
            description="register_only: production stays as it is; full: promote as a scheduled run does.",
        ),
    },
    tags=["lepton", "flights", "kubernetes"],
    doc_md=__doc__,
):
    ingest = IngestDataOperator(
        task_id="ingest",
        sources={
            "flights": f"{RAW}/flights/*.csv",
            "weather": f"{RAW}/weather/*.jsonl",
            "planes": f"{RAW}/planes.parquet",
            "airports": f"{RAW}/airports.csv",
            "airlines": f"{RAW}/airlines.tsv",
        },
        query="sql/flights_snapshot.sql",
        order_by=["scheduled_at", "origin", "carrier", "flight"],
        on_empty="skip",
        runner=TABLES,
    )
    validate = ValidateDataOperator(
        task_id="validate",
        dataset=ingest.output["snapshot"],
        suite="../great_expectations/flights.json",  # no pod sees it: the worker puts it into the store
        runner=TABLES,
    )
    prepare = PrepareDataOperator(
        task_id="prepare",
        snapshot=ingest.output["snapshot"],
        features="sql/flights_features.sql",
        target="late",
        split="time",
        time_column="scheduled_at",
        cluster_column="day",  # the flights of one day are late together
        test_start="window_start",
        valid_fraction=0.1,
        runner=TABLES,
    )
    train_trees = TrainModelOperator(
        task_id="train_trees",
        dataset=prepare.output["train"],
        valid=prepare.output["valid"],
        trainer="hist_gradient_boosting",
        profile=prepare.output["profile"],
        runner=TRAIN,
    )
    train_network = TrainModelOperator(
        task_id="train_network",
        dataset=prepare.output["train"],
        valid=prepare.output["valid"],
        trainer="mlp",
        profile=prepare.output["profile"],
        runner=TRAIN_ON_GPU,
    )
    evaluate_trees = EvaluateModelOperator(
        task_id="evaluate_trees", model=train_trees.output["model"], dataset=prepare.output["test"]
    )
    evaluate_network = EvaluateModelOperator(
        task_id="evaluate_network", model=train_network.output["model"], dataset=prepare.output["test"]
    )
    register_trees = RegisterModelOperator(
        task_id="register_trees",
        model=train_trees.output["model"],
        name=MODEL,
        metrics=evaluate_trees.output["metrics"],
        on_backfill="{{ params.on_backfill }}",
    )
    register_network = RegisterModelOperator(
        task_id="register_network",
        model=train_network.output["model"],
        name=MODEL,
        metrics=evaluate_network.output["metrics"],
        on_backfill="{{ params.on_backfill }}",
    )
    promote_trees = PromoteModelOperator(
        task_id="promote_trees",
        name=register_trees.output["name"],
        version=register_trees.output["version"],
        dataset=prepare.output["test"],
        metric="roc_auc",
        on_backfill="{{ params.on_backfill }}",
    )
    promote_network = PromoteModelOperator(
        task_id="promote_network",
        name=register_network.output["name"],
        version=register_network.output["version"],
        dataset=prepare.output["test"],
        metric="roc_auc",
        on_backfill="{{ params.on_backfill }}",
    )
    deploy = DeployModelOperator(
        task_id="deploy",
        endpoint="flights-late-pods",
        name=MODEL,
        golden=prepare.output["test"],
        on_backfill="{{ params.on_backfill }}",
    )
    validate >> prepare
    promote_trees >> promote_network >> deploy
