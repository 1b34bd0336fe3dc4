"""Great Expectations on DuckDB: an execution engine whose metrics are SQL over a view, so no row reaches Python.

Great Expectations does not support DuckDB, but queries every database through SQLAlchemy. So this module has what is
missing: a SQLAlchemy dialect over one open DuckDB connection, an engine that uses it, and metrics of its own for
uniqueness, where the original has window functions and wide self-joins, and for quantiles.

Import it only where ``great_expectations`` and ``duckdb`` are installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import duckdb
import sqlalchemy as sa
from great_expectations.core.metric_domain_types import MetricDomainTypes
from great_expectations.core.metric_function_types import MetricPartialFunctionTypes
from great_expectations.execution_engine import SqlAlchemyExecutionEngine
from great_expectations.expectations.metrics.column_aggregate_metric_provider import (
    ColumnAggregateMetricProvider,
)
from great_expectations.expectations.metrics.column_aggregate_metrics.column_outlier_statistics import (
    IQR_METHOD,
    ColumnOutlierStatistics,
    OutlierStatistics,
    validate_method,
)
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    ColumnPairMapMetricProvider,
    MulticolumnMapMetricProvider,
    column_condition_partial,
    column_pair_condition_partial,
    multicolumn_condition_partial,
)
from great_expectations.expectations.metrics.metric_provider import metric_value
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.sql.compiler import GenericTypeCompiler, IdentifierPreparer, SQLCompiler

from lepton_airflow.data.held_values import as_float, whole
from lepton_airflow.data.sql import quote

log = logging.getLogger(__name__)

_TELL_S = 10.0  # between two lines of progress in the log

# -- the dialect ------------------------------------------------------------------------------------------------------


class _Compiler(SQLCompiler):
    def visit_custom_op_binary(self, element: Any, operator: Any, **kw: Any) -> str:
        """PostgreSQL's ``~`` finds a pattern anywhere, as pandas does; DuckDB's ``~`` must match the whole text."""
        if operator.opstring not in ("~", "!~"):
            return super().visit_custom_op_binary(element, operator, **kw)
        text, pattern = (self.process(side, **kw) for side in (element.left, element.right))
        found = f"regexp_matches(CAST({text} AS VARCHAR), {pattern})"
        return found if operator.opstring == "~" else f"(NOT {found})"


class _TypeCompiler(GenericTypeCompiler):
    def visit_FLOAT(self, type_: Any, **kw: Any) -> str:
        return "DOUBLE"  # FLOAT has 4 bytes in DuckDB

    def visit_NUMERIC(self, type_: Any, **kw: Any) -> str:
        # Without a precision, DuckDB would take it for DECIMAL(18, 3).
        return "DOUBLE" if type_.precision is None else super().visit_NUMERIC(type_, **kw)


class _Preparer(IdentifierPreparer):
    def _requires_quotes(self, value: str) -> bool:
        return True  # DuckDB's reserved words are not those of SQLAlchemy, and names come from other people's files


class DuckDBDialect(DefaultDialect):
    """Writes SQL that DuckDB reads, and reports column types by their DuckDB names."""

    name = "duckdb"
    driver = "lepton"
    default_paramstyle = "qmark"
    statement_compiler = _Compiler
    type_compiler_cls = _TypeCompiler
    preparer = _Preparer
    supports_statement_cache = True
    supports_native_boolean = True
    div_is_floordiv = False

    @classmethod
    def import_dbapi(cls) -> Any:
        return duckdb

    def do_ping(self, dbapi_connection: Any) -> bool:
        return True

    def has_table(self, connection: Any, table_name: str, schema: str | None = None, **kw: Any) -> bool:
        return table_name in [row[0] for row in connection.exec_driver_sql("SHOW TABLES")]

    def get_pk_constraint(
        self, connection: Any, table_name: str, schema: str | None = None, **kw: Any
    ) -> Any:
        return {"constrained_columns": [], "name": None}

    def get_columns(self, connection: Any, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        rows = connection.exec_driver_sql(f"DESCRIBE {quote(table_name)}").fetchall()
        return [
            {"name": row[0], "type": _type_class(row[1])(), "nullable": True, "default": None} for row in rows
        ]


sa.dialects.registry.register("duckdb.lepton", __name__, "DuckDBDialect")

_types: dict[str, type[sa.types.TypeEngine[Any]]] = {}


def _type_class(name: str) -> type[sa.types.TypeEngine[Any]]:
    """The class for a DuckDB type: DECIMAL(10,2) becomes DECIMAL, VARCHAR[] stays as it is."""
    plain = name if name.endswith("]") else name.partition("(")[0]
    return _types.setdefault(plain, type(plain, (sa.types.TypeEngine,), {}))


class _TypeNames(SimpleNamespace):
    """What Great Expectations calls a dialect module: it compares types with an attribute such as ``BIGINT``."""

    def __getattr__(self, name: str) -> type[sa.types.TypeEngine[Any]]:
        try:
            return _type_class(str(duckdb.sqltype(name)))  # TEXT and STRING are VARCHAR
        except duckdb.Error:
            raise AttributeError(name) from None


class _Connection:
    """The one connection, as SQLAlchemy wants it. It stays open, and so keeps its views, limits and time zone."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self._queries, self._began, self._told = 0, time.monotonic(), time.monotonic()

    def cursor(self) -> _Cursor:
        return _Cursor(self)

    def tell(self) -> None:
        """Count a query, and log the progress every ten seconds."""
        self._queries += 1
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            log.info("query %d begins after %.0f s", self._queries, self._told - self._began)

    def commit(self) -> None:
        """DuckDB commits every statement by itself."""

    rollback = close = commit


