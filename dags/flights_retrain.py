"""Retrain the model of late arrivals every month, judge it against the champion, promote and deploy it if it is better.

A run for a month trains on the three months before it and is judged on the month itself, which neither model saw.
Raw data lies in the folder that the Airflow Variable ``flights_raw`` names; MLflow is the Connection
``mlflow_default``. The champion is served by ``python -m lepton_airflow serve flights-late``, started beside Airflow. A
backfill registers models and moves nothing, unless ``on_backfill`` says ``full``.

The data are of 2013; a run for a month without data is skipped. To run a month from the UI: Trigger, Backfill, and dates in
2013 (tick "Override parameters on existing runs", or Airflow sends none of the form's parameters). A single run needs a
logical date in 2013 (it takes the month before), or no logical date and the params ``window_start`` and ``window_end``.
"""

from datetime import UTC, datetime

from airflow.sdk import DAG, AssetAlias, Param
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.interval import CronDataIntervalTimetable

from lepton_airflow.operators import (
    DeployModelOperator,
    EvaluateModelOperator,
    IngestDataOperator,
    PrepareDataOperator,
    PromoteModelOperator,
    QuantizeModelOperator,
    RegisterModelOperator,
    TrainModelOperator,
    TuneModelOperator,
    ValidateDataOperator,
)

RAW = "{{ var.value.flights_raw }}"

with DAG(
    dag_id="flights_retrain",
    # Every month, and whenever flights_watch saw drift: then the month of its event. A cron string instead of the
    # timetable would give every run an empty data interval.
    schedule=AssetOrTimeSchedule(
        timetable=CronDataIntervalTimetable("@monthly", timezone="UTC"),
        assets=AssetAlias("flights_late_drifted"),  # type: ignore[arg-type]  # typed for the scheduler's own class
    ),
    # March has two months before it to train on, every later month three.
    start_date=datetime(2013, 3, 1, tzinfo=UTC),
    catchup=False,
    default_args={"retries": 1, "mlflow": "mlflow_default"},
    params={
        "trainer": Param(
            "hist_gradient_boosting",
            title="Model",
            enum=["hist_gradient_boosting", "logistic_regression", "mlp"],
            description="What to train; a name from lepton_airflow.models.",
        ),
        "trials": Param(
            8,
            type="integer",
            minimum=1,
            maximum=500,
            title="Trials",
            description="Hyperparameter sets to try.",
        ),
        "min_effect": Param(
            0.0,
            type="number",
            minimum=0,
            maximum=0.5,
            title="Smallest gain",
            description="ROC AUC by which a candidate must surely beat the champion.",
        ),
        "on_backfill": Param(
            "register_only",
            title="In a backfill",
            enum=["register_only", "skip", "full"],
            description="register_only: production stays as it is; full: promote as a scheduled run does.",
        ),
        "window_start": Param(
            None,
            type=["null", "string"],
            format="date",
            title="First day",
            description="Of the month to judge on; only for a single run without a logical date.",
        ),
        "window_end": Param(
            None,
            type=["null", "string"],
            format="date",
            title="Day after the last",
            description="2013-07-01 for June; leave both empty in a backfill.",
        ),
        "refresh_cache": Param(
            False, type="boolean", title="Compute anew", description="Reuse nothing that was computed before."
        ),
    },
    tags=["lepton", "flights"],
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
    )
    validate = ValidateDataOperator(
        task_id="validate", dataset=ingest.output["snapshot"], suite="../great_expectations/flights.json"
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
    )
    tune = TuneModelOperator(
        task_id="tune",
        dataset=prepare.output["train"],
        trainer="{{ params.trainer }}",
        trials="{{ params.trials }}",
        folds=3,
        workers=2,
        max_rows=20_000,
    )
    train = TrainModelOperator(
        task_id="train",
        dataset=prepare.output["train"],
        valid=prepare.output["valid"],
        trainer="{{ params.trainer }}",
        hyperparameters=tune.output["best"],
        profile=prepare.output["profile"],
    )
    quantize = QuantizeModelOperator(
        task_id="quantize",
        model=train.output["model"],
        calibration=prepare.output["train"],
        dataset=prepare.output["valid"],  # the test rows are kept for the verdict on the champion
    )
    evaluate = EvaluateModelOperator(
        task_id="evaluate", model=quantize.output["model"], dataset=prepare.output["test"], slices=["origin"]
    )
    register = RegisterModelOperator(
        task_id="register",
        model=quantize.output["model"],
        name="flights_late",
        metrics=evaluate.output["metrics"],
        on_backfill="{{ params.on_backfill }}",
    )
    promote = PromoteModelOperator(
        task_id="promote",
        name=register.output["name"],
        version=register.output["version"],
        dataset=prepare.output["test"],
        metric="roc_auc",
        min_effect="{{ params.min_effect }}",
        on_backfill="{{ params.on_backfill }}",
    )
    deploy = DeployModelOperator(
        task_id="deploy",
        endpoint="flights-late",
        name=register.output["name"],
        golden=prepare.output["test"],
        on_backfill="{{ params.on_backfill }}",
    )
    validate >> prepare
    promote >> deploy
