"""Check whether the data have drifted away from what a model learnt, and start a retraining if so."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import pin, split_pin
from lepton_airflow.data.dataset import DatasetInfo, check_names, read_info
from lepton_airflow.data.duckdb_types import is_number
from lepton_airflow.data.sql import connect, fetch_row, interruptible, literal, quote
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    IntegrityError,
    Skipped,
    brief,
    did_you_mean,
    require,
)
from lepton_airflow.evaluation.drift import ColumnVerdict, check_profile, judge_columns
from lepton_airflow.registry.ledger import Ledger, check_model_name, models_with_champion
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

    from lepton_airflow.packaging.card import ModelCard

log = logging.getLogger(__name__)

_NAMED = 20  # drifted columns in the receipt; the verdict has all
_REASON_BYTES = 1500  # a receipt of at most 8 KB holds it twice
# Columns that the report shows, those that moved most: Evidently takes a second and 50 KB for each.
_DRAWN = 50


@dataclass(kw_only=True)
class CheckDrift(Stage):
    """Compare the current rows with those a model was trained on, and ask for a retraining when they have drifted.

    Every column is judged on all rows of the window. It has drifted if its population stability index over the bins of the
    reference profile is at least ``threshold`` and chance does not explain that; the test allows for dependent rows and for
    the number of columns (see ``lepton_airflow/evaluation/drift.py``). The data have drifted if ``min_columns`` columns have;
    with 1, ``alpha`` is the chance of a false alarm over all columns. Evidently draws its report from a sample, with the
    verdict's numbers, and decides nothing.

    Returns the artifacts ``verdict`` (JSON, every column) and ``report`` (Evidently's HTML, one file), and the values
    ``drifted``, ``retrain`` (drifted, and this run may act), ``columns`` (names of those that drifted, at most 20) and
    ``reason``. If ``retrain`` is true, each ``AssetAlias`` among the task's ``outlets`` gets an event with the run's window,
    which starts the DAGs that are scheduled on it.

    :param dataset: the current rows with the model's features: ``prepare.output["test"]``, or any Parquet file with columns of
        these names, such as a snapshot. Labels may be missing: the target is judged over the rows that have one.
    :param name: name of a registered model, whose champion is the reference; without a champion the task is skipped.
    :param reference: instead of ``name``: a profile, ``prepare.output["profile"]``, or a model package.
    :param reference_rows: the rows behind the reference, for the report; None: the champion's training rows, if the store
        still has them.
    :param exclude_columns: columns of the reference that are not judged, such as calendar columns, which move whenever half a
        year meets a whole one; report, verdict and reason name them.
    :param threshold: smallest population stability index that matters; 0.1 and 0.25 are usual [nats].
    :param alpha: largest p-value, corrected for the number of columns, that counts as beyond chance [0 to 1].
    :param min_columns: number of drifted columns from which on the data have drifted [1 to all of the reference's].
    :param cluster_column: column that names dependent rows, such as the day; None: the one that the dataset or the model
        names; if there is none, rows are taken to be as dependent as those of the reference.
    :param sample_rows: number of rows that the report shows of each side [rows].
    :param seed: of these samples.
    :param on_backfill: in a backfill, ``register_only`` judges and starts nothing, ``skip`` does nothing, ``full`` acts.
    :param memory_limit_mb: what DuckDB may hold; the rest is spilled to disk [MB].
    :param threads: threads of DuckDB; the result does not depend on it.
    :raises BadConfiguration: not exactly one of ``name`` and ``reference``; a number out of its range.
    :raises BadInput: there are no rows, or the reference has no profile.
    """

    cacheable: ClassVar[bool] = False  # the champion may change, and other DAGs are started
    engines: ClassVar[tuple[str, ...]] = ("duckdb", "evidently", "scipy")
    extra: ClassVar[str] = "drift"
    outputs: ClassVar[tuple[str, ...]] = ("verdict", "report", "drifted", "retrain", "columns", "reason")
    emits: ClassVar[str] = "retrain"

    dataset: ArtifactUri
    name: str | None = None
    reference: ArtifactUri | None = None
    reference_rows: ArtifactUri | None = None
    exclude_columns: list[str] = field(default_factory=list)
    threshold: float = 0.25
    alpha: float = 0.05
    min_columns: int = 1
    cluster_column: str | None = None
    sample_rows: int = 5_000
    seed: int = 0
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"
    memory_limit_mb: int = 1024
    threads: int = 2

    def run(self, run: RunInfo) -> Result:
        for library in self.engines:
            require(library, "CheckDrift", self.extra)
        self._check_parameters()
        may_start = backfill.may_act(run, self.on_backfill, "drift is not checked")
        reference = self._reference(run)
        current = run.fetch(self.dataset)
        rows_before = self._rows_before(run, reference)
        con = connect(
            run.workdir,
            memory_limit_mb=self.memory_limit_mb,
            threads=self.threads,
            readable=[current, *([rows_before] if rows_before else [])],
        )
        try:
            rows, verdicts = interruptible(con, lambda: self._judge(con, current, reference))
            run.check_stop()
            reason = self._reason(verdicts, rows, reference)
            page = self._report(con, run, current, rows_before, verdicts, reason)
        finally:
            con.close()
        drifted = self._drifted(verdicts)
        retrain = drifted and may_start
        if drifted and not retrain:
            reason += f" Nothing is started: {backfill.reason(self.on_backfill)}"
        if not rows_before:
            reason += " The report shows the current rows only: " + (
                "those of the reference are not in the store."
                if reference.card
                else "pass reference_rows, too."
            )
        decision = {"drifted": drifted, "retrain": retrain, "reason": reason}
        verdict = decision | self._evidence(run, reference, rows, verdicts)
        moved = [v for v in verdicts if v.drifted]
        return Result(
            summary=reason,
            artifacts={
                "verdict": run.save(
                    "verdict.json", json.dumps(verdict, indent=1, ensure_ascii=False, allow_nan=False)
                ),
                "report": run.save("report.html", page),
            },
            values=decision | {"columns": [_cut(v.name, 100) for v in moved[:_NAMED]]},
            metrics={
                "rows": float(rows),
                "columns": float(len(verdicts)),
                "drifted_columns": float(len(moved)),
                "drifted_share": len(moved) / len(verdicts),
                "largest_distance": max(
                    (v.distance for v in verdicts if v.distance is not None), default=None
                ),
            },
        )

    def _excluded(self, reference: _Reference) -> list[str]:
        """The reference's columns that are not judged."""
        return [name for name in reference.profile["columns"] if name in self.exclude_columns]

    def _drifted(self, verdicts: Sequence[ColumnVerdict]) -> bool:
        return sum(v.drifted for v in verdicts) >= self.min_columns

    def _evidence(
        self, run: RunInfo, reference: _Reference, rows: int, verdicts: Sequence[ColumnVerdict]
    ) -> dict[str, Any]:
        """What the decision is based on, for ``verdict.json``."""
        return {
            "threshold": self.threshold,
            "alpha": self.alpha,
            "min_columns": self.min_columns,
            "excluded_columns": self._excluded(reference),
            "rows": rows,
            "reference": {
                "name": reference.name,
                "sha256": reference.sha256,
                "rows": reference.profile["rows"],
                "time_range": reference.profile["time_range"],
            },
            "dataset": {"sha256": split_pin(self.dataset)[1] or run.store.digest(self.dataset)},
            "report_rows": min(rows, self.sample_rows),
            "columns": [asdict(v) for v in verdicts],
        }

    def _check_parameters(self) -> None:
        if (self.name is None) == (self.reference is None):
            raise BadConfiguration(
                "CheckDrift needs either name (its champion is the reference) or reference (a profile or a model "
                f"package); got name={self.name!r}, reference={self.reference!r}."
            )
        for name, low, high in (
            ("threshold", 0.0, float("inf")),
            ("alpha", 0.0, 1.0),
            ("min_columns", 0, float("inf")),
            ("sample_rows", 0, float("inf")),
        ):
            if not low < getattr(self, name) < high:
                raise BadConfiguration(
                    f"{name}={getattr(self, name)}: expected a number above {low:g}"
                    + (f" and below {high:g}." if high < float("inf") else ".")
                )

    # -- the reference -----------------------------------------------------------------------------------------------

    def _reference(self, run: RunInfo) -> _Reference:
        from lepton_airflow.packaging.card import ModelCard

        uri, who = self.reference, "the reference"
        if self.name is not None:
            check_model_name(self.name)
            champion = Ledger(run.store, self.name).newest()
            if champion is None:
                raise Skipped(
                    f"model {self.name!r} has no champion in {run.store.root}, so there is nothing to drift away from: "
                    f"promote one first; {did_you_mean(self.name, models_with_champion(run.store))}"
                )
            uri, who = champion.package, f"champion version {champion.version} of {self.name}"
        assert uri is not None
        path = run.fetch(uri)
        card = None
        file = path
        if path.is_dir():
            file = path / "profile.json"
            if not (path / "model.json").is_file() or not file.is_file():
                raise BadInput(
                    f"{who} has no reference profile: pass profile=prepare.output['profile'] to TrainModel, and train it again."
                )
            card = ModelCard.from_json((path / "model.json").read_bytes())
        try:
            profile = json.loads(file.read_bytes())
        except ValueError:
            profile = None
        check_profile(profile, f"{who} ({file.name})")
        return _Reference(who, split_pin(uri)[1] or run.store.digest(uri), profile, card)

    def _rows_before(self, run: RunInfo, reference: _Reference) -> Path | None:
        """The rows behind the reference, if the store has them: artifacts are found by their digest."""
        if self.reference_rows is not None:
            path = run.fetch(self.reference_rows)
            read_info(path, plain=True)  # raises where it is no Parquet
            return path
        trained_on = [t.sha256 for t in reference.card.touched if t.role == "train"] if reference.card else []
        for sha256 in trained_on:
            for key in run.store.keys(f"artifacts/{sha256[:32]}"):
                try:
                    return run.fetch(pin(run.store.uri(key), sha256))
                except (BadInput, IntegrityError) as error:
                    log.warning("the report goes without the reference's rows: %s", error)
        return None

    # -- verdict and report --------------------------------------------------------------------------------------------

    def _judge(
        self, con: duckdb.DuckDBPyConnection, current: Path, reference: _Reference
    ) -> tuple[int, list[ColumnVerdict]]:
        info = read_info(current, plain=True)
        check_names(current)
        scan = f"SELECT * FROM read_parquet({literal(current)})"
        con.execute(f"CREATE TEMP VIEW current_rows AS {scan}")
        there = [name for name, *_ in con.execute("DESCRIBE current_rows").fetchall()]
        if "file_row_number" in map(str.lower, there):
            raise BadInput(
                f"{split_pin(self.dataset)[0]} has a column 'file_row_number', a name that rows are counted under: rename it."
            )
        features = [name for name in reference.profile["columns"] if name != reference.profile["target"]]
        if info == DatasetInfo() and features and not set(features) & set(there):
            raise BadInput(
                f"{split_pin(self.dataset)[0]} has none of the {len(features)} features of {reference.name}, such as "
                f"{features[0]!r}: prepare these rows as those of the reference were, without target where labels are late."
            )
        cluster = self.cluster_column or info.cluster_column
        if cluster is None and reference.card and reference.card.cluster_column in there:
            cluster = reference.card.cluster_column
        if cluster is not None and cluster not in there:
            raise BadConfiguration(
                f"cluster_column {cluster!r} is not among the columns; {did_you_mean(cluster, there)}"
            )
        (rows,) = fetch_row(con, "SELECT count(*) FROM current_rows")
        if not rows:
            raise BadInput(
                f"{split_pin(self.dataset)[0]} has no rows: check that the data of this window have arrived."
            )
        if cluster is not None:
            nan = f"typeof({quote(cluster)}) IN ('FLOAT', 'DOUBLE') AND {quote(cluster)}::VARCHAR = 'nan'"
            (missing,) = fetch_row(
                con, f"SELECT count(*) FROM current_rows WHERE {quote(cluster)} IS NULL OR {nan}"
            )
            if missing:  # as one cluster they would hide a drift
                raise BadInput(
                    f"cluster_column {cluster!r} is missing in {missing} of {rows} rows, of which nobody knows what they depend on: "
                    "fill it, or leave those rows out."
                )
        known = {*reference.profile["columns"], *there}  # a new champion need not have each of them
        for name in self.exclude_columns:
            if name not in known:
                raise BadConfiguration(
                    f"exclude_columns: column {brief(name)} is not there; {did_you_mean(name, known)}"
                )
        judged = {n: c for n, c in reference.profile["columns"].items() if n not in self.exclude_columns}
        if not judged:
            raise BadConfiguration(
                f"exclude_columns names all {len(reference.profile['columns'])} columns of {reference.name}: leave some to judge."
            )
        columns = len(judged)
        if self.min_columns > columns:
            raise BadConfiguration(
                f"min_columns={self.min_columns}: {reference.name} has {columns} columns to judge, so this many can never drift; "
                f"expected 1 to {columns}."
            )
        verdicts = judge_columns(
            con, "current_rows", reference.profile | {"columns": judged}, cluster, self.threshold, self.alpha
        )
        if len(verdicts) < self.min_columns:
            log.warning(
                "min_columns=%d, and %d columns can be judged in this window, whose rows have no label yet: it cannot drift",
                self.min_columns, len(verdicts),
            )  # fmt: skip
        if not verdicts:
            raise BadConfiguration(
                f"exclude_columns leaves only the target {brief(next(iter(judged)))} to judge, and no row has a label yet: leave "
                "a feature, too."
            )
        return rows, verdicts

    def _report(
        self,
        con: duckdb.DuckDBPyConnection,
        run: RunInfo,
        current: Path,
        rows_before: Path | None,
        verdicts: Sequence[ColumnVerdict],
        reason: str,
    ) -> Path:
        """Draw Evidently's page: its pictures are of a sample, its numbers are the verdict's, of all rows."""
        os.environ.setdefault("DO_NOT_TRACK", "1")  # otherwise Evidently reports its use to its makers
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset, DataSummaryPreset

        names = [v.name for v in verdicts if v.distance is not None][:_DRAWN]
        # The queries alone: a stop could not end Evidently in another thread, whose import takes seconds.
        now = interruptible(con, lambda: self._sample(con, current, names))
        before = interruptible(con, lambda: self._sample(con, rows_before, names)) if rows_before else None
        sides = [now] if before is None else [now, before]
        shown = [n for n in names if all(n in side and side[n].notna().any() for side in sides)]
        path = run.workdir / "report.html"
        if not shown:
            path.write_text(_NOTHING_SHOWN, encoding="utf-8")
            return path
        numbers = [n for n in shown if all(side[n].dtype.kind == "f" for side in sides)]
        definition = DataDefinition(
            numerical_columns=numbers, categorical_columns=[n for n in shown if n not in numbers]
        )
        share = sum(v.drifted for v in verdicts if v.name in shown) / len(shown)
        wanted = self.min_columns / len(shown)
        preset = (
            DataSummaryPreset()
            if before is None
            else DataDriftPreset(
                columns=shown,
                method=_teach_evidently(verdicts),
                threshold=self.threshold,
                # Columns that it does not show count, too.
                drift_share=min(wanted, share) if self._drifted(verdicts) else wanted,
            )
        )
        data = [Dataset.from_pandas(side[shown], definition) for side in sides]
        Report([preset]).run(*data, *([None] if before is None else [])).save_html(str(path))
        page = path.read_text(encoding="utf-8")
        head, body, rest = page.partition("<body>")
        path.write_text(head + body + _above(verdicts, shown, reason, len(now)) + rest, encoding="utf-8")
        return path

    def _sample(self, con: duckdb.DuckDBPyConnection, path: Path, names: Sequence[str]) -> pd.DataFrame:
        """A sample of a file's rows, the same at any number of threads; numbers as float, all else as text."""
        scan = f"read_parquet({literal(path)}, file_row_number = true)"
        kinds = {n: k for n, k, *_ in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}
        columns = [
            f"{quote(n)}::{'DOUBLE' if is_number(kinds[n]) else 'TEXT'} AS {quote(n)}"
            for n in names
            if n in kinds
        ]
        row = "file_row_number"
        chosen = f"SELECT {row} FROM {scan} ORDER BY hash({row}, {int(self.seed)}), {row} LIMIT {int(self.sample_rows)}"
        return con.execute(
            f"SELECT {', '.join(columns) or 'file_row_number'} FROM {scan} WHERE {row} IN ({chosen}) ORDER BY {row}"
        ).df()

    def _reason(self, verdicts: Sequence[ColumnVerdict], rows: int, reference: _Reference) -> str:
        moved = [v for v in verdicts if v.drifted]
        target = reference.profile["target"]
        unknown = f" The target {target!r} is not compared: no row has a label yet."
        worst = "; ".join(f"{v.name}: {v.reason}" for v in (moved or verdicts)[:3])
        needed = f" ({self.min_columns} needed)" if self.min_columns > 1 else ""
        excluded = self._excluded(reference)
        names = ", ".join(map(brief, excluded[:5])) + (
            f" and {len(excluded) - 5} more" if len(excluded) > 5 else ""
        )
        left_out = f" Not judged, by exclude_columns: {names}." if excluded else ""
        return _cut(
            f"{'Drifted' if self._drifted(verdicts) else 'Not drifted'}: {len(moved)} of {len(verdicts)} columns{needed} moved away from "
            f"{reference.name} over {rows:,} rows.{left_out} {'Most' if moved else 'Nearest to it'}: {worst}."
            + (
                unknown
                if target and target not in {*self.exclude_columns, *(v.name for v in verdicts)}
                else ""
            ),
            _REASON_BYTES,
        )


def _teach_evidently(verdicts: Sequence[ColumnVerdict]) -> str:
    """Register the verdict as a test of Evidently, so that its page shows our numbers; returns the name of the test.

    Its own would be those of a sample, in bins of its own, without a test of chance: they contradicted the verdict.
    """
    from evidently.legacy.calculations.stattests.registry import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    by_name = {v.name: v for v in verdicts}

    def look_up(_before: Any, now: pd.Series, _kind: Any, _threshold: float) -> tuple[float, bool]:
        verdict = by_name[str(now.name)]
        return verdict.distance or 0.0, verdict.drifted

    kinds = [ColumnType.Numerical, ColumnType.Categorical]
    test = StatTest("lepton_verdict", "PSI of all rows, beyond chance", kinds)
    register_stattest(test, look_up)
    return test.name


def _above(verdicts: Sequence[ColumnVerdict], shown: Sequence[str], reason: str, rows: int) -> str:
    """What stands above Evidently's part of the page: the verdict, and what that part does not show."""
    hidden = [v for v in verdicts if v.name not in shown]
    items = "".join(
        f"<li><b>{escape(v.name)}</b> {'has drifted' if v.drifted else 'has not drifted'}: {escape(v.reason)}</li>"
        for v in hidden[:_DRAWN]
    )
    more = f" and {len(hidden) - _DRAWN} more, in verdict.json" if len(hidden) > _DRAWN else ""
    not_shown = f"<p>Columns that are not drawn{more}:</p><ul>{items}</ul>" if hidden else ""
    return (
        '<section style="font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 1.5em auto; padding: 0 1em">'
        f"<p>{escape(reason)}</p><p>Distances and verdicts below are those of all rows; the pictures are of "
        f"{rows:,} rows drawn from them.</p>{not_shown}</section>"
    )


_NOTHING_SHOWN = (
    "<!doctype html><meta charset='utf-8'><title>Drift</title><p>No column of the reference has values on both sides, so "
    "there is nothing to draw; the verdict names every column."
)


def _cut(text: str, most: int) -> str:
    """The text, or as much of it as fits into this many bytes."""
    return text.encode()[:most].decode(errors="ignore")


@dataclass(frozen=True)
class _Reference:
    """What the current rows are compared with."""

    name: str
    sha256: str
    profile: dict[str, Any]
    card: ModelCard | None