class _Cursor:
    def __init__(self, connection: _Connection) -> None:
        self._owner = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Run a query. DuckDB compares nanoseconds with no time that has a zone; its own is UTC, so none is needed."""
        self._owner.tell()
        self._owner.connection.execute(sql, [_without_zone(whole(value)) for value in parameters])

    def fetchall(self) -> list[Any]:
        return [_as_floats(row) for row in self._owner.connection.fetchall()]

    def fetchmany(self, size: int = 1) -> list[Any]:
        return [_as_floats(row) for row in self._owner.connection.fetchmany(size)]

    def fetchone(self) -> Any:
        row = self._owner.connection.fetchone()
        return None if row is None else _as_floats(row)

    def __getattr__(self, name: str) -> Any:  # description, …
        return getattr(self._owner.connection, name)

    def close(self) -> None:
        """The connection outlives its cursors."""


def _without_zone(value: Any) -> Any:
    if isinstance(value, datetime) and value.tzinfo:
        return value.astimezone(UTC).replace(tzinfo=None)
    return value


def _as_floats(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(as_float, row))


# -- the engine -------------------------------------------------------------------------------------------------------


class DuckDBExecutionEngine(SqlAlchemyExecutionEngine):
    """Computes metrics over the tables and views of an open DuckDB connection.

    Great Expectations bundles aggregates into one query per domain. The caller closes the connection.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        engine = sa.create_engine(
            "duckdb+lepton://", creator=lambda: _Connection(connection), poolclass=sa.pool.StaticPool
        )
        super().__init__(engine=engine, create_temp_table=False)
        # By this class, Great Expectations chooses the SQL of regular expressions and LIKE; _Compiler does the rest.
        self.dialect_module = _TypeNames(__name__="duckdb", dialect=postgresql.dialect)

    def get_domain_records(self, domain_kwargs: Any) -> Any:
        """With a row_condition, its rows as a subquery: many metrics select from them, and SQLAlchemy 2.1 wants no bare SELECT."""
        rows = super().get_domain_records(domain_kwargs)
        return rows.subquery() if isinstance(rows, sa.Select) else rows


# -- metrics that are slow or differ ----------------------------------------------------------------------------------

_DOMAIN = ("batch_id", "table", "row_condition", "condition_parser", "ignore_row_if")
_PAIR = (*_DOMAIN, "column_A", "column_B")
_SEVERAL = (*_DOMAIN, "column_list")


def _duplicated(table: Any, columns: list[Any]) -> Any:
    """A condition that is true where a row's values occur more than once; nulls equal each other. It reads its own source.

    The original has a window function. A hash aggregate and a semi-join are 3 times as fast on 3 million distinct integers
    and twice as fast on a compound key, and no row is wider than the key.
    """
    row = sa.select(*columns).select_from(table).subquery("lepton_row")
    again = (
        sa.select(*columns)
        .select_from(table)
        .group_by(*columns)
        .having(sa.func.count() > 1)
        .subquery("lepton_again")
    )
    same = sa.and_(*(row.c[c.name].is_not_distinct_from(again.c[c.name]) for c in columns))
    duplicated = sa.exists(sa.select(sa.literal(1)).select_from(again).where(same).correlate(row))
    return (
        sa.select(*row.c, duplicated.label("lepton_duplicated")).subquery("lepton_source").c.lepton_duplicated
    )


class _ColumnValuesUnique(ColumnMapMetricProvider):
    condition_metric_name = "column_values.unique"

    @column_condition_partial(
        engine=DuckDBExecutionEngine, partial_fn_type=MetricPartialFunctionTypes.WINDOW_CONDITION_FN
    )
    def _duckdb(cls, column: Any, _table: Any, **kwargs: Any) -> Any:
        return sa.not_(_duplicated(_table, [column]))


