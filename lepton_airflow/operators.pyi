# Made by .ci/make_stub.py; do not edit.
# ruff: noqa: PYI021, PYI051 - editors show the docstrings, and offer what a Literal names beside any template
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, TypedDict, Unpack

from airflow.sdk import DAG, BaseOperator, XComArg
from airflow.sdk.definitions.xcom_arg import PlainXComArg

from lepton_airflow.runners import Runner
from lepton_airflow.stages import ArtifactUri, CodeRef, ConnectionId, Stage

class _TaskArguments(TypedDict, total=False):
    owner: str
    email: str | Sequence[str] | None
    email_on_retry: bool
    email_on_failure: bool
    retries: int | None
    retry_delay: timedelta | float
    retry_exponential_backoff: float
    max_retry_delay: timedelta | float | None
    retry_policy: Any
    start_date: datetime | None
    end_date: datetime | None
    depends_on_past: bool
    ignore_first_depends_on_past: bool
    wait_for_past_depends_before_skipping: bool
    wait_for_downstream: bool
    dag: DAG | None
    params: Any
    default_args: Mapping[str, Any] | None
    priority_weight: int
    weight_rule: Any
    queue: str
    pool: str | None
    pool_slots: int
    sla: timedelta | None
    execution_timeout: timedelta | None
    on_execute_callback: Any
    on_failure_callback: Any
    on_success_callback: Any
    on_retry_callback: Any
    on_skipped_callback: Any
    pre_execute: Any
    post_execute: Any
    trigger_rule: str
    resources: Mapping[str, Any] | None
    run_as_user: str | None
    map_index_template: str | None
    max_active_tis_per_dag: int | None
    max_active_tis_per_dagrun: int | None
    executor: str | None
    executor_config: Mapping[str, Any] | None
    do_xcom_push: bool
    multiple_outputs: bool
    inlets: Any | None
    outlets: Any | None
    task_group: Any
    doc: str | None
    doc_md: str | None
    doc_json: str | None
    doc_yaml: str | None
    doc_rst: str | None
    task_display_name: str | None
    logger_name: str | None
    allow_nested_operators: bool
    render_template_as_native_obj: bool | None

class StageOperator(BaseOperator):
    """Run one stage; the base of all named operators and of those for your own stages."""

    stage: ClassVar[type[Stage]]
    def __init_subclass__(cls, stage: type[Stage] | None = None, **kwargs: Any) -> None: ...
    @property
    def output(self) -> PlainXComArg: ...
    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]: ...

