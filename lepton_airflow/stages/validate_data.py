"""Check a snapshot against a Great Expectations suite, before anything is learned from it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import digest_of, split_pin
from lepton_airflow.data.dataset import unreadable
from lepton_airflow.data.findings import call_text, failure_text, severity
from lepton_airflow.data.held_values import as_held
from lepton_airflow.data.row_conditions import obey_conditions, whole_condition
from lepton_airflow.data.sql import connect, fetch_row, literal, nan_as_null, quote
from lepton_airflow.data.suite_parameters import asks_for_now, filled
from lepton_airflow.data.suites import checked_suite, propose_suite
from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean, require
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage

if TYPE_CHECKING:
    import duckdb
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.validator.validator import Validator

log = logging.getLogger(__name__)

INFER = "infer"


@dataclass(kw_only=True)
class ValidateData(Stage):
    """Check a snapshot against a Great Expectations suite, and stop the pipeline where the data breaks it.

    ``ValidateData(dataset=ingest.output["snapshot"], suite="great_expectations/flights.json")``

    With the engine ``duckdb`` the expectations become SQL over the Parquet file, which is never loaded. ``pandas`` loads all
    of it, and knows the few expectations that have no SQL (increasing values, strftime formats). Both take NaN for missing.
    A failed expectation of ``"severity": "warning"`` or ``"info"`` is reported and fails nothing.

    Artifacts: ``validation``, the full result as Great Expectations' JSON, and ``data_docs``, one HTML page that loads
    nothing from elsewhere; both are stored before the stage fails. Value: ``passed``. With ``suite="infer"`` the only
    artifact is ``suite``: expectations that the snapshot meets, to review, edit and keep beside the DAG.

    :param dataset: the Parquet snapshot: a file, or a directory of files.
    :param suite: a path or URI of a suite's JSON, the suite itself as a dict, or ``infer``.
    :param suite_parameters: values for each ``{"$PARAMETER": name}`` in the suite, such as the bounds of this run's window.
    :param engine: ``duckdb`` or ``pandas``.
    :param on_failure: ``fail``, or ``warn`` to log what failed and go on.
    :param max_offending: examples of offending values kept per failed expectation [values].
    :param memory_limit_mb: memory DuckDB may use before it spills to disk [MB].
    :param threads: threads of DuckDB [threads].
    :raises BadInput: a critical expectation failed and ``on_failure`` is ``fail``; the message names expectations, columns,
        counts and examples.
    :raises BadConfiguration: the suite does not exist, is no suite, or names an unknown expectation.
    """

    windowed: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("great-expectations", "duckdb", "pandas")
    extra: ClassVar[str] = "validate"
    outputs: ClassVar[tuple[str, ...]] = ("validation", "data_docs", "suite", "passed")

    dataset: ArtifactUri
    suite: str | dict[str, Any]
    suite_parameters: dict[str, Any] = field(default_factory=dict)
    engine: Literal["duckdb", "pandas"] = "duckdb"
    on_failure: Literal["fail", "warn"] = "fail"
    max_offending: int = 20
    memory_limit_mb: int = 1024
    threads: int = 2

    def input_digests(self, run: RunInfo) -> dict[str, str] | None:
        """The dataset's digest and that of the suite's content, so that an edited suite is a new result; None if it asks for now()."""
        digests = super().input_digests(run) or {}
        if self.suite == INFER:
            return digests
        suite = self._suite(run)
        if asks_for_now(suite):
            return None
        return digests if isinstance(self.suite, dict) else digests | {"suite": digest_of(suite)}

    def run(self, run: RunInfo) -> Result:
        require("duckdb", "ValidateData", self.extra)
        path = run.fetch(self.dataset)
        con = connect(
            run.workdir, memory_limit_mb=self.memory_limit_mb, threads=self.threads, readable=[path]
        )
        try:
            columns = _open(con, path)
            if self.suite == INFER:
                return self._infer(con, columns, run)
            require("great-expectations", "ValidateData", self.extra)
            return self._validate(con, path, columns, self._suite(run), run)
        finally:
            con.close()

    def _infer(self, con: duckdb.DuckDBPyConnection, columns: dict[str, str], run: RunInfo) -> Result:
        """Propose a suite that the snapshot meets, for a person to review."""
        source = split_pin(self.dataset)[0]
        (rows,) = fetch_row(con, "SELECT count(*) FROM dataset")
        if not rows:
            raise BadInput(
                f"{source} has no rows, so there is nothing to infer a suite from. Infer it from a full snapshot."
            )
        suite = propose_suite(con, "dataset", columns, Path(source), types=self.engine == "duckdb")
        artifact = run.save(f"{suite['name']}.json", json.dumps(suite, indent=2, ensure_ascii=False) + "\n")
        proposed = len(suite["expectations"])
        summary = f"proposed {proposed} expectations from {rows} rows, to review: {artifact.uri}"
        log.info(summary)
        return Result(summary, {"suite": artifact}, {}, {"rows": rows, "expectations": proposed})

    def _validate(
        self,
        con: duckdb.DuckDBPyConnection,
        path: Path,
        columns: Mapping[str, str],
        suite: dict[str, Any],
        run: RunInfo,
    ) -> Result:
        log.info("loading Great Expectations, which takes some seconds")
        with _quiet():
            validator = _validator(con, path, self.engine)
            expectations = _expectations(suite, self.suite_parameters, columns)
            log.info(
                "checking %d expectations of suite %r on %s", len(expectations), suite["name"], self.engine
            )
            results = _evaluate(validator, expectations, self.max_offending)
            report = _report(results, suite["name"], run.run_key, path.name)
            document = json.dumps(
                report.to_json_dict(), indent=1, sort_keys=True, ensure_ascii=False, default=_scalar
            )
            artifacts = {
                "validation": run.save("validation.json", document),
                "data_docs": run.save("data_docs.html", _html(report)),
            }
        (rows,) = fetch_row(con, "SELECT count(*) FROM dataset")
        failed = [r for r in results if not r.success]
        critical = [r for r in failed if severity(r) == "critical"]
        metrics = {
            "rows": rows,
            "expectations": len(results),
            "failed": len(failed),
            "failed_critical": len(critical),
        }
        if not failed:
            summary = f"{path.name}: all {len(results)} expectations of suite {suite['name']!r} hold on {rows} rows."
            return Result(summary, artifacts, {"passed": True}, metrics)
        where = f"suite {suite['name']!r} on {path.name} ({rows} rows)"
        text = failure_text(failed, len(results), where)
        links = f"Full result: {artifacts['validation'].uri} Data Docs: {artifacts['data_docs'].uri}"
        if critical and self.on_failure == "fail":
            raise BadInput(
                f"{text}\n{links}\nMend the data at its source and ingest again, or change the suite."
            )
        log.warning("%s\n%s", text, links)
        return Result(text.partition("\n")[0], artifacts, {"passed": not critical}, metrics)

    def _suite(self, run: RunInfo) -> dict[str, Any]:
        """Read the suite, from wherever the parameter says, and check that it has expectations."""
        if isinstance(self.suite, dict):
            return checked_suite(self.suite, "the suite given inline", "inline")
        uri = self.suite
        if "://" not in uri:
            local = Path(os.path.expanduser(uri)).absolute()
            if not split_pin(uri)[1] and not os.path.isfile(local):
                found = [p.name for p in local.parent.glob("*.json")] if os.path.isdir(local.parent) else []
                hint = did_you_mean(local.name, found)
                if not uri.startswith(("/", "~", ".")):
                    hint += f" suite='./{uri}' takes it from the DAG file's folder; without ./ it is the worker's."
                raise BadConfiguration(f"suite={self.suite!r}: there is no file {local}; {hint}")
            uri = str(local)
        try:
            loaded = json.loads(run.fetch(uri).read_text("utf-8"))
        except (ValueError, IsADirectoryError) as error:
            raise BadConfiguration(f"suite {self.suite} is not a JSON file: {error}.") from None
        return checked_suite(loaded, f"suite {self.suite}", Path(split_pin(uri)[0]).stem)


def _open(con: duckdb.DuckDBPyConnection, path: Path) -> dict[str, str]:
    """Make the view ``dataset`` of the Parquet, with NaN as NULL, as pandas has it; returns the columns and their types."""
    import duckdb

    source = str(path / "**" / "*.parquet") if path.is_dir() else str(path)
    parquet = f"read_parquet({literal(source)})"
    try:
        columns = {row[0]: row[1] for row in con.execute(f"DESCRIBE SELECT * FROM {parquet}").fetchall()}
    except duckdb.Error as error:
        raise unreadable(path, error) from None
    floats = [quote(name) for name, kind in columns.items() if kind in ("FLOAT", "DOUBLE")]
    replaced = ", ".join(f"{nan_as_null(name)} AS {name}" for name in floats)
    con.execute(f"CREATE VIEW dataset AS SELECT *{f' REPLACE ({replaced})' if floats else ''} FROM {parquet}")
    return columns


# -- Great Expectations -----------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own messages out of the task log: all that matters is in the results."""
    logger, nowhere = logging.getLogger("great_expectations"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False  # not by level: some of its modules set their own
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
        logger.propagate = propagate


def _validator(con: duckdb.DuckDBPyConnection, path: Path, engine: str) -> Validator:
    """Make a validator for the data, in a context that exists in memory only and sends nothing."""
    from great_expectations.core.batch import Batch
    from great_expectations.data_context import get_context
    from great_expectations.validator.validator import Validator

    context = get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = {"globally": False}
    obey_conditions()
    if engine == "pandas":
        import pyarrow.parquet as pq
        from great_expectations.execution_engine.pandas_batch_data import PandasBatchData

        from lepton_airflow.data.expectations_on_pandas import PandasEngine, frame_of

        in_memory = PandasEngine()
        batch = Batch(
            data=PandasBatchData(execution_engine=in_memory, dataframe=frame_of(pq.read_table(path)))
        )
        return Validator(execution_engine=in_memory, data_context=context, batches=[batch])

    from great_expectations.execution_engine.sqlalchemy_batch_data import SqlAlchemyBatchData

    from lepton_airflow.data.expectations import DuckDBExecutionEngine

    in_database = DuckDBExecutionEngine(con)
    batch = Batch(data=SqlAlchemyBatchData(execution_engine=in_database, table_name="dataset"))
    return Validator(execution_engine=in_database, data_context=context, batches=[batch])


def _expectations(
    suite: dict[str, Any], parameters: Mapping[str, Any], columns: Mapping[str, str]
) -> list[ExpectationConfiguration]:
    """Check each expectation of the suite; raises BadConfiguration with the first that is none."""
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    known = list_registered_expectation_implementations()
    checked = []
    for position, item in enumerate(suite["expectations"]):
        kind = item.get("type") or item.get("expectation_type") if isinstance(item, dict) else None
        where = f"suite {suite['name']!r}, expectation {position + 1}"
        if kind not in known:
            close = did_you_mean(str(kind), known)
            raise BadConfiguration(
                f"{where}: there is no expectation {kind!r}; {close.partition(' Known')[0]}"
            )
        asks = f"{where}: {kind}"
        kwargs = filled(item.get("kwargs", {}), parameters, asks)
        kwargs = as_held(whole_condition(kwargs, asks), columns, asks, str(kind))
        try:
            config = ExpectationConfiguration(
                type=kind,
                kwargs=kwargs,
                meta=item.get("meta"),
                severity=item.get("severity", "critical"),
                id=str(position),
            )
            config.to_domain_obj()
        except Exception as error:  # noqa: BLE001 - pydantic's, the parser's and GX's own share no base
            reason = " ".join(str(error).split())
            raise BadConfiguration(
                f"{where}: {call_text(str(kind), kwargs)} is not valid: {reason}"
            ) from None
        checked.append(config)
    return checked


def _evaluate(
    validator: Validator,
    expectations: list[ExpectationConfiguration],
    max_offending: int,
) -> list[ExpectationValidationResult]:
    """Evaluate without examples first, and look for examples only where unexpected values were counted.

    Great Expectations would scan once more for each expectation that is met, to look for examples; with a limit of 0
    examples it does not.
    """

    def ask(wanted: list[ExpectationConfiguration], result_format: str, examples: int) -> dict[str, Any]:
        configs = validator.process_expectations_for_validation(wanted)
        settings = {"result_format": result_format, "partial_unexpected_count": examples}
        runtime = {"catch_exceptions": True, "result_format": settings}
        found = validator.graph_validate(configurations=configs, runtime_configuration=runtime)
        return {str(r.expectation_config.id): r for r in found if r.expectation_config is not None}

    results = ask(expectations, "BASIC", 0)
    found = [c for c in expectations if results[str(c.id)].result.get("unexpected_count")]
    if found and max_offending:
        log.info("looking for examples of what %d expectations do not expect", len(found))
        results |= ask(found, "SUMMARY", max_offending)
    return [results[str(c.id)] for c in expectations]


def _report(
    results: list[ExpectationValidationResult], suite: str, run_key: str, file: str
) -> ExpectationSuiteValidationResult:
    """Make Great Expectations' own result of all expectations."""
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.validator.validator import calc_validation_statistics

    counted = calc_validation_statistics(results)
    names = (
        "evaluated_expectations", "successful_expectations", "unsuccessful_expectations", "success_percent",
    )  # fmt: skip
    return ExpectationSuiteValidationResult(
        results=results,
        success=counted.success,
        suite_name=suite,
        statistics={name: getattr(counted, name) for name in names},
        meta={"run_id": {"run_name": run_key}, "batch_spec": {"data_asset_name": file}},
    )


def _scalar(value: Any) -> Any:
    """Turn numpy's scalars, which some results hold, into values for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def _html(report: ExpectationSuiteValidationResult) -> str:
    """Render Great Expectations' page of the result, without what it would load from elsewhere."""
    from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    page = str(
        DefaultJinjaPageView().render(ValidationResultsPageRenderer(run_info_at_end=True).render(report))
    )
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL | re.IGNORECASE)
    page = re.sub(r"<(?:link|img)\b[^>]*>", "", page, flags=re.IGNORECASE)
    # The policy also stops scripts in the data.
    return page.replace("<head>", f"<head>{_HEAD}", 1)


_HEAD = """
    <meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
    <style>
      body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
      table { border-collapse: collapse; margin: .5em 0; }
      td, th { border: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top; }
      nav.navbar, button, .modal, .ge-walkthrough-modal, .card:has(.btn-group), footer { display: none; }
      /* the marks come from an icon font that is not loaded */
      .fa-check-circle::before { content: "\\2714"; color: #1a7f37; }
      .fa-times::before { content: "\\2718"; color: #b3261e; }
      .fa-exclamation-triangle::before { content: "\\26A0"; color: #9a6700; }
    </style>"""