class _CompoundColumnsUnique(MulticolumnMapMetricProvider):
    condition_metric_name = "compound_columns.unique"

    @multicolumn_condition_partial(
        engine=DuckDBExecutionEngine, partial_fn_type=MetricPartialFunctionTypes.WINDOW_CONDITION_FN
    )
    def _duckdb(cls, column_list: list[Any], _table: Any, **kwargs: Any) -> Any:
        return sa.not_(_duplicated(_table, column_list))


def _surely(condition: Any) -> Any:
    """The condition, false where a value is missing: as on pandas, where nothing compares with NaN. SQL would count neither."""
    return sa.func.coalesce(condition, sa.false())


class _PairGreater(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.a_greater_than_b"
    condition_domain_keys = _PAIR
    condition_value_keys = ("or_equal",)

    @column_pair_condition_partial(engine=DuckDBExecutionEngine)
    def _duckdb(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N803 - names of Great Expectations
        return _surely(column_A >= column_B if kwargs.get("or_equal") else column_A > column_B)


class _PairEqual(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.equal"
    condition_domain_keys = _PAIR
    condition_value_keys = ()

    @column_pair_condition_partial(engine=DuckDBExecutionEngine)
    def _duckdb(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N803
        return _surely(column_A == column_B)


class _PairInSet(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.in_set"
    condition_domain_keys = _PAIR
    condition_value_keys = ("value_pairs_set",)

    @column_pair_condition_partial(engine=DuckDBExecutionEngine)
    def _duckdb(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N803
        pairs = kwargs.get("value_pairs_set")
        if pairs is None:
            return sa.true()
        return _surely(sa.or_(sa.false(), *(sa.and_(column_A == a, column_B == b) for a, b in pairs)))


class _MulticolumnSum(MulticolumnMapMetricProvider):
    condition_metric_name = "multicolumn_sum.equal"
    condition_domain_keys = _SEVERAL
    condition_value_keys = ("sum_total",)

    @multicolumn_condition_partial(engine=DuckDBExecutionEngine)
    def _duckdb(cls, column_list: list[Any], **kwargs: Any) -> Any:
        return _surely(sum(column_list) == kwargs.get("sum_total"))


def _rows_and_column(engine: DuckDBExecutionEngine, domain: dict[str, Any]) -> tuple[Any, Any]:
    """What a metric of one column selects from, and the column."""
    rows, _, accessor = engine.get_compute_domain(domain, domain_type=MetricDomainTypes.COLUMN)
    return rows, sa.column(accessor["column"])


class _OutlierStatistics(ColumnOutlierStatistics):
    @metric_value(engine=DuckDBExecutionEngine)
    def _duckdb(
        cls,
        execution_engine: DuckDBExecutionEngine,
        metric_domain_kwargs: dict[str, Any],
        metric_value_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> OutlierStatistics:
        """The quartiles, interpolated as by pandas; or mean and standard deviation."""
        validate_method(metric_value_kwargs["method"])
        rows, name = _rows_and_column(execution_engine, metric_domain_kwargs)
        column = sa.cast(name, sa.Float)
        of_iqr = metric_value_kwargs["method"] == IQR_METHOD
        asked = (
            (sa.func.quantile_cont(column, 0.25), sa.func.quantile_cont(column, 0.75))
            if of_iqr
            else (sa.func.avg(column), sa.func.stddev_samp(column))
        )
        one, two = execution_engine.execute_query(sa.select(*asked).select_from(rows)).fetchone()
        if not of_iqr:
            return OutlierStatistics.symmetric(center=one, spread=two)
        spread = None if one is None or two is None else two - one
        return OutlierStatistics(lower_reference=one, upper_reference=two, spread=spread)


class _ColumnQuantileValues(ColumnAggregateMetricProvider):
    metric_name = "column.quantile_values"
    value_keys = ("quantiles", "allow_relative_error")

    @metric_value(engine=DuckDBExecutionEngine)
    def _duckdb(
        cls,
        execution_engine: DuckDBExecutionEngine,
        metric_domain_kwargs: dict[str, Any],
        metric_value_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> list[Any]:
        """Compute all quantiles from one copy of the column; the original's percentile_disc holds one copy for each."""
        rows, column = _rows_and_column(execution_engine, metric_domain_kwargs)
        quantiles = [float(q) for q in metric_value_kwargs["quantiles"]]
        found = sa.func.quantile_disc(column, sa.literal_column(str(quantiles)))
        row = execution_engine.execute_query(sa.select(found).select_from(rows)).fetchone()
        return list(row[0]) if row is not None and row[0] is not None else [None] * len(quantiles)
