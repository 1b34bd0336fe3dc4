"""Judge for each column whether the data have drifted away from what a model learnt, from its profile and all current rows.

DuckDB counts the current rows in the bins of the reference profile, so only counts are held in memory, and every row
counts. A column has drifted if both are true:

- its population stability index is at least ``threshold``: the change is large enough to matter;
- chance does not explain it: the p-value of :func:`~lepton_airflow.statistics.stability_test`, which knows that the
  rows of a cluster depend on one another, is at most ``alpha`` after Holm's correction for the number of columns.

Missing values are a bin of their own, so a column that loses its values drifts, too. A column that is gone, or whose
numbers have become text, has drifted without any test. Labels come late: the target is judged over the rows that have
one, and not at all when none has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lepton_airflow.data.duckdb_types import is_number
from lepton_airflow.data.profile import VERSION, count_rows, reference_counts, share_of, unseen_categories
from lepton_airflow.data.sql import fetch_row, nan_as_null, quote
from lepton_airflow.errors import BadInput, brief

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, kw_only=True)
class ColumnVerdict:
    """Whether one column has drifted, and the numbers behind it.

    :ivar distance: population stability index over the profile's bins [nats]; None if it cannot be computed.
    :ivar by_chance: the mean distance if nothing has changed.
    :ivar p_value: probability of a larger distance if nothing has changed, for this column alone.
    :ivar p_adjusted: the same, corrected for the number of columns.
    :ivar missing: share of rows without a value, before and now.
    :ivar unseen: the most frequent values that the reference rows do not have, with their rows now; None if the profile
        does not name all of its values.
    :ivar positive: of a target of two classes ``class``, the positive one, and its share ``before`` and ``now``.
    """

    name: str
    role: Literal["feature", "target"]
    drifted: bool
    reason: str
    distance: float | None = None
    by_chance: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    missing: list[float] = field(default_factory=list)
    unseen: dict[str, int] | None = None
    positive: dict[str, Any] | None = None


def check_profile(profile: Mapping[str, Any], where: str) -> None:
    """Raise BadInput unless this is a reference profile of some rows, in a version that is known."""
    version = profile.get("profile") if isinstance(profile, Mapping) else None
    if not isinstance(version, int) or "columns" not in profile:
        raise BadInput(
            f"{where} is no reference profile: expected prepare.output['profile'], or a model package."
        )
    if version > VERSION:
        raise BadInput(
            f"{where} is a profile of version {version}, this lepton_airflow knows up to {VERSION}: upgrade lepton_airflow."
        )
    if not profile["rows"]:
        raise BadInput(f"{where} describes no rows: nothing can drift away from it.")


def judge_columns(
    con: duckdb.DuckDBPyConnection,
    table: str,
    profile: Mapping[str, Any],
    cluster_column: str | None = None,
    threshold: float = 0.25,
    alpha: float = 0.05,
) -> list[ColumnVerdict]:
    """Judge every profiled column of a table; the columns that changed most come first.

    :param table: a table or view of the current rows; it need not have the target yet, which then gets no verdict.
    :param cluster_column: column that names dependent rows; without one, rows are as dependent as the profile says.
    """
    from lepton_airflow.statistics.distances import holm

    kinds = {name: kind for name, kind, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
    read = [
        f"{_as_profiled(name, kinds[name], column)} AS {quote(name)}"
        for name, column in profile["columns"].items()
        if name in kinds
    ]
    if read:
        table = f"(SELECT * REPLACE ({', '.join(read)}) FROM {table})"
    found = []
    for name, column in profile["columns"].items():
        role: Literal["feature", "target"] = "target" if name == profile["target"] else "feature"
        rows = table
        if role == "target":
            if name not in kinds or not fetch_row(con, f"SELECT count({quote(name)}) FROM {table}")[0]:
                continue
            rows = f"(SELECT * FROM {table} WHERE {quote(name)} IS NOT NULL)"
        structural = _structural(column, kinds.get(name))
        if structural:
            found.append(ColumnVerdict(name=name, role=role, drifted=True, reason=structural))
        else:
            positive = profile.get("positive_class") if role == "target" else None
            found.append(_measured(con, rows, name, role, column, cluster_column, positive))
    tested = [v for v in found if v.p_value is not None]
    adjusted = dict(
        zip([v.name for v in tested], holm([v.p_value for v in tested if v.p_value is not None]), strict=True)
    )
    judged = [_decided(v, adjusted.get(v.name), threshold, alpha) for v in found]
    return sorted(judged, key=lambda v: (not v.drifted, v.distance is not None, -(v.distance or 0.0), v.name))


def _as_profiled(name: str, kind: str, column: Mapping[str, Any]) -> str:
    """SQL of a column as PrepareData and the model read it, whatever type a missing value has made of it.

    NaN is missing, a boolean 0 or 1, and a whole number in a column of categories the same text as that of an integer.
    """
    value = quote(name)
    if kind in ("FLOAT", "DOUBLE"):
        value = nan_as_null(value)
    if column["kind"] == "number":
        return value
    if kind == "BOOLEAN" and {label for label, _ in column["top"]} <= {"0", "1"}:
        return f"CAST({value} AS TINYINT)"
    if kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        whole = f"{value} = trunc({value}) AND abs({value}) < 1e15"
        return f"CASE WHEN {whole} THEN CAST({value} AS BIGINT)::TEXT ELSE {value}::TEXT END"
    return value


def _structural(column: Mapping[str, Any], kind: str | None) -> str:
    """Why a column cannot be compared at all; empty if it can."""
    if kind is None:
        return "the column is gone"
    no_values = '"NULL"'  # DuckDB's type of a column without values
    if column["kind"] == "number" and not is_number(kind) and kind != no_values:
        return f"numbers have become {kind}"
    return ""


def _measured(
    con: duckdb.DuckDBPyConnection,
    table: str,
    name: str,
    role: Literal["feature", "target"],
    column: Mapping[str, Any],
    cluster: str | None,
    positive: Any,
) -> ColumnVerdict:
    """Measure the distance and its p-value; ``drifted`` is decided once all columns are measured."""
    from lepton_airflow.statistics.distances import DesignEffect, design_effect, stability_test

    counts = count_rows(con, table, name, column, cluster)
    before, now = reference_counts(column), counts.sum(axis=0)
    known = [DesignEffect(**column["design_effect"])] if "design_effect" in column else []
    own = design_effect(counts) if cluster else None
    # If nothing has changed, both sides have the same design effect. The larger one counts: few current clusters give an
    # uncertain one, and a reference of smaller clusters one that is too small. Rows also depend on one another where no
    # column says so.
    effect = max([*known, *([own] if own else [])], key=lambda e: e.mean, default=None)
    test = stability_test(before, now, effect)
    missing = [round(float(counts[-1] / sum(counts)), 6) for counts in (before, now)]
    return ColumnVerdict(
        name=name,
        role=role,
        drifted=False,
        reason="" if effect or not cluster else "all rows are one cluster, which cannot be told from chance",
        distance=round(test.distance, 6),
        by_chance=round(test.by_chance, 6),
        p_value=test.p_value if effect or not cluster else None,
        missing=missing,
        unseen=unseen_categories(con, table, name, column),
        positive=_positive(column, before, now.tolist(), positive),
    )


def _positive(
    column: Mapping[str, Any], before: Sequence[int], now: Sequence[int], positive: Any
) -> dict[str, Any] | None:
    """The shares of the positive class; None where there is none, or the profile does not count it by name."""
    if positive is None:
        return None
    shares = [share_of(column, counts, positive) for counts in (before, now)]
    return None if None in shares else {"class": positive, "before": shares[0], "now": shares[1]}


def _decided(
    verdict: ColumnVerdict, p_adjusted: float | None, threshold: float, alpha: float
) -> ColumnVerdict:
    """Decide, and give the reason, once the correction for all columns is known."""
    if p_adjusted is None or verdict.distance is None:
        return verdict
    far, sure = verdict.distance >= threshold, p_adjusted <= alpha
    reason = f"PSI {verdict.distance:.2f}"
    if far and not sure:
        reason += f", which chance explains (by chance {verdict.by_chance:.2f}, p {p_adjusted:.2g})"
    if verdict.positive:
        was, came = verdict.positive["before"], verdict.positive["now"]
        reason += f", positive class {brief(verdict.positive['class'])} {was:.1%} before and {came:.1%} now"
    if far and sure:
        before, now = verdict.missing
        if now == 1:
            reason = f"every value is missing ({reason})"
        elif abs(now - before) >= 0.05:
            reason += f", missing {before:.1%} before and {now:.1%} now"
        if verdict.unseen:
            names = ", ".join(repr(label[:40]) for label in list(verdict.unseen)[:3])
            reason += f", values never seen before: {names}"
    return replace(verdict, drifted=far and sure, reason=reason, p_adjusted=p_adjusted)
