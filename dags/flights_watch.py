"""Watch every month whether flights have drifted away from what the champion learnt; if so, retrain.

The month's rows, with the features the model reads, are compared with the champion's reference profile. When enough
columns have drifted, an asset event with this month as its window starts ``flights_retrain``, which trains on the three
months before the month and is judged on it. Ingest and prepare are written as they are there, so that the retraining
finds their results in the cache. A backfill judges past months and starts nothing, unless ``on_backfill`` says ``full``.
"""

from datetime import UTC, datetime

from airflow.sdk import DAG, AssetAlias, Param
from airflow.timetables.interval import CronDataIntervalTimetable

from lepton_airflow.operators import CheckDriftOperator, IngestDataOperator, PrepareDataOperator

RAW = "{{ var.value.flights_raw }}"

with DAG(
    dag_id="flights_watch",
    # A cron string instead of the timetable would give every run an empty data interval.
    schedule=CronDataIntervalTimetable("@monthly", timezone="UTC"),
    start_date=datetime(2013, 3, 1, tzinfo=UTC),
    catchup=False,
    default_args={"retries": 1},
    params={
        "min_columns": Param(
            5,  # of 27: the weather alone moves up to four of them from one season to the next
            type="integer",
            minimum=1,
            maximum=27,
            title="Columns",
            description="How many columns must have drifted before a retraining starts.",
        ),
        "on_backfill": Param(
            "register_only",
            title="In a backfill",
            enum=["register_only", "skip", "full"],
            description="register_only: judge and start nothing; full: start a retraining as a scheduled run does.",
        ),
        "window_start": Param(
            None,
            type=["null", "string"],
            format="date",
            title="First day",
            description="Of the month to watch; only for a single run without a logical date.",
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
    prepare = PrepareDataOperator(
        task_id="prepare",
        snapshot=ingest.output["snapshot"],
        features="sql/flights_features.sql",
        target="late",
        split="time",
        time_column="scheduled_at",
        cluster_column="day",
        test_start="window_start",
        valid_fraction=0.1,
    )
    CheckDriftOperator(
        task_id="check_drift",
        dataset=prepare.output["test"],  # the month alone; its features look back at most 28 days
        name="flights_late",
        min_columns="{{ params.min_columns }}",
        on_backfill="{{ params.on_backfill }}",
        outlets=[AssetAlias("flights_late_drifted")],
    )