class CheckDriftOperator(StageOperator):
    """Compare the current rows with those a model was trained on, and ask for a retraining when they have drifted."""

    def __init__(
        self,
        *,
        task_id: str,
        dataset: ArtifactUri | XComArg | str,
        name: str | XComArg | None = ...,
        reference: ArtifactUri | XComArg | str | None = ...,
        reference_rows: ArtifactUri | XComArg | str | None = ...,
        exclude_columns: Sequence[str] | str | XComArg = ...,
        threshold: float | str | XComArg = ...,
        alpha: float | str | XComArg = ...,
        min_columns: int | str | XComArg = ...,
        cluster_column: str | XComArg | None = ...,
        sample_rows: int | str | XComArg = ...,
        seed: int | str | XComArg = ...,
        on_backfill: Literal["register_only", "skip", "full"] | str | XComArg = ...,
        memory_limit_mb: int | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class DeployModelOperator(StageOperator):
    """Put a model into service at a named endpoint, and wait until its servers report that it is."""

    def __init__(
        self,
        *,
        task_id: str,
        endpoint: str | XComArg,
        name: str | XComArg | None = ...,
        model: ArtifactUri | XComArg | str | None = ...,
        golden: ArtifactUri | XComArg | str | None = ...,
        max_difference: float | str | XComArg = ...,
        max_latency_ms: float | str | XComArg = ...,
        max_memory_mb: float | str | XComArg = ...,
        timeout_s: float | str | XComArg = ...,
        allow_other_inputs: bool | str | XComArg = ...,
        on_backfill: Literal["register_only", "skip", "full"] | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class EvaluateModelOperator(StageOperator):
    """Run the ONNX model over a split that it has not seen, and report every metric with its interval."""

    def __init__(
        self,
        *,
        task_id: str,
        model: ArtifactUri | XComArg | str,
        dataset: ArtifactUri | XComArg | str,
        threshold: float | str | XComArg = ...,
        cluster_column: str | XComArg | None = ...,
        slices: Sequence[str] | str | XComArg = ...,
        bootstrap_resamples: int | str | XComArg = ...,
        confidence: float | str | XComArg = ...,
        seed: int | str | XComArg = ...,
        gate: Mapping[str, float] | str | XComArg | None = ...,
        allow_overlap: bool | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class IngestDataOperator(StageOperator):
    """Collect rows from files, lakes and databases into one immutable Parquet snapshot."""

    def __init__(
        self,
        *,
        task_id: str,
        sources: Mapping[str, Any] | str | XComArg,
        query: str | XComArg,
        parameters: Mapping[str, Any] | str | XComArg = ...,
        order_by: Sequence[str] | str | XComArg = ...,
        max_rejected_share: float | str | XComArg = ...,
        on_empty: Literal["fail", "skip", "keep"] | str | XComArg = ...,
        memory_limit_mb: int | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class PrepareDataOperator(StageOperator):
    """Make features from a snapshot and split the rows so that no split sees another's future, group or row."""

    def __init__(
        self,
        *,
        task_id: str,
        snapshot: ArtifactUri | XComArg | str,
        target: str | XComArg | None = ...,
        positive_class: str | int | bool | XComArg | None = ...,
        features: CodeRef | str | XComArg | None = ...,
        parameters: Mapping[str, Any] | str | XComArg = ...,
        task: Literal["classification", "regression"] | str | XComArg | None = ...,
        split: Literal["time", "group", "random"] | str | XComArg = ...,
        time_column: str | XComArg | None = ...,
        snapshot_time_column: str | XComArg | None = ...,
        label_horizon: str | XComArg | None = ...,
        complete_until: str | XComArg | None = ...,
        cluster_column: str | XComArg | None = ...,
        known_clusters: bool | str | XComArg = ...,
        id_columns: Sequence[str] | str | XComArg = ...,
        carry_columns: Sequence[str] | str | XComArg = ...,
        drop: Sequence[str] | str | XComArg = ...,
        stratify: bool | str | XComArg = ...,
        valid_fraction: float | str | XComArg = ...,
        test_fraction: float | str | XComArg = ...,
        valid_start: str | XComArg | None = ...,
        test_start: str | XComArg | None = ...,
        seed: int | str | XComArg = ...,
        drop_missing_target: bool | str | XComArg = ...,
        leak_check: bool | str | XComArg = ...,
        memory_limit_mb: int | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class PromoteModelOperator(StageOperator):
    """Judge a candidate against the champion and move the champion when the candidate is better beyond chance."""

    def __init__(
        self,
        *,
        task_id: str,
        name: str | XComArg,
        dataset: ArtifactUri | XComArg | str,
        version: int | str | XComArg | None = ...,
        metric: str | XComArg | None = ...,
        confidence: float | str | XComArg = ...,
        min_effect: float | str | XComArg = ...,
        cluster_column: str | XComArg | None = ...,
        threshold: float | str | XComArg = ...,
        resamples: int | str | XComArg = ...,
        seed: int | str | XComArg = ...,
        allow_rolled_back: bool | str | XComArg = ...,
        on_backfill: Literal["register_only", "skip", "full"] | str | XComArg = ...,
        tracking_uri: str | XComArg | None = ...,
        mlflow: ConnectionId | str | XComArg | None = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class QuantizeModelOperator(StageOperator):
    """Try smaller number formats on a model, measure them on this CPU, and take one only where it pays."""

    def __init__(
        self,
        *,
        task_id: str,
        model: ArtifactUri | XComArg | str,
        calibration: ArtifactUri | XComArg | str,
        dataset: ArtifactUri | XComArg | str,
        candidates: Sequence[str] | str | XComArg | None = ...,
        metric: str | XComArg | None = ...,
        max_loss: float | str | XComArg | None = ...,
        min_speedup: float | str | XComArg = ...,
        max_slowdown: float | str | XComArg = ...,
        min_shrink: float | str | XComArg = ...,
        calibration_rows: int | str | XComArg = ...,
        batch_rows: Sequence[int] | str | XComArg = ...,
        rounds: int | str | XComArg = ...,
        timing_s: float | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        cluster_column: str | XComArg | None = ...,
        threshold: float | str | XComArg = ...,
        confidence: float | str | XComArg = ...,
        seed: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class RegisterModelOperator(StageOperator):
    """Register a model package as a version in MLflow, once per task instance however often it is called."""

    def __init__(
        self,
        *,
        task_id: str,
        model: ArtifactUri | XComArg | str,
        name: str | XComArg,
        metrics: Mapping[str, Any] | str | XComArg | None = ...,
        tracking_uri: str | XComArg | None = ...,
        mlflow: ConnectionId | str | XComArg | None = ...,
        experiment: str | XComArg | None = ...,
        alias: str | XComArg | None = ...,
        tags: Mapping[str, str] | str | XComArg = ...,
        description: str | XComArg = ...,
        on_backfill: Literal["register_only", "skip", "full"] | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class RollbackModelOperator(StageOperator):
    """Go back to a former champion: in the ledger, in MLflow's aliases and, if one is named, at an endpoint."""

    def __init__(
        self,
        *,
        task_id: str,
        name: str | XComArg,
        reason: str | XComArg,
        version: int | str | XComArg | None = ...,
        endpoint: str | XComArg | None = ...,
        tracking_uri: str | XComArg | None = ...,
        mlflow: ConnectionId | str | XComArg | None = ...,
        allow_other_inputs: bool | str | XComArg = ...,
        on_backfill: Literal["register_only", "skip", "full"] | str | XComArg = ...,
        timeout_s: float | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class TrainModelOperator(StageOperator):
    """Fit a model and package it as ONNX with its preprocessing inside."""

    def __init__(
        self,
        *,
        task_id: str,
        dataset: ArtifactUri | XComArg | str,
        valid: ArtifactUri | XComArg | str | None = ...,
        trainer: CodeRef | str | XComArg = ...,
        hyperparameters: Mapping[str, Any] | str | XComArg = ...,
        folds: int | str | XComArg | None = ...,
        fold_by: Literal["row", "time"] | str | XComArg = ...,
        also_touched: Sequence[ArtifactUri | XComArg] | str | XComArg = ...,
        refit: Literal["train+valid"] | str | XComArg | None = ...,
        profile: ArtifactUri | XComArg | str | None = ...,
        seed: int | str | XComArg = ...,
        parity_tolerance: float | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        device: str | XComArg = ...,
        checkpoint_s: float | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class TuneModelOperator(StageOperator):
    """Search hyperparameters by cross-validation, in a study with which the next try of a killed run goes on."""

    def __init__(
        self,
        *,
        task_id: str,
        dataset: ArtifactUri | XComArg | str,
        trainer: CodeRef | str | XComArg = ...,
        search_space: Mapping[str, Any] | str | XComArg | None = ...,
        hyperparameters: Mapping[str, Any] | str | XComArg = ...,
        metric: str | XComArg | None = ...,
        folds: int | str | XComArg = ...,
        fold_by: Literal["row", "time"] | str | XComArg = ...,
        trials: int | str | XComArg = ...,
        timeout_s: float | str | XComArg | None = ...,
        workers: int | str | XComArg = ...,
        storage: str | XComArg | None = ...,
        storage_connection: ConnectionId | str | XComArg | None = ...,
        pruner: Literal["median", "none"] | str | XComArg = ...,
        max_rows: int | str | XComArg | None = ...,
        seed: int | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...

class ValidateDataOperator(StageOperator):
    """Check a snapshot against a Great Expectations suite, and stop the pipeline where the data breaks it."""

    def __init__(
        self,
        *,
        task_id: str,
        dataset: ArtifactUri | XComArg | str,
        suite: str | Mapping[str, Any] | XComArg,
        suite_parameters: Mapping[str, Any] | str | XComArg = ...,
        engine: Literal["duckdb", "pandas"] | str | XComArg = ...,
        on_failure: Literal["fail", "warn"] | str | XComArg = ...,
        max_offending: int | str | XComArg = ...,
        memory_limit_mb: int | str | XComArg = ...,
        threads: int | str | XComArg = ...,
        runner: Runner | None = None,
        store: str | XComArg | None = None,
        store_conn_id: str | None = None,
        cache: Literal["use", "refresh", "off"] | str | XComArg = "use",
        cache_ttl_s: float | None = None,
        window: Mapping[str, str] | XComArg | None = None,
        **kwargs: Unpack[_TaskArguments],
    ) -> None: ...
