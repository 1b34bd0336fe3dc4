"""PrepareData: a snapshot becomes features, disjoint splits and a reference profile."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, split_pin
from lepton_airflow.data.dataset import DatasetInfo, check_names, info_sql, time_span, unreadable
from lepton_airflow.data.duckdb_types import WHOLE, in_microseconds, is_time
from lepton_airflow.data.feature_query import FeatureQuery
from lepton_airflow.data.leaks import (
    ROWS_TO_ACCUSE,
    copies_of_target,
    in_order_of_target,
    look_ahead,
    perfect_separators,
)
from lepton_airflow.data.profile import reference_profile
from lepton_airflow.data.splits import (
    ROW,
    SPLIT,
    TIME,
    Division,
    Split,
    interval,
    label_horizon,
    moment_of,
    timestamp,
)
from lepton_airflow.data.sql import (
    PARQUET,
    column_types,
    connect,
    fetch_row,
    for_each,
    literal,
    nan_as_null,
    quote,
)
from lepton_airflow.errors import BadConfiguration, BadInput, brief, did_you_mean, require
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, Result, RunInfo, Stage
from lepton_airflow.store.files import digest_path

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

_INFERRED_CLASSES = 20  # a whole-number target with more distinct values is taken for a number to regress on
_MOST_CLASSES = 1000
_MANY_CATEGORIES = 10_000
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


@dataclass(kw_only=True)
class PrepareData(Stage):
    """Make features from a snapshot and split the rows so that no split sees another's future, group or row.

    All columns of the result are features except target, ``time_column``, ``cluster_column``, ``id_columns``,
    ``carry_columns`` and ``drop``.
    Text is a category and everything else a number; booleans become 0 and 1.

    With ``split="time"`` train lies strictly before valid, and valid strictly before test; rows of one time, and of one
    cluster, stay together. The features of the rows before each cut are then computed again *without* the later rows, and
    must be the same (``leak_check``), for SQL and for functions.

    Features may look back only. A target may look ahead, as far as ``label_horizon`` says: then a gap of that length is left
    before each cut, and rows whose label is not known yet at the end of the data are left out.

    Without ``target`` the rows are for predicting and for watching drift; with ``test_fraction=1`` all of them are ``test``.

    :param snapshot: a Parquet snapshot, such as ``ingest.output["snapshot"]``.
    :param target: column to predict; null: labels are not known yet, or not needed.
    :param positive_class: the one of two classes that precision, recall, F1 and thresholds are about, in every later stage;
        for a boolean target true or false, for numbers also a text that spells one, as a template gives it; null: the later one in order, so of ``bad`` and ``good`` ``good``.
    :param features: one DuckDB SELECT over the table ``snapshot``, or ``module:function`` that takes the snapshot as
        a DataFrame and returns one; null: the snapshot's own columns. A function needs all rows in memory, SQL does not.
    :param parameters: values bound to the SELECT by name, besides ``$window_start`` and ``$window_end``.
    :param task: classification or regression; null: classification for text, booleans and whole numbers of at most
        20 distinct values.
    :param split: time, group (whole ``cluster_column`` values) or random.
    :param time_column: date or timestamp of a row; one without a time zone is compared with UTC bounds digit by digit.
    :param snapshot_time_column: the snapshot's own time, where features give rows another one, such as a grid of cut-offs;
        null: time_column.
    :param label_horizon: how far the target looks ahead of its row, such as ``1 hour`` or ``30 days``; null: not at all.
    :param complete_until: time up to which all events have arrived, which decides whose label is known: ISO 8601 or
        window_end; null: the last time in the snapshot.
    :param cluster_column: rows with an equal value depend on one another (one day's flights, one patient).
    :param known_clusters: with split=time, let clusters lie on both sides of a cut: the model will predict later rows of
        clusters that it knows (next month's bills of the same customers). Else it is judged on clusters that it has not met.
    :param id_columns: columns that tell the rows apart; the files keep them and no model sees them. Later stages know by
        them which rows a model has touched, and a random split goes by them.
    :param carry_columns: columns that the files keep for other models, such as features of the champion that the next model
        is to do without; a model that is trained on these files does not see them.
    :param drop: columns of the result to leave out.
    :param stratify: give every split of a random split equal shares of the classes.
    :param valid_fraction: share of the rows outside test that validate [share, 0 to below 1]; 0: no such split.
    :param test_fraction: share of the rows that test [share, 0 to 1]; 0: no such split; 1: no other. Not used with
        test_start.
    :param valid_start: time at which valid starts, ISO 8601, or window_start; replaces valid_fraction.
    :param test_start: time at which test starts, ISO 8601, or window_start; replaces test_fraction.
    :param seed: of the group and random splits.
    :param drop_missing_target: leave out rows without a target; else such a row is an error.
    :param leak_check: refuse features that change when later rows are left out, or that repeat the target.
    :param memory_limit_mb: what DuckDB may hold; the rest is spilled to disk [MB].
    :param threads: threads of DuckDB; the result does not depend on it.
    :raises BadInput: the data cannot be split or learnt from, or a feature leaks.
    :raises BadConfiguration: a column does not exist, or parameters do not go together.
    """

    snapshot: ArtifactUri
    target: str | None = None
    positive_class: str | int | bool | None = None
    features: CodeRef | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    task: Literal["classification", "regression"] | None = None
    split: Literal["time", "group", "random"] = "time"
    time_column: str | None = None
    snapshot_time_column: str | None = None
    label_horizon: str | None = None
    complete_until: str | None = None
    cluster_column: str | None = None
    known_clusters: bool = False
    id_columns: list[str] = field(default_factory=list)
    carry_columns: list[str] = field(default_factory=list)
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

        :return: artifacts ``train``, ``valid`` and ``test`` (those that exist) and ``profile`` (of train); value ``splits``
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
        if not 0 <= self.valid_fraction < 1:
            raise BadConfiguration(
                f"valid_fraction={self.valid_fraction}: expected a share from 0 to below 1."
            )
        if not 0 <= self.test_fraction <= 1:
            raise BadConfiguration(f"test_fraction={self.test_fraction}: expected a share from 0 to 1.")
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
        if self.known_clusters and not (self.split == "time" and self.cluster_column):
            raise BadConfiguration(
                "known_clusters=true needs split='time' and cluster_column: it says that later rows of a cluster are "
                "predicted by what is known of its earlier ones."
            )
        if self.label_horizon and not (self.target and self.time_column):
            raise BadConfiguration(
                f"label_horizon={self.label_horizon!r} needs target and time_column: it says how far the target looks "
                "ahead of the time of its row."
            )
        if self.complete_until and not self.label_horizon:
            raise BadConfiguration(
                f"complete_until={self.complete_until!r} needs label_horizon: without one every label is known at once."
            )
        if self.task and not self.target:
            raise BadConfiguration(f"task={self.task!r} needs target: name the column to predict.")
        if self.positive_class is not None and not self.target:
            raise BadConfiguration(
                f"positive_class={brief(self.positive_class)} needs target: name the column that has this class."
            )

    # -- the run ----------------------------------------------------------------------------------------------------

    def _prepare(self, con: duckdb.DuckDBPyConnection, run: RunInfo, path: Path, sha256: str) -> Result:
        self._open_snapshot(con, path)
        horizon = label_horizon(con, self.label_horizon)
        features = "features"
        given = self._query(con, run).write(features)
        (rows,) = fetch_row(con, f"SELECT count(*) FROM {features}")
        if not rows:
            raise BadInput(
                "features gives no row: check its conditions, and that the snapshot has the rows it asks for."
            )
        types = self._column_types(con, features)
        info = self._info(con, features, types, horizon, sha256)
        until = self._complete_until(con, run, features) if horizon else None
        unknown = self._keep_known_labels(con, run, features, horizon, until)
        missing = self._check_target(con, "labelled", info)
        division = self._division(run, info, horizon)
        info = replace(info, split_id=self._split_id(run.workdir / f"{features}.parquet", division, until))
        gap = self._assign(con, run, division)
        splits = division.measure(con, "assigned", types.get(str(self.time_column)))
        info = replace(info, classes=self._classes(con, info, "assigned", list(splits)))
        flag = given.get(str(self.target)) == "BOOLEAN"
        self._check_features(con, info, "assigned", next(iter(splits)))
        if self.leak_check:
            if self.target and "train" in splits and splits["train"].rows >= ROWS_TO_ACCUSE:
                self._check_target_leaks(con, info, "assigned")
            self._check_future(con, run, features, types, info, list(splits))
        run.check_stop()
        infos = {
            name: replace(
                info,
                split=name,
                rows=split.rows,
                time_range=split.time_range,
                labels_until=_later(split.time_range, horizon),
            )
            for name, split in splits.items()
        }
        artifacts = {name: self._save(con, run, "assigned", list(types), i) for name, i in infos.items()}
        if "train" in infos:
            con.execute(f"CREATE TEMP VIEW train AS SELECT * FROM assigned WHERE {SPLIT} = 'train'")
            profile = reference_profile(con, "train", infos["train"], run.window)
            artifacts["profile"] = run.save(
                "profile.json", json.dumps(profile, ensure_ascii=False, allow_nan=False)
            )
        metrics: dict[str, float | None] = {f"rows_{name}": split.rows for name, split in splits.items()}
        left_out = {"rows_without_target": missing, "rows_label_unknown": unknown, "rows_in_gaps": gap}
        return Result(
            summary=self._summary(info, flag, splits, missing, unknown, gap),
            artifacts=artifacts,
            values={"splits": {name: asdict(split) for name, split in splits.items()}},
            metrics=metrics | {"features": len(info.features)} | left_out,
        )

    def _summary(
        self, info: DatasetInfo, flag: bool, splits: Mapping[str, Split], missing: int, unknown: int, gap: int
    ) -> str:
        what = (
            f" to predict {self.target!r} ({self._task_text(info, flag)})"
            if self.target
            else "; no target, to predict or to watch"
        )
        carried = f" ({len(info.carried)} more carried for other models)" if info.carried else ""
        text = f"{len(info.features)} features{carried}{what}; rows: "
        text += ", ".join(f"{split.rows} {name}" for name, split in splits.items())
        if self.known_clusters:
            text += f"; later rows of known {self.cluster_column} are predicted"
        if missing:
            text += f"; {missing} without a target left out"
        if unknown:
            text += f"; {unknown} whose label is not known yet left out"
        if gap:
            text += f"; {gap} left out whose label reaches into the next split"
        return text + "."

    def _task_text(self, info: DatasetInfo, flag: bool) -> str:
        """The task, and which class is the positive one and why; of a boolean target (``flag``) also as that."""
        if info.positive_class is None:
            return str(info.task)
        why = " by order" if self.positive_class is None else ""
        named = f" ({str(bool(info.positive_class)).lower()})" if flag else ""
        return f"{info.task}, positive class{why}: {brief(info.positive_class)}{named}"

    def _query(self, con: duckdb.DuckDBPyConnection, run: RunInfo) -> FeatureQuery:
        return FeatureQuery(
            con=con,
            workdir=run.workdir,
            features=self.features,
            parameters=self.parameters,
            drop=self.drop,
            time_column=self.snapshot_time_column or self.time_column,
            first=[self.time_column, self.cluster_column],
            exact=[*self.id_columns, self.cluster_column],
            memory_limit_mb=self.memory_limit_mb,
            need_window=run.need_window,
        )

    def _open_snapshot(self, con: duckdb.DuckDBPyConnection, path: Path) -> None:
        """Make the view ``snapshot``, which the features are computed from."""
        import duckdb

        try:
            scan = f"read_parquet({literal(path)})"
            types = column_types(con, f"SELECT * FROM {scan}", {}, "snapshot")
            columns = ", ".join(f"{in_microseconds(quote(c), k)} AS {quote(c)}" for c, k in types.items())
            con.execute(f"CREATE TEMP VIEW snapshot AS SELECT {columns} FROM {scan}")
            check_names(path)
        except duckdb.Error as error:
            raise unreadable(path, error) from None

    def _save(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        assigned: str,
        columns: Sequence[str],
        info: DatasetInfo,
    ) -> Artifact:
        """Put the split that ``info`` describes into the store."""
        file = run.workdir / f"{info.split}.parquet"
        con.execute(
            f"COPY (SELECT {', '.join(map(quote, columns))} FROM {assigned} WHERE {SPLIT} = '{info.split}' ORDER BY {ROW}) "
            f"TO {literal(file)} ({PARQUET}, {info_sql(info)})"
        )
        span = f", {info.time_range[0]} to {info.time_range[1]}" if info.time_range else ""
        log.info("%s: %d rows%s", info.split, info.rows, span)
        return run.save(file.name, file)

    def _column_types(self, con: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
        types = column_types(con, f"SELECT * FROM {table}", {}, "features")
        roles: dict[str, list[str | None]] = {
            "target": [self.target],
            "time_column": [self.time_column],
            "cluster_column": [self.cluster_column],
        }
        roles["id_columns"] = list(self.id_columns)
        roles["carry_columns"] = list(self.carry_columns)
        for role, names in roles.items():
            for name in names:
                if name in self.drop:
                    raise BadConfiguration(
                        f"{role}: column {brief(name)} is in drop, so it is not there: take it out of drop, as {role} alone keeps "
                        "it from the features."
                    )
                if name is not None and name not in types:
                    raise BadConfiguration(
                        f"{role}: column {name!r} is not among the features' columns; {did_you_mean(name, types)}"
                    )
        for name in self.carry_columns:
            taken = [r for r, names in roles.items() if name in names and r != "carry_columns"]
            if taken:
                raise BadConfiguration(
                    f"carry_columns: column {brief(name)} is in {taken[0]} already, whose columns the files keep anyhow: name it once."
                )
        if self.time_column and not is_time(types[self.time_column]):
            raise BadConfiguration(
                f"time_column {self.time_column!r} is {types[self.time_column]}, expected a date or a timestamp: "
                "make one in features, e.g. CAST(… AS TIMESTAMP)."
            )
        return types

    def _info(
        self,
        con: duckdb.DuckDBPyConnection,
        table: str,
        types: dict[str, str],
        horizon: timedelta,
        sha256: str,
    ) -> DatasetInfo:
        """Decide the task, and which columns are features and which of these are categories."""
        others = {self.target, self.time_column, self.cluster_column, *self.id_columns}
        features = [name for name in types if name not in {*others, *self.carry_columns}]
        carried = [name for name in types if name in self.carry_columns]
        if not features:
            raise BadConfiguration(
                f"no feature is left: the columns are {', '.join(types)}, all of them target, time, cluster, id or carried."
            )
        for name in (*features, *carried):
            if types[name] not in (*WHOLE, "FLOAT", "DOUBLE", "VARCHAR"):
                raise BadConfiguration(
                    f"{'feature' if name in features else 'carried column'} {name!r} is {types[name]}: expected a number or text. Derive one in features, or name it in "
                    "id_columns or drop."
                )
        for name in filter(_PANDAS_INDEX.fullmatch, features):
            log.warning(
                "feature %r is the index of a DataFrame, which pandas wrote as a column: write the file with index=False, or name "
                "the column in drop.", name,
            )  # fmt: skip
        return DatasetInfo(
            target=self.target,
            task=self._task(con, table, types),
            features=features,
            carried=carried,
            categorical=[name for name in (*features, *carried) if types[name] == "VARCHAR"],
            time_column=self.time_column,
            label_horizon_s=horizon.total_seconds(),
            cluster_column=self.cluster_column,
            known_clusters=self.known_clusters,
            id_columns=list(self.id_columns),
            split_by=self.split,
            snapshot_sha256=sha256,
        )

    def _task(self, con: duckdb.DuckDBPyConnection, table: str, types: dict[str, str]) -> str | None:
        if self.target is None:
            return None
        kind = types[self.target]
        if kind not in (*WHOLE, "FLOAT", "DOUBLE", "VARCHAR"):
            raise BadConfiguration(f"target {self.target!r} is {kind}: expected a number, text or a boolean.")
        (distinct,) = fetch_row(con, f"SELECT approx_count_distinct({quote(self.target)}) FROM {table}")
        few = kind in WHOLE and distinct <= _INFERRED_CLASSES
        task = self.task or ("classification" if kind == "VARCHAR" or few else "regression")
        if self.task is None and kind in ("FLOAT", "DOUBLE") and distinct <= _INFERRED_CLASSES:
            (whole,) = fetch_row(
                con, f"SELECT bool_and({quote(self.target)} = trunc({quote(self.target)})) FROM {table}"
            )
            if whole:
                log.warning(
                    "target %r holds about %d whole numbers and is %s, so it is taken for a number to regress on: if they are "
                    "classes, cast it to INTEGER in features; else set task='regression'.", self.target, distinct, kind,
                )  # fmt: skip
        if task == "regression" and kind == "VARCHAR":
            raise BadConfiguration(
                f"target {self.target!r} is text, which task='regression' cannot predict: cast it to a number."
            )
        if task == "classification" and kind in ("FLOAT", "DOUBLE"):
            raise BadConfiguration(
                f"target {self.target!r} is {kind}, which task='classification' does not take as a class: "
                "cast it to INTEGER or VARCHAR in features."
            )
        return task

    def _keep_known_labels(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        table: str,
        horizon: timedelta,
        until: datetime | None,
    ) -> int:
        """Make the view ``labelled`` of the rows whose label is known at the end of the data; count the others."""
        time = f"CAST({quote(self.time_column)} AS TIMESTAMP)" if self.time_column else "NULL::TIMESTAMP"
        known = f"coalesce({TIME} + {interval(horizon)} <= {timestamp(until)}, true)" if until else "true"
        con.execute(
            f"CREATE TEMP VIEW labelled AS SELECT * EXCLUDE (file_row_number), file_row_number AS {ROW}, {time} AS {TIME} "
            f"FROM read_parquet({literal(run.workdir / f'{table}.parquet')}, file_row_number=true) WHERE {known}"
        )
        (rows,), (kept,) = (fetch_row(con, f"SELECT count(*) FROM {name}") for name in (table, "labelled"))
        if not kept:
            raise BadInput(
                f"label_horizon={self.label_horizon!r}: no label of the {rows} rows is known yet, since the data end at "
                f"{until}. Bring later data, or rows of earlier times."
            )
        if kept < rows:
            log.info(
                "%d rows are left out: their labels look ahead by %s and the data end at %s",
                rows - kept, self.label_horizon, until,
            )  # fmt: skip
        return int(rows - kept)

    def _complete_until(self, con: duckdb.DuckDBPyConnection, run: RunInfo, table: str) -> datetime:
        """The time up to which the data are complete."""
        if self.complete_until:
            return moment_of(self._stated(run, "complete_until") or "", "complete_until")
        time = self.snapshot_time_column or str(self.time_column)
        there = column_types(con, "SELECT * FROM snapshot", {}, "snapshot")
        source = "snapshot" if is_time(there.get(time, "")) else table
        column = time if source == "snapshot" else str(self.time_column)
        (until,) = fetch_row(con, f"SELECT max(CAST({quote(column)} AS TIMESTAMP)) FROM {source}")
        if until is None:
            raise BadInput(
                f"column {column!r} is missing in every row, so nobody knows which labels are known."
            )
        return datetime.fromisoformat(str(until))

    def _check_target(self, con: duckdb.DuckDBPyConnection, table: str, info: DatasetInfo) -> int:
        """Count the rows without a target; raises BadInput if the target cannot be learnt."""
        if self.target is None:
            return 0
        target = quote(self.target)
        rows, known = fetch_row(con, f"SELECT count(*), count({target}) FROM {table}")
        if not known:
            raise BadInput(
                f"target {self.target!r} is missing in all {rows} rows: check the column, or where it comes from; where labels come "
                "later, prepare the rows without target."
            )
        if known < rows and not self.drop_missing_target:
            raise BadInput(
                f"target {self.target!r} is missing in {rows - known} of {rows} rows: leave those out in features, set "
                "drop_missing_target=true, or, where it looks ahead, say how far in label_horizon."
            )
        if info.task == "regression":
            nan, infinite = fetch_row(
                con,
                f"SELECT count(*) FILTER (isnan({target}::DOUBLE)), count(*) FILTER (isinf({target}::DOUBLE)) FROM {table}",
            )
            if nan or infinite:
                raise BadInput(
                    f"target {self.target!r} is NaN in {nan} and infinite in {infinite} of {rows} rows: expected finite "
                    "numbers; correct them where they come from, or leave those rows out in features."
                )
        return int(rows - known)

    def _check_features(
        self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str, first: str
    ) -> None:
        """Refuse features that are infinite; warn of what a model can hardly learn from in the first split."""
        numbers = [n for n in info.features if n not in info.categorical]
        bad = (
            fetch_row(
                con, f"SELECT {for_each('count(*) FILTER (isinf({}::DOUBLE))', numbers)} FROM {assigned}"
            )
            if numbers
            else ()
        )
        for name, count in zip(numbers, bad, strict=True):
            if count:
                raise BadInput(
                    f"feature {name!r} is infinite in {count} rows: expected finite numbers or missing values; correct it in features."
                )
        there = (
            quote(n) if n in info.categorical else nan_as_null(f"{quote(n)}::DOUBLE") for n in info.features
        )
        counts = ", ".join(f"count({value})" for value in there)
        known = fetch_row(con, f"SELECT {counts} FROM {assigned} WHERE {SPLIT} = '{first}'")
        for name, count in zip(info.features, known, strict=True):
            if not count:
                log.warning(
                    "feature %r is missing in every row of %s: it tells a model nothing.", name, first
                )
        if categories := [n for n in info.features if n in info.categorical]:
            distinct = fetch_row(
                con, f"SELECT {for_each('approx_count_distinct({})', categories)} FROM {assigned}"
            )
            for name, count in zip(categories, distinct, strict=True):
                if count > _MANY_CATEGORIES:
                    log.warning(
                        "feature %r has about %d categories: a one-hot encoding of it is that wide; consider id_columns, "
                        "drop, or grouping the rare ones in features.", name, count,
                    )  # fmt: skip

    # -- splits -----------------------------------------------------------------------------------------------------

    def _stated(self, run: RunInfo, name: str) -> str | None:
        """A time that is stated as such, or as a bound of the run's window."""
        stated: str | None = getattr(self, name)
        if stated in ("window_start", "window_end"):
            window = run.need_window(f"{name}={stated!r}")
            return window.start if stated == "window_start" else window.end
        return stated

    def _division(self, run: RunInfo, info: DatasetInfo, horizon: timedelta) -> Division:
        return Division(
            by=self.split,
            time_column=self.time_column,
            cluster_column=self.cluster_column,
            known_clusters=self.known_clusters,
            id_columns=self.id_columns,
            label_horizon=horizon,
            strata=self.target if self.stratify and info.task == "classification" else None,
            valid_fraction=self.valid_fraction,
            test_fraction=self.test_fraction,
            valid_start=self._stated(run, "valid_start"),
            test_start=self._stated(run, "test_start"),
            seed=self.seed,
        )

    def _split_id(self, features: Path, division: Division, until: datetime | None) -> str:
        """Name the rows and what divides them: splits of one id share no row, whatever run has made them."""
        named = [digest_path(features)[0], self.target, until, asdict(division)]
        return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _assign(self, con: duckdb.DuckDBPyConnection, run: RunInfo, division: Division) -> int:
        """Make the view ``assigned`` of the rows that have a target, each with the name of its split; count those in gaps."""
        has_target = f"{quote(self.target)} IS NOT NULL" if self.target is not None else "true"
        con.execute(f"CREATE TEMP VIEW known AS SELECT * FROM labelled WHERE {has_target}")
        for name in filter(None, (self.time_column, self.cluster_column)):
            nan = f"typeof({quote(name)}) IN ('FLOAT', 'DOUBLE') AND {quote(name)}::VARCHAR = 'nan'"
            (missing,) = fetch_row(con, f"SELECT count(*) FROM known WHERE {quote(name)} IS NULL OR {nan}")
            if missing:
                raise BadInput(
                    f"column {name!r} is missing in {missing} rows, which then belong to no split: leave them out in features."
                )
        if self.split == "random" and self.id_columns:
            ids = ", ".join(map(quote, self.id_columns))
            (twice,) = fetch_row(
                con, f"SELECT count(*) FROM (SELECT 1 FROM known GROUP BY {ids} HAVING count(*) > 1)"
            )
            if twice:
                log.warning(
                    "%d ids (%s) have more than one row, which may go to other splits; where their rows depend on one "
                    "another, name a cluster_column and use split='group'.", twice, ", ".join(self.id_columns),
                )  # fmt: skip
        file = run.workdir / "assigned.parquet"
        con.execute(f"COPY ({division.query(con)}) TO {literal(file)} ({PARQUET})")
        con.execute(
            f"CREATE TEMP VIEW assigned AS SELECT * FROM read_parquet({literal(file)}) WHERE {SPLIT} IS NOT NULL"
        )
        rows, assigned = fetch_row(con, f"SELECT count(*), count({SPLIT}) FROM read_parquet({literal(file)})")
        return int(rows - assigned)

    def _classes(
        self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str, splits: list[str]
    ) -> list[Any]:
        if info.task != "classification":
            if self.positive_class is not None:
                raise BadConfiguration(
                    f"positive_class={brief(self.positive_class)}: target {self.target!r} is a number to predict, without "
                    "classes; leave positive_class out, or set task='classification'."
                )
            return []
        target = quote(str(self.target))
        found: dict[str, list[Any]] = {name: [] for name in splits}
        for name, value in con.execute(
            f"SELECT DISTINCT {SPLIT}, {target} FROM {assigned} ORDER BY {target} LIMIT {5 * _MOST_CLASSES}"
        ).fetchall():
            found[name].append(value)
        classes = found[splits[0]]
        if splits[0] != "train":  # a model that is trained already has its own
            return self._positive_last(classes) if len(classes) == 2 else classes
        if len(classes) > _MOST_CLASSES:
            raise BadInput(
                f"target {self.target!r} has more than {_MOST_CLASSES} classes in train: is it an id? Group them, or set task='regression'."
            )
        if len(classes) < 2:
            raise BadInput(
                f"target {self.target!r} has only the class {brief(classes[0])} in train: expected at least two; take more data or another target."
            )
        for name in splits[1:]:
            for value in found[name]:
                if value not in classes:
                    raise BadInput(
                        f"class {brief(value)} of target {self.target!r} occurs in {name} and not in train: group rare classes "
                        "in features, or move the start of the split."
                    )
        return self._positive_last(classes)

    def _positive_last(self, classes: list[Any]) -> list[Any]:
        """The classes in the order of their numbers: the positive one is number 1, as all that is binary has it."""
        wanted = self.positive_class
        if wanted is None:
            return classes
        if isinstance(wanted, bool) and classes == [0, 1]:  # booleans have become 0 and 1
            wanted = int(wanted)
        equal = [c for c in classes if type(c) is type(wanted) and c == wanted] or _spelled(wanted, classes)
        if len(classes) != 2 or not equal:
            names = ", ".join(map(brief, classes[:10])) + (", …" if len(classes) > 10 else "")
            why = "can be stated for two classes only" if equal else "is not one of them"
            meant = did_you_mean(str(wanted), map(str, classes)).partition(" Known")[0]
            hint = f"; {meant}" if not equal and meant.endswith("?") else "."
            raise BadConfiguration(
                f"positive_class={brief(self.positive_class)}: target {self.target!r} has the {len(classes)} classes {names}, "
                f"and the positive class {why}{hint}"
            )
        return [*(c for c in classes if c not in equal), *equal]

    # -- leaks ------------------------------------------------------------------------------------------------------

    def _check_target_leaks(self, con: duckdb.DuckDBPyConnection, info: DatasetInfo, assigned: str) -> None:
        """Refuse a feature that repeats the target; warn of one that tells the classes apart, or orders the rows as the target, by itself."""
        train = f"{assigned} WHERE {SPLIT} = 'train'"
        if copies := copies_of_target(con, train, info):
            how = "in a straight line" if info.task == "regression" else "exactly"
            raise BadInput(
                f"feature {copies[0]!r} tells the target {self.target!r} {how} in every row of train: it is the target "
                "under another name. Leave it out in features or name it in drop; leak_check=false keeps it."
            )
        for name in perfect_separators(con, train, info):
            log.warning(
                "feature %r separates the classes perfectly by itself: is it known before the target?", name
            )
        for name in in_order_of_target(con, train, info):
            log.warning(
                "feature %r puts all rows in the order of the target by itself, as its logarithm would: is it known before the "
                "target?", name,
            )  # fmt: skip

    def _check_future(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        table: str,
        types: dict[str, str],
        info: DatasetInfo,
        splits: Sequence[str],
    ) -> None:
        """Refuse features of earlier rows that depend on later rows, and a target that looks further than it says."""
        if self.split != "time" or self.features is None or len(splits) == 1:
            return
        there = column_types(con, "SELECT * FROM snapshot", {}, "snapshot")
        time = self.snapshot_time_column or str(self.time_column)
        if not is_time(there.get(time, "")):
            if self.snapshot_time_column:
                raise BadConfiguration(
                    f"snapshot_time_column: the snapshot has no date or timestamp {time!r}; {did_you_mean(time, there)}"
                )
            log.warning(
                "leak_check: the snapshot has no time column %r, so that features look ahead cannot be ruled out; name its "
                "own in snapshot_time_column.",
                time,
            )
            return
        for name in splits[1:]:
            (cut,) = fetch_row(con, f"SELECT min({TIME}) FROM assigned WHERE {SPLIT} = '{name}'")
            alone = f"before_{name}"
            self._query(con, run).write(alone, cut)
            if sentence := look_ahead(con, table, alone, cut, types, info, self.label_horizon):
                raise BadInput(sentence)
            log.info("leak_check: the rows before %s (%s) do not depend on later ones", cut, name)


def _spelled(wanted: Any, classes: list[Any]) -> list[Any]:
    """The class that a text, as templates give it, spells among numbers: ``1``, ``1.0``, and of 0 and 1 ``true``."""
    if not isinstance(wanted, str):
        return []
    flags = {"false": "0", "true": "1"} if classes == [0, 1] else {}
    try:
        number = float(flags.get(wanted.strip().lower(), wanted))
    except ValueError:
        return []
    return [c for c in classes if not isinstance(c, str) and c == number]


def _later(time_range: Sequence[str] | None, horizon: timedelta) -> str | None:
    """The last time that the labels of a range of rows look at; None where labels do not look ahead."""
    if not time_range or not horizon:
        return None
    last = time_span(time_range)[1]  # of a date the end of its day
    return (last + min(horizon, datetime.max.replace(tzinfo=UTC) - last)).isoformat()
