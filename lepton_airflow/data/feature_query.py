"""Compute features from a snapshot, by SQL or by a function, in a total order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.duckdb_types import portable
from lepton_airflow.data.splits import RESERVED, timestamp
from lepton_airflow.data.sql import (
    PARQUET,
    bind,
    column_types,
    literal,
    quote,
    select_statement,
    sql_message,
    total_order,
)
from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean, first_line
from lepton_airflow.sdk.code import is_code, load_code

if TYPE_CHECKING:
    import duckdb

    from lepton_airflow.contract import Window

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeatureQuery:
    """Computes features over the view ``snapshot``, or over its rows before a time.

    :ivar features: one SELECT over ``snapshot``, or ``module:function`` that takes its rows; None: all its columns.
    :ivar parameters: values bound to the SELECT by name, besides the window's.
    :ivar drop: columns of the result to leave out.
    :ivar time_column: the time of a row in the snapshot.
    :ivar first: columns by which the rows are ordered first.
    :ivar exact: columns whose values tell rows apart, ids and clusters: none is rounded.
    :ivar need_window: gives the run's window to whoever says what for.
    """

    con: duckdb.DuckDBPyConnection
    workdir: Path
    features: str | None
    parameters: Mapping[str, Any]
    drop: Sequence[str]
    time_column: str | None
    first: Sequence[str | None]
    exact: Sequence[str | None]
    memory_limit_mb: int
    need_window: Callable[[str], Window]

    def write(self, name: str, before: datetime | None = None) -> dict[str, str]:
        """Write the features in a total order to ``<name>.parquet`` and make the view ``<name>``.

        :return: the types of the columns as ``features`` gives them, before booleans become numbers.
        """
        target = self.workdir / f"{name}.parquet"
        with self._rows_before(before), self._in_one_sentence():
            select, values = self._select(name)
            types = column_types(self.con, select, values, "features")
            self._check_columns(types)
            kept = {c: k for c, k in types.items() if c not in self.drop}
            first = [c for c in self.first if c in kept]
            order = total_order(first, list(kept))
            columns = ", ".join(
                f"{portable(quote(c), k, exact=c in self.exact)} AS {quote(c)}" for c, k in kept.items()
            )
            self.con.execute(
                f"COPY (SELECT {columns} FROM (\n{select}\n) ORDER BY {order}) TO {literal(target)} ({PARQUET})",
                values,
            )
        self.con.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM read_parquet({literal(target)})")
        return kept

    @contextmanager
    def _rows_before(self, before: datetime | None) -> Iterator[None]:
        """Let ``snapshot`` hold only its rows before a time, for a while, by whatever qualified name it is read."""
        if before is None:
            yield
            return
        path = self.workdir / "earlier.parquet"
        time = quote(str(self.time_column))
        self.con.execute(
            f"COPY (SELECT * FROM snapshot WHERE CAST({time} AS TIMESTAMP) < {timestamp(before)}) TO {literal(path)} ({PARQUET})"
        )
        self.con.execute("ALTER VIEW snapshot RENAME TO __snapshot")
        try:
            self.con.execute(f"CREATE TEMP VIEW snapshot AS FROM read_parquet({literal(path)})")
            yield
        finally:
            self.con.execute("DROP VIEW IF EXISTS snapshot; ALTER VIEW __snapshot RENAME TO snapshot")

    def _select(self, name: str) -> tuple[str, dict[str, Any]]:
        """SQL of the features, and the values bound to it."""
        if self.features and is_code(self.features):
            return f"SELECT * FROM read_parquet({literal(self._call(name))})", {}
        statement = select_statement(self.con, self.features or "SELECT * FROM snapshot", "features")
        return statement.query, bind(statement, self.parameters, self.need_window, "features")

    def _check_columns(self, columns: Mapping[str, str]) -> None:
        for dropped in self.drop:
            if dropped not in columns:
                raise BadConfiguration(
                    f"drop: column {dropped!r} is not there; {did_you_mean(dropped, columns)}"
                )
        for reserved in RESERVED:
            if reserved in columns:
                raise BadConfiguration(
                    f"features has a column {reserved!r}, a name that the splits use: rename it with AS."
                )

    @contextmanager
    def _in_one_sentence(self) -> Iterator[None]:
        """Say in one sentence what DuckDB could not do with the user's SQL."""
        import duckdb

        try:
            yield
        except duckdb.OutOfMemoryException as error:
            raise BadConfiguration(
                f"features: {first_line(error)} Raise memory_limit_mb={self.memory_limit_mb}."
            ) from None
        except duckdb.PermissionException as error:
            raise BadConfiguration(
                f"features may read only the table snapshot: {sql_message(error)}"
            ) from None
        except duckdb.Error as error:
            there = ", ".join(column_types(self.con, "SELECT * FROM snapshot", {}, "snapshot"))
            kind = BadConfiguration if isinstance(error, duckdb.ProgrammingError) else BadInput
            raise kind(f"features: {sql_message(error)}. The table is snapshot({there}).") from None

    def _call(self, name: str) -> Path:
        """Call the user's function with the rows of the snapshot, and write its result as Parquet."""
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        reference = str(self.features)
        function = load_code(reference, "features")
        types = column_types(self.con, "SELECT * FROM snapshot", {}, "snapshot")
        columns = (  # pandas would have any DECIMAL as float64
            f"{portable(quote(c), k, exact=True)} AS {quote(c)}" if c in self.exact else quote(c)
            for c, k in types.items()
        )
        try:
            frame = function(self.con.execute(f"SELECT {', '.join(columns)} FROM snapshot").df())
        except Exception as error:
            log.exception("features=%r failed", reference)
            raise BadInput(
                f"features={reference!r} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(frame, pd.DataFrame):
            raise BadConfiguration(
                f"features={reference!r} returned {type(frame).__name__}, expected a pandas DataFrame."
            )
        names = frame.columns.map(str)
        doubles = names[names.str.lower().duplicated()]
        if len(doubles):
            raise BadConfiguration(
                f"features={reference!r} returned the column {doubles[0]!r} twice, also where capitals count for nothing: "
                "rename one."
            )
        try:
            table = pa.Table.from_pandas(frame.rename(columns=str), preserve_index=False)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise BadInput(
                f"features={reference!r} returned a column that Parquet cannot hold, such as one of mixed types: "
                f"{'; '.join(map(str, error.args))[:200]}"
            ) from None
        path = self.workdir / f"{name}-frame.parquet"
        pq.write_table(table, path)
        return path
