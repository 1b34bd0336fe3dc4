"""PrepareData: a snapshot becomes features, disjoint splits and a reference profile."""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import split_pin
from lepton_airflow.data.dataset import (
    PARQUET,
    DatasetInfo,
    bind,
    column_types,
    connect,
    first_line,
    info_sql,
    literal,
    quote,
    select_statement,
    total_order,
)
from lepton_airflow.data.profile import reference_profile
from lepton_airflow.errors import BadConfiguration, BadInput, did_you_mean, require
from lepton_airflow.sdk.code import is_code, load_code
from lepton_airflow.sdk.fingerprint import cache_key
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, Result, RunInfo, Stage

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_INFERRED_CLASSES = 20  # a whole-number target with more distinct values is taken for a number to regress on
_MOST_CLASSES = 1000
_MANY_CATEGORIES = 10_000
_ROWS_TO_ACCUSE = (
    20  # with fewer, a feature may follow the target exactly by chance: two points lie on a line
)
_SPLIT, _TIME, _ROW = "__split", "__time", "__row"


@dataclass(kw_only=True)
class PrepareData(Stage):
    """Make features from a snapshot and split the rows so that no split sees another's future, group or row.

    All columns of the result are features except target, ``time_column``, ``cluster_column``, ``id_columns`` and
    ``drop``. Text is a category and everything else a number; booleans become 0 and 1.

    With ``split="time"`` train lies strictly before valid, and valid strictly before test; rows of one time, and of
    one cluster, stay together. The features of the rows before each cut are then computed a second time *without*
    the later rows, and must come out the same (``leak_check``), for SQL and for functions.

    :param snapshot: a Parquet snapshot, such as ``ingest.output["snapshot"]``.
    :param target: column to predict.
    :param features: one DuckDB SELECT over the table ``snapshot``, or ``module:function`` that takes the snapshot as
        a DataFrame and returns one; null: the snapshot's own columns. A function is held in memory, SQL is not.
    :param parameters: values bound to the SELECT by name, besides ``$window_start`` and ``$window_end``.
    :param task: classification or regression; null: classification for text, booleans and whole numbers of at most
        20 distinct values.
    :param split: time, group (whole ``cluster_column`` values) or random.
    :param time_column: date or timestamp of a row; one without a time zone is compared with UTC bounds digit by digit.
    :param cluster_column: rows with an equal value depend on one another (one day's flights, one patient).
    :param id_columns: columns kept in the files that no model sees.
    :param drop: columns of the result that are left out.
    :param stratify: keep the classes' shares in every split of a random split.
    :param valid_fraction: share of the rows outside test that validate [share, 0 to 1]; 0: no such split.
    :param test_fraction: share of the rows that test [share, 0 to 1]; 0: no such split. Not used with test_start.
    :param valid_start: time at which valid starts, ISO 8601, or window_start; replaces valid_fraction.
    :param test_start: time at which test starts, ISO 8601, or window_start; replaces test_fraction.
    :param seed: of the group and random splits.
    :param drop_missing_target: leave rows without a target out; else they are an error.
    :param leak_check: refuse features that change when later rows are taken away, or that repeat the target.
    :param memory_limit_mb: what DuckDB may hold; the rest is spilled to disk [MB].
    :param threads: threads of DuckDB; the result does not depend on it.
    :raises BadInput: the data cannot be split, learnt from, or leaks.
    :raises BadConfiguration: a column or a combination of parameters does not exist.
    """

    snapshot: ArtifactUri
    target: str
    features: CodeRef | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    task: Literal["classification", "regression"] | None = None
    split: Literal["time", "group", "random"] = "time"
    time_column: str | None = None
    cluster_column: str | None = None
    id_columns: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    stratify: bool = True
    valid_fraction: float = 0.2
    test_fraction: float = 0.2
    valid_start: str | None = None
    test_start: str | None = None
    seed: int = 0
    drop_missing_target: bool = False
    leak_check: bool = True
    memory_limit_mb: int = 1024
    threads: int = 2

    engines: ClassVar[tuple[str, ...]] = ("duckdb", "pandas", "pyarrow")
    extra: ClassVar[str] = "prepare"
    outputs: ClassVar[tuple[str, ...]] = ("train", "valid", "test", "profile", "splits")

    def run(self, run: RunInfo) -> Result:
        """Compute the features, split, check, profile and save.

        :return: artifacts ``train``, ``valid`` and ``test`` (those that exist) and ``profile``; value ``splits``
            (rows and time range of each).
        """
        require("duckdb", "PrepareData", self.extra)
        self._check_parameters()
        path = run.fetch(self.snapshot)
        sha256 = split_pin(self.snapshot)[1] or run.store.digest(self.snapshot)
        con = connect(
            run.workdir, memory_limit_mb=self.memory_limit_mb, threads=self.threads, readable=[path]
        )
        try:
            return self._prepare(con, run, path, sha256)
        finally:
            con.close()

    def _check_parameters(self) -> None:
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise BadConfiguration(f"{name}={getattr(self, name)}: expected a share from 0 to below 1.")
        if self.split == "time" and not self.time_column:
            raise BadConfiguration("split='time' needs time_column: name the column that orders the rows.")
        if self.split == "group" and not self.cluster_column:
            raise BadConfiguration(
                "split='group' needs cluster_column: name the column whose values stay together."
            )
        if self.split == "random" and self.cluster_column:
            raise BadConfiguration(
                f"split='random' would tear the clusters of {self.cluster_column!r} apart: use split='group' or 'time'."
            )
        if self.split != "time" and (self.valid_start or self.test_start):
            raise BadConfiguration(
                f"valid_start and test_start belong to split='time', and split is {self.split!r}."
            )

    # -- the run ----------------------------------------------------------------------------------------------------

    def _prepare(self, con: duckdb.DuckDBPyConnection, run: RunInfo, path: Path, sha256: str) -> Result:
        import duckdb

        try:
            scan = f"read_parquet({literal(path)})"
            there = column_types(con, f"SELECT * FROM {scan}", {}, "snapshot")
            columns = ", ".join(f"{_microseconds(quote(c), k)} AS {quote(c)}" for c, k in there.items())
            con.execute(f"CREATE TEMP VIEW snapshot AS SELECT {columns} FROM {scan}")
        except duckdb.Error as error:
            raise BadInput(
                f"snapshot {split_pin(self.snapshot)[0]} is not readable Parquet: {first_line(error)}"
            ) from None
        table = _Features(self, con, run).write("features", None)
        (rows,) = _row(con, f"SELECT count(*) FROM {table}")
        if not rows:
            raise BadInput(
                "features gives no row: check its conditions, and that the snapshot has the rows it asks for."
            )
        kinds = self._column_kinds(con, table)
        info = self._info(con, run, table, kinds, sha256)
        missing = self._check_target(con, table, info)
        assigned = self._assign(con, run, table, info, kinds)
        splits = self._splits(con, info, assigned, kinds)
        info = replace(info, classes=self._classes(con, info, assigned, list(splits)))
        self._check_features(con, info, assigned)
        if self.leak_check:
            if splits["train"][0] >= _ROWS_TO_ACCUSE:
                self._check_target_leaks(con, info, assigned)
            self._check_future(con, run, table, kinds, assigned, splits)
        run.check_stop()
        artifacts = {}
        for name, (rows, time_range) in splits.items():
            described = replace(info, split=name, rows=rows, time_range=time_range)
            file = run.workdir / f"{name}.parquet"
            columns = ", ".join(map(quote, kinds))
            con.execute(
                f"COPY (SELECT {columns} FROM {assigned} WHERE {_SPLIT} = '{name}' ORDER BY {_ROW}) TO {literal(file)} "
                f"({PARQUET}, {info_sql(described)})"
            )
            artifacts[name] = run.save(f"{name}.parquet", file)
            log.info(
                "%s: %d rows%s", name, rows, f", {time_range[0]} to {time_range[1]}" if time_range else ""
            )
        con.execute(f"CREATE TEMP VIEW train AS SELECT * FROM {assigned} WHERE {_SPLIT} = 'train'")
        rows, time_range = splits["train"]
        profile = reference_profile(
            con, "train", replace(info, split="train", rows=rows, time_range=time_range), run.window
        )
        artifacts["profile"] = run.save(
            "profile.json", json.dumps(profile, ensure_ascii=False, allow_nan=False)
        )
        counts = ", ".join(f"{rows} {name}" for name, (rows, _) in splits.items())
        metrics: dict[str, float | None] = {f"rows_{name}": rows for name, (rows, _) in splits.items()}
        return Result(
            summary=f"{len(info.features)} features to predict {self.target!r} ({info.task}); rows: {counts}"
            + (f"; {missing} without a target left out." if missing else "."),
            artifacts=artifacts,
            values={
                "splits": {name: {"rows": rows, "time_range": span} for name, (rows, span) in splits.items()}
            },
            metrics=metrics | {"features": len(info.features), "rows_without_target": missing},
        )

    def _column_kinds(self, con: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
        kinds = column_types(con, f"SELECT * FROM {table}", {}, "features")
        roles: dict[str, list[str | None]] = {
            "target": [self.target],
            "time_column": [self.time_column],
            "cluster_column": [self.cluster_column],
        }
        roles["id_columns"] = list(self.id_columns)
        for role, names in roles.items():
            for name in names:
                if name is not None and name not in kinds:
                    raise BadConfiguration(
                        f"{role}: column {name!r} is not among the features' columns; {did_you_mean(name, kinds)}"
                    )
        if self.time_column and not _is_time(kinds[self.time_column]):
            raise BadConfiguration(
                f"time_column {self.time_column!r} is {kinds[self.time_column]}, expected a date or a timestamp: "
                "make one in features, e.g. CAST(… AS TIMESTAMP)."
            )
        return kinds

    def _info(
        self, con: duckdb.DuckDBPyConnection, run: RunInfo, table: str, kinds: dict[str, str], sha256: str
    ) -> DatasetInfo:
        """What is a feature, a category, a class."""
        others = {self.target, self.time_column, self.cluster_column, *self.id_columns}
        features = [name for name in kinds if name not in others]
        if not features:
            raise BadConfiguration(
                f"no feature is left: the columns are {', '.join(kinds)}, all of them target, time, cluster or id."
            )
        for name in features:
            if kinds[name] not in (*_WHOLE, "FLOAT", "DOUBLE", "VARCHAR"):
                raise BadConfiguration(
                    f"feature {name!r} is {kinds[name]}: expected a number or text. Derive one in features, or name it in "
                    "id_columns or drop."
                )
        kind = kinds[self.target]
        if kind not in (*_WHOLE, "FLOAT", "DOUBLE", "VARCHAR"):
            raise BadConfiguration(f"target {self.target!r} is {kind}: expected a number, text or a boolean.")
        (distinct,) = _row(con, f"SELECT approx_count_distinct({quote(self.target)}) FROM {table}")
        few = kind in _WHOLE and distinct <= _INFERRED_CLASSES
        task = self.task or ("classification" if kind == "VARCHAR" or few else "regression")
        if task == "regression" and kind == "VARCHAR":
            raise BadConfiguration(
                f"target {self.target!r} is text, which task='regression' cannot predict: cast it to a number."
            )
        if task == "classification" and kind in ("FLOAT", "DOUBLE"):
            raise BadConfiguration(
                f"target {self.target!r} is {kind}, which task='classification' does not take as a class: "
                "cast it to INTEGER or VARCHAR in features."
            )
        # Splits of one id share no row, so all that moves a row to another split must change the id: the window too.
        division = cache_key(replace(self, memory_limit_mb=0, threads=0), run)
        return DatasetInfo(
            target=self.target,
            task=task,
            features=features,
            categorical=[name for name in features if kinds[name] == "VARCHAR"],
            time_column=self.time_column,
            cluster_column=self.cluster_column,
            split_id=str(division)[:32],
            snapshot_sha256=sha256,
        )

    def _check_target(self, con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> int:
        """The number of rows without a target; raises BadInput when what is there cannot be learnt."""
        target = quote(self.target)
        rows, known = _row(con, f"SELECT count(*), count({target}) FROM {table}")
        if not known:
            raise BadInput(
                f"target {self.target!r} is missing in all {rows} rows: check the column, or where it comes from."
            )
        if known < rows and not self.drop_missing_target:
            raise BadInput(
                f"target {self.target!r} is missing in {rows - known} of {rows} rows: leave those out in features, or set "
                "drop_missing_target=true."
            )
        if info.task == "regression":
            nan, infinite = _row(
                con,
                f"SELECT count(*) FILTER (isnan({target}::DOUBLE)), count(*) FILTER (isinf({target}::DOUBLE)) FROM {table}",
            )
            if nan or infinite:
                raise BadInput(
                    f"target {self.target!r} is NaN in {nan} and infinite in {infinite} of {rows} rows: expected finite "
                    "numbers; correct them where they come from, or leave those rows out in features."
                )
        return int(rows - known)

    def _check_features(self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str) -> None:
        numbers = [n for n in info.features if n not in info.categorical]
        bad = (
            _row(con, f"SELECT {_each('count(*) FILTER (isinf({}::DOUBLE))', numbers)} FROM {assigned}")
            if numbers
            else ()
        )
        for name, count in zip(numbers, bad, strict=True):
            if count:
                raise BadInput(
                    f"feature {name!r} is infinite in {count} rows: expected finite numbers or missing values; correct it in features."
                )
        known = _row(
            con, f"SELECT {_each('count({})', info.features)} FROM {assigned} WHERE {_SPLIT} = 'train'"
        )
        for name, count in zip(info.features, known, strict=True):
            if not count:
                log.warning("feature %r is missing in every row of train: it tells a model nothing.", name)
        if info.categorical:
            distinct = _row(
                con, f"SELECT {_each('approx_count_distinct({})', info.categorical)} FROM {assigned}"
            )
            for name, count in zip(info.categorical, distinct, strict=True):
                if count > _MANY_CATEGORIES:
                    log.warning(
                        "feature %r has about %d categories: a one-hot encoding of it is that wide; consider id_columns, "
                        "drop, or grouping the rare ones in features.", name, count,
                    )  # fmt: skip

    # -- splits -----------------------------------------------------------------------------------------------------

    def _assign(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        table: str,
        info: DatasetInfo,
        kinds: dict[str, str],
    ) -> str:
        """A view of the rows with the name of their split."""
        time = f"CAST({quote(self.time_column)} AS TIMESTAMP)" if self.time_column else "NULL::TIMESTAMP"
        con.execute(
            f"CREATE TEMP VIEW known AS SELECT * EXCLUDE (file_row_number), file_row_number AS {_ROW}, {time} AS {_TIME} "
            f"FROM read_parquet({literal(run.workdir / f'{table}.parquet')}, file_row_number=true) "
            f"WHERE {quote(self.target)} IS NOT NULL"
        )
        for name in filter(None, (self.time_column, self.cluster_column)):
            (missing,) = _row(con, f"SELECT count(*) FROM known WHERE {quote(name)} IS NULL")
            if missing:
                raise BadInput(
                    f"column {name!r} is missing in {missing} rows, which then belong to no split: leave them out in features."
                )
        rule = {"time": self._by_time, "group": self._by_group, "random": self._by_chance}[self.split]
        file = run.workdir / "assigned.parquet"
        con.execute(f"COPY ({rule(con, run, info)}) TO {literal(file)} ({PARQUET})")
        con.execute(f"CREATE TEMP VIEW assigned AS SELECT * FROM read_parquet({literal(file)})")
        return "assigned"

    def _by_time(self, con: duckdb.DuckDBPyConnection, run: RunInfo, info: DatasetInfo) -> str:
        key = _TIME
        if self.cluster_column:
            # A cluster goes as a whole to where it begins, so a cut inside a day moves to the day's end.
            con.execute(
                f"CREATE TEMP VIEW placed AS SELECT *, min({_TIME}) OVER (PARTITION BY {quote(self.cluster_column)}) AS __start FROM known"
            )
            key = "__start"
        else:
            con.execute("CREATE TEMP VIEW placed AS SELECT * FROM known")
        test = self._cut(con, run, "test_start", self.test_fraction, key, None)
        valid = self._cut(con, run, "valid_start", self.valid_fraction, key, test)
        cases = f"CASE WHEN {key} >= {_time(test)} THEN 'test' " if test else "CASE "
        cases += f"WHEN {key} >= {_time(valid)} THEN 'valid' " if valid else "WHEN false THEN '' "
        return f"SELECT * {'EXCLUDE (__start)' if self.cluster_column else ''}, {cases} ELSE 'train' END AS {_SPLIT} FROM placed"

    def _cut(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        name: str,
        fraction: float,
        key: str,
        end: datetime | None,
    ) -> datetime | None:
        """The time at which a split begins: as stated, or such that the rows from it on are about the fraction."""
        stated = getattr(self, name)
        if stated in ("window_start", "window_end"):
            window = run.need_window(f"{name}={stated!r}")
            stated = getattr(window, stated.removeprefix("window_"))
        if stated:
            try:
                moment = datetime.fromisoformat(stated)
            except ValueError:
                raise BadConfiguration(
                    f"{name}={stated!r} is not a time: expected ISO 8601 or window_start."
                ) from None
            moment = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
            if end is not None and moment >= end:
                raise BadConfiguration(
                    f"{name}={stated!r} does not lie before the start of test, {end.isoformat()}."
                )
            return moment
        if not fraction:
            return None
        before = f"WHERE {key} < {_time(end)}" if end else ""
        (rows,) = _row(con, f"SELECT count(*) FROM placed {before}")
        found = con.execute(
            f"SELECT {key} FROM (SELECT {key}, row_number() OVER (ORDER BY {key}) AS n FROM placed {before}) WHERE n = $1",
            [math.floor(rows * (1 - fraction)) + 1],
        ).fetchone()
        return found[0] if found else None

    def _by_group(self, con: duckdb.DuckDBPyConnection, run: RunInfo, info: DatasetInfo) -> str:
        group = quote(str(self.cluster_column))
        return (
            f"WITH groups AS (SELECT {group} AS g, count(*) AS n, md5('{self.seed}:' || {group}::TEXT) AS h FROM known GROUP BY ALL), "
            "placed AS (SELECT g, (sum(n) OVER (ORDER BY h, g) - n) / sum(n) OVER () AS place FROM groups) "
            f"SELECT known.*, {self._shares()} AS {_SPLIT} FROM known JOIN placed ON known.{group} = placed.g"
        )

    def _by_chance(self, con: duckdb.DuckDBPyConnection, run: RunInfo, info: DatasetInfo) -> str:
        strata = (
            f"PARTITION BY {quote(self.target)}" if self.stratify and info.task == "classification" else ""
        )
        return (
            f"SELECT * EXCLUDE (place), {self._shares()} AS {_SPLIT} FROM (SELECT *, (row_number() OVER ({strata} "
            f"ORDER BY md5('{self.seed}:' || {_ROW}), {_ROW}) - 1) / count(*) OVER ({strata}) AS place FROM known)"
        )

    def _shares(self) -> str:
        """Which split a place from 0 to below 1 belongs to; train comes first, so it gets what cannot be divided."""
        outside = round(
            1 - self.test_fraction, 9
        )  # 0.8 * 0.75 is a little more than 0.6, and so one row more
        train = round(outside * (1 - self.valid_fraction), 9)
        return (
            f"CASE WHEN place < {train!r} THEN 'train' WHEN place < {outside!r} THEN 'valid' ELSE 'test' END"
        )

    def _splits(
        self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str, kinds: dict[str, str]
    ) -> dict[str, tuple[int, list[str] | None]]:
        """Rows and time range of each split, train first; raises BadInput when one is empty or they overlap in time."""
        found = {
            name: (rows, low, high)
            for name, rows, low, high in con.execute(
                f"SELECT {_SPLIT}, count(*), min({_TIME}), max({_TIME}) FROM {assigned} GROUP BY {_SPLIT}"
            ).fetchall()
        }
        wanted = ["train"]
        wanted += ["valid"] if self.valid_start or self.valid_fraction else []
        wanted += ["test"] if self.test_start or self.test_fraction else []
        for name in wanted:
            if name not in found:
                low, high = _row(con, f"SELECT min({_TIME}), max({_TIME}) FROM {assigned}")
                span = f" (times {low} to {high})" if self.time_column else ""
                unit = (
                    f" in {_row(con, f'SELECT count(DISTINCT {quote(self.cluster_column)}) FROM {assigned}')[0]} clusters"
                    if self.cluster_column
                    else ""
                )
                raise BadInput(
                    f"split {name!r} has no row: {sum(r for r, *_ in found.values())} rows{unit}{span} went to "
                    f"{', '.join(sorted(found))}. Change its start or fraction, or bring more data."
                )
        if self.split == "time":
            for earlier, later in itertools.pairwise(wanted):
                if not found[earlier][2] < found[later][1]:
                    raise BadInput(
                        f"clusters of {self.cluster_column!r} overlap in time: {earlier} would reach to {found[earlier][2]} and "
                        f"{later} begin at {found[later][1]}. Cluster by something shorter, or use split='group'."
                    )
        kind = kinds.get(str(self.time_column), "")

        def text(moment: datetime) -> str:
            if kind == "DATE":  # as the last time of a range it means the whole day
                return moment.date().isoformat()
            return moment.replace(tzinfo=UTC if _has_zone(kind) else None).isoformat()

        return {
            name: (rows, [text(low), text(high)] if low else None)
            for name, (rows, low, high) in ((name, found[name]) for name in wanted)
        }

    def _classes(
        self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str, splits: list[str]
    ) -> list[Any]:
        if info.task != "classification":
            return []
        target = quote(self.target)
        found: dict[str, list[Any]] = {name: [] for name in splits}
        for name, value in con.execute(
            f"SELECT DISTINCT {_SPLIT}, {target} FROM {assigned} ORDER BY {target} LIMIT {5 * _MOST_CLASSES}"
        ).fetchall():
            found[name].append(value)
        classes = found["train"]
        if len(classes) > _MOST_CLASSES:
            raise BadInput(
                f"target {self.target!r} has more than {_MOST_CLASSES} classes in train: is it an id? Group them, or set task='regression'."
            )
        if len(classes) < 2:
            raise BadInput(
                f"target {self.target!r} has only the class {classes[0]!r} in train: expected at least two; take more data or another target."
            )
        for name in splits[1:]:
            for value in found[name]:
                if value not in classes:
                    raise BadInput(
                        f"class {value!r} of target {self.target!r} occurs in {name} and not in train: group rare classes "
                        "in features, or move the start of the split."
                    )
        return classes

    # -- leaks ------------------------------------------------------------------------------------------------------

    def _check_target_leaks(self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str) -> None:
        """Refuse a feature that is the target under another name; warn of one that tells the classes apart alone."""
        train, target = f"{assigned} WHERE {_SPLIT} = 'train'", quote(self.target)
        numbers = [n for n in info.features if n not in info.categorical]
        copies: list[str] = []
        if info.task == "regression":
            linear = (
                _row(con, f"SELECT {_each(f'corr({{}}::DOUBLE, {target}::DOUBLE)', numbers)} FROM {train}")
                if numbers
                else ()
            )
            copies = [n for n, r in zip(numbers, linear, strict=True) if r is not None and abs(r) > 1 - 1e-9]
        else:
            distinct = _row(con, f"SELECT {_each('approx_count_distinct({})', info.features)} FROM {train}")
            for name, about in zip(info.features, distinct, strict=True):
                if about <= 2 * len(
                    info.classes
                ):  # approximate; the exact counts follow for the few that pass
                    pairs = con.execute(f"SELECT DISTINCT {quote(name)}, {target} FROM {train}").fetchall()
                    if len(pairs) == len({p[0] for p in pairs}) == len(info.classes):
                        copies.append(name)
        if copies:
            raise BadInput(
                f"feature {copies[0]!r} tells the target {self.target!r} exactly in every row of train: it is the target "
                "under another name. Leave it out in features or name it in drop; leak_check=false keeps it."
            )
        if info.task == "classification" and len(info.classes) == 2 and numbers:
            one = con.execute(
                f"SELECT {target}, {_each('min({0}), max({0})', numbers)} FROM {train} GROUP BY 1"
            ).fetchall()
            for index, name in enumerate(numbers):
                (low, high), (low2, high2) = (row[1 + 2 * index : 3 + 2 * index] for row in one)
                if None not in (low, high, low2, high2) and (high < low2 or high2 < low):
                    log.warning(
                        "feature %r separates the classes perfectly by itself: is it known before the target?",
                        name,
                    )

    def _check_future(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        table: str,
        kinds: dict[str, str],
        assigned: str,
        splits: dict[str, tuple[int, list[str] | None]],
    ) -> None:
        """Refuse features of earlier rows that depend on later rows."""
        if self.split != "time" or self.features is None or len(splits) == 1:
            return
        time = str(self.time_column)
        there = column_types(con, "SELECT * FROM snapshot", {}, "snapshot")
        if not _is_time(there.get(time, "")):
            log.warning(
                "leak_check: the snapshot has no time column %r, so that features look ahead cannot be ruled out.",
                time,
            )
            return
        for name in list(splits)[1:]:
            (cut,) = _row(con, f"SELECT min({_TIME}) FROM {assigned} WHERE {_SPLIT} = '{name}'")
            part = _Features(self, con, run).write(f"before_{name}", cut)
            key = f"CAST({quote(time)} AS TIMESTAMP)"
            all_rows = _fingerprint(
                con, f"(SELECT *, {key} AS {_TIME} FROM {table} WHERE {key} < {_time(cut)})", kinds
            )
            without = _fingerprint(con, f"(SELECT *, {key} AS {_TIME} FROM {part})", kinds)
            different = [c for c in all_rows if not _alike(all_rows[c], without[c])]
            if different:
                what = "the number of rows" if different[0] == "*" else f"column {different[0]!r}"
                raise BadInput(
                    f"features look into the future: {what} before {cut} changes when the rows from then on are taken "
                    "away. Let windows and aggregates reach over earlier rows only, and give them an order; "
                    "leak_check=false accepts it, for what is known beforehand."
                )
            log.info("leak_check: the rows before %s (%s) do not depend on later ones", cut, name)


@dataclass
class _Features:
    """Computes the features, over the whole snapshot or over its rows before a time."""

    stage: PrepareData
    con: duckdb.DuckDBPyConnection
    run: RunInfo

    def write(self, name: str, before: datetime | None) -> str:
        """Write the features in a total order to ``<name>.parquet`` and make the view ``<name>``."""
        import duckdb

        stage = self.stage
        if before is not None:
            path = str(self.run.workdir / "earlier.parquet")
            time = quote(str(stage.time_column))
            self.con.execute(
                f"COPY (SELECT * FROM snapshot WHERE CAST({time} AS TIMESTAMP) < {_time(before)}) TO {literal(Path(path))} ({PARQUET})"
            )
        # The user's SELECT calls it snapshot in both cases; a WITH shadows the view for the rows before a time.
        source = (
            f"read_parquet({literal(self.run.workdir / 'earlier.parquet')})"
            if before is not None
            else "snapshot"
        )
        values: dict[str, Any] = {}
        try:
            if stage.features and is_code(stage.features):
                select = f"SELECT * FROM read_parquet({literal(self._call(source, name))})"
            else:
                statement = select_statement(self.con, stage.features or "SELECT * FROM snapshot", "features")
                values = bind(statement, stage.parameters, self.run.need_window, "features")
                select = statement.query
                if before is not None:
                    select = f"WITH snapshot AS (SELECT * FROM {source}) SELECT * FROM (\n{select}\n)"
            kinds = column_types(self.con, select, values, "features")
            for dropped in stage.drop:
                if dropped not in kinds:
                    raise BadConfiguration(
                        f"drop: column {dropped!r} is not there; {did_you_mean(dropped, kinds)}"
                    )
            for reserved in (_SPLIT, _TIME, _ROW, "file_row_number", "__start", "place"):
                if reserved in kinds:
                    raise BadConfiguration(
                        f"features has a column {reserved!r}, a name that the splits use: rename it with AS."
                    )
            kept = {c: k for c, k in kinds.items() if c not in stage.drop}
            first = [c for c in (stage.time_column, stage.cluster_column) if c in kept]
            order = total_order(first, list(kept))
            columns = ", ".join(f"{_plain(quote(c), k)} AS {quote(c)}" for c, k in kept.items())
            target = self.run.workdir / f"{name}.parquet"
            self.con.execute(
                f"COPY (SELECT {columns} FROM (\n{select}\n) ORDER BY {order}) TO {literal(target)} ({PARQUET})",
                values,
            )
        except duckdb.OutOfMemoryException as error:
            raise BadConfiguration(
                f"features: {first_line(error)} Raise memory_limit_mb={stage.memory_limit_mb}."
            ) from None
        except duckdb.PermissionException as error:
            raise BadConfiguration(
                f"features may read only the table snapshot: {first_line(error)}"
            ) from None
        except duckdb.Error as error:
            there = ", ".join(column_types(self.con, "SELECT * FROM snapshot", {}, "snapshot"))
            kind = BadConfiguration if isinstance(error, duckdb.ProgrammingError) else BadInput
            raise kind(f"features: {first_line(error)}. The table is snapshot({there}).") from None
        self.con.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM read_parquet({literal(target)})")
        return name

    def _call(self, source: str, name: str) -> Path:
        """The user's function on the rows of a table, its result as Parquet."""
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        reference = str(self.stage.features)
        function = load_code(reference, "features")
        try:
            frame = function(self.con.execute(f"SELECT * FROM {source}").df())
        except Exception as error:
            log.exception("features=%r failed", reference)
            raise BadInput(
                f"features={reference!r} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(frame, pd.DataFrame):
            raise BadConfiguration(
                f"features={reference!r} returned {type(frame).__name__}, expected a pandas DataFrame."
            )
        doubles = frame.columns[frame.columns.duplicated()]
        if len(doubles):
            raise BadConfiguration(
                f"features={reference!r} returned the column {doubles[0]!r} twice: rename one."
            )
        try:
            table = pa.Table.from_pandas(frame.rename(columns=str), preserve_index=False)
        except pa.ArrowException as error:
            raise BadInput(
                f"features={reference!r} returned a column of mixed types: {'; '.join(map(str, error.args))}"
            ) from None
        path = self.run.workdir / f"{name}-frame.parquet"
        pq.write_table(table, path)
        return path


def _microseconds(column: str, kind: str) -> str:
    """Pandas writes nanoseconds, which DuckDB compares with no other timestamp, so not with a window either."""
    return {
        "TIMESTAMP_NS": f"CAST({column} AS TIMESTAMP)",
        "TIMESTAMPTZ_NS": f"CAST({column} AS TIMESTAMPTZ)",
    }.get(kind, column)


def _is_time(kind: str) -> bool:
    return kind == "DATE" or kind.startswith("TIMESTAMP")


def _has_zone(kind: str) -> bool:
    return kind.startswith("TIMESTAMPTZ") or kind.endswith("WITH TIME ZONE")


def _plain(column: str, kind: str) -> str:
    """The column in one of the few types that every framework and ONNX know."""
    if kind == "BOOLEAN":
        return f"CAST({column} AS TINYINT)"
    if kind.startswith("DECIMAL") or kind in ("HUGEINT", "UHUGEINT", '"NULL"'):  # NULL: pandas wrote no value
        return f"CAST({column} AS DOUBLE)"
    if kind.startswith("ENUM") or kind in ("UUID", "JSON"):
        return f"CAST({column} AS VARCHAR)"
    return _microseconds(column, kind)


def _fingerprint(
    con: duckdb.DuckDBPyConnection, table: str, kinds: dict[str, str]
) -> dict[str, tuple[Any, ...]]:
    """A few numbers per column that change when any of its values does, whatever the order of the rows.

    Sums, plain and weighted by time, rather than hashes: a sum over floats may differ in its last bits from run to
    run, and so may a feature, which is no leak.
    """
    parts = []
    for name, kind in kinds.items():
        column = quote(name)
        if kind in ("FLOAT", "DOUBLE", *_WHOLE):
            value = f"CASE WHEN isfinite({column}::DOUBLE) THEN {column}::DOUBLE END"
            weight = f"(hash({_TIME}) % 1024) / 1024.0"
            parts.append(f"[count({value}), sum(abs({value})), sum({value}), sum({value} * {weight})]")
        else:
            parts.append(f"[count({column})::HUGEINT, sum(hash({column}, {_TIME})::HUGEINT)]")
    rows, *values = _row(con, f"SELECT count(*), {', '.join(parts)} FROM {table}")
    return {"*": (rows,)} | {name: tuple(v) for name, v in zip(kinds, values, strict=True)}


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    if len(one) < 4:
        return one == other
    if one[0] != other[0]:
        return False
    size = max(abs(one[1] or 0), abs(other[1] or 0))
    return all(abs((a or 0) - (b or 0)) <= 1e-9 * size for a, b in zip(one[1:], other[1:], strict=True))


def _each(template: str, names: list[str]) -> str:
    """A template once per column, for one pass over the table."""
    return ", ".join(template.format(quote(name)) for name in names)


def _time(moment: datetime | None) -> str:
    assert moment is not None
    return f"TIMESTAMP '{moment.isoformat(sep=' ')}'"


def _row(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    row = con.execute(sql).fetchone()
    assert row is not None
    return row
