"""Go back to a former champion: in the ledger, in MLflow and at an endpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from lepton_airflow.connections import Connection
from lepton_airflow.delivery.endpoints import DesiredLog, Status, check_endpoint_name, endpoints_asked
from lepton_airflow.delivery.waiting import wait_until_served
from lepton_airflow.errors import (
    BadConfiguration,
    BadInput,
    IntegrityError,
    LeptonError,
    Preempted,
    did_you_mean,
    from_record,
    require,
)
from lepton_airflow.registry.champion import Shown, show
from lepton_airflow.registry.deployment import Deployment
from lepton_airflow.registry.ledger import (
    Ledger,
    LedgerEntry,
    champion_before,
    check_model_name,
    find_version,
    models_with_champion,
)
from lepton_airflow.registry.mlflow import resolve_tracking
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ConnectionId, Result, RunInfo, Stage
from lepton_airflow.store.files import now

log = logging.getLogger(__name__)

_MOST = 500  # characters of a reason: it stands in receipts, whose size is limited


@dataclass(kw_only=True)
class RollbackModel(Stage):
    """Go back to a former champion: in the ledger, in MLflow's aliases and, if one is named, at an endpoint.

    First the package of the version that comes back is read and its digest verified. Then the ledger gets a record with
    the reason, MLflow's aliases ``champion`` and ``previous`` follow, and then the endpoint is asked for that version as
    DeployModel with ``name`` asks, under the limits of what it was asked for last; the task waits for its servers. A retry
    goes on where a try was killed, and a task instance moves the champion once.

    PromoteModel holds the package that was taken out until it becomes champion again, by ``allow_rolled_back`` or by a
    rollback to its version.

    Returns the values ``champion`` (the version after this task), ``rolled_back`` (the version that was taken out, or
    None), ``reason``, ``deployed`` (whether the champion is in service at the endpoint) and ``url`` (where, or None).

    :param name: name of the registered model.
    :param reason: why, in a sentence that stays in the ledger, at most 500 characters.
    :param version: a former champion to go back to; None: the one before the present one that was not rolled back itself.
    :param endpoint: name of an endpoint that gets that version, too; None: none does.
    :param tracking_uri: MLflow as a database, ``sqlite:////data/mlflow.db``, or as a server, ``http://host:5000``.
    :param mlflow: id of an Airflow Connection to an MLflow server; use it instead of ``tracking_uri`` with credentials.
    :param allow_other_inputs: go back also where inputs, outputs or classes differ from those of the version in service at the
        endpoint, whose clients are then refused or misled.
    :param on_backfill: in a backfill, ``register_only`` moves nothing and says what it would do, ``skip`` does nothing,
        ``full`` moves.
    :param timeout_s: how long to wait for the servers [seconds].
    :raises BadConfiguration: there is nothing to go back to, the version was never champion, the endpoint is not this
        model's or serves one of other inputs, or another task has moved the champion meanwhile.
    :raises IntegrityError: the package that should come back does not have its digest; nothing was moved.
    :raises BadInput: that package is gone; nothing was moved.
    :raises LeptonError: the champion was moved, and MLflow or the servers did not follow; may be retried.
    """

    cacheable: ClassVar[bool] = False
    windowed: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("mlflow-skinny", "onnxruntime")
    extra: ClassVar[str] = "evaluate,register"
    links: ClassVar[tuple[str, ...]] = ("mlflow", "endpoint")
    outputs: ClassVar[tuple[str, ...]] = ("champion", "rolled_back", "reason", "deployed", "url")

    name: str
    reason: str
    version: int | None = None
    endpoint: str | None = None
    tracking_uri: str | None = None
    mlflow: ConnectionId | None = None
    allow_other_inputs: bool = False
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"
    timeout_s: float = 120.0

    def run(self, run: RunInfo) -> Result:
        for library in self.engines:
            require(library, "RollbackModel", self.extra)
        check_model_name(self.name)
        if not self.reason.strip() or len(self.reason.strip()) > _MOST:
            raise BadConfiguration(
                f"reason has {len(self.reason.strip()):,} characters: expected a sentence of 1 to {_MOST} that says why."
            )
        may_move = backfill.may_act(run, self.on_backfill, f"the champion of {self.name!r} stays")
        connection = run.connection(self.mlflow) if self.mlflow else None
        resolve_tracking(self.tracking_uri, connection)
        deployment = self._deployment(run, self.endpoint) if self.endpoint is not None else None
        ledger = Ledger(run.store, self.name)
        moves = ledger.entries()
        moves += ledger.after(len(moves))  # a listing may be older than the newest record
        done = self._made(run, moves)
        if done is None:
            target = self._choose(run, moves)
            if deployment and not self.allow_other_inputs:
                deployment.refuse_other_inputs(target)
            if not may_move:
                why = backfill.reason(self.on_backfill)
                summary = f"champion version {moves[-1].version} of {self.name} stays, and version {target.version} would come back: {why}"
                return Result(summary=summary, values=self._values(moves[-1].version))
            done = self._move(run, moves[-1], target)
        try:
            return self._follow(run, connection, done, deployment)
        except LeptonError as error:
            message = (
                f"version {done.version} of {self.name!r} is champion again by move {done.sequence} of the ledger, but not all has "
                f"followed; a retry, or a rollback with version={done.version}, goes on from there: {error}"
            )
            raise from_record(type(error).__name__, message, error.exit_code) from error

    # -- what to do --------------------------------------------------------------------------------------------------

    def _deployment(self, run: RunInfo, endpoint: str) -> Deployment:
        """What the endpoint will be asked for, under the limits of what it was asked for last.

        An endpoint that does not serve this model is refused: nobody looks twice at a name at night.
        """
        check_endpoint_name(endpoint)
        newest = DesiredLog(run.store, endpoint).newest()
        if newest is None:
            raise BadConfiguration(
                f"endpoint {endpoint!r} was never asked for a version in {run.store.root}; "
                f"{did_you_mean(endpoint, endpoints_asked(run.store))}"
            )
        if newest.name not in (None, self.name):
            raise BadConfiguration(
                f"endpoint {endpoint!r} serves the champion of {newest.name!r}, not of {self.name!r}: name an endpoint of "
                "this model."
            )
        return Deployment(
            run=run,
            endpoint=endpoint,
            name=self.name,
            max_difference=newest.max_difference,
            max_latency_ms=newest.max_latency_ms,
            max_memory_mb=newest.max_memory_mb,
            allow_other_inputs=self.allow_other_inputs,
        )

    def _made(self, run: RunInfo, moves: Sequence[LedgerEntry]) -> LedgerEntry | None:
        """The rollback among these moves that this task instance has made, if it has."""
        mine = (m for m in reversed(moves) if (m.action, m.run_key) == ("rollback", run.run_key))
        return next((m for m in mine if self.version in (None, m.version)), None)

    def _choose(self, run: RunInfo, moves: Sequence[LedgerEntry]) -> LedgerEntry:
        """The move that once made the champion that comes back, whose package is whole."""
        from lepton_airflow.packaging.package import ModelPackage

        if not moves:
            raise BadConfiguration(
                f"model {self.name!r} has no champion in {run.store.root}, so there is nothing to go back to; "
                f"{did_you_mean(self.name, models_with_champion(run.store))}"
            )
        target = champion_before(moves) if self.version is None else self._named(run, moves)
        if target is None:
            raise BadConfiguration(
                f"there is nothing to go back to: before champion version {moves[-1].version} of {self.name!r} there is none that "
                "was not rolled back itself. Promote another one, or name a former champion with version=."
            )
        try:
            ModelPackage.open(run.fetch(target.package))
        except (BadInput, IntegrityError) as error:
            message = (
                f"version {target.version} of {self.name!r} cannot come back, and nothing was moved: {error}"
            )
            raise from_record(type(error).__name__, message, error.exit_code) from error
        return target

    def _named(self, run: RunInfo, moves: Sequence[LedgerEntry]) -> LedgerEntry:
        """The newest move that made the version asked for champion."""
        made = [move for move in moves if move.version == self.version]
        champion = moves[-1]
        if not made:
            find_version(run.store, self.name, self.version)  # raises where there is no such version at all
            known = ", ".join(str(version) for version in sorted({move.version for move in moves}))
            raise BadConfiguration(
                f"version {self.version} of {self.name!r} was never champion, so nobody can go back to it; champions were: {known}."
            )
        if made[-1].sha256 == champion.sha256 and (made[-1] is not champion or champion.action != "rollback"):
            same = (
                "is"
                if made[-1] is champion
                else f"has the same package as version {champion.version}, which is"
            )
            raise BadConfiguration(
                f"version {self.version} of {self.name!r} {same} champion now: name a former one."
            )
        return made[-1]

    def _move(self, run: RunInfo, champion: LedgerEntry, target: LedgerEntry) -> LedgerEntry:
        """Move the champion; returns the move, which is an earlier one where that has brought back this version already."""
        if target is champion:
            return champion
        run.check_stop()
        move = LedgerEntry(
            name=self.name,
            sequence=champion.sequence + 1,
            action="rollback",
            version=target.version,
            package=target.package,
            previous=champion.version,
            run_key=run.run_key,
            sentence=self.reason.strip(),
            window=target.window,
            identity=asdict(run.identity),
            decided=now(),
            rolled_back=champion.sha256,
        )
        ledger = Ledger(run.store, self.name)
        if ledger.append(move):
            return move
        later = ledger.after(champion.sequence)
        mine = self._made(run, later)  # the same task instance may run twice
        if mine is None:
            raise BadConfiguration(
                f"another task moved the champion of {self.name!r} from version {champion.version} to {later[-1].version} "
                "meanwhile, and this one moved nothing: look whether to go back from there."
            )
        return mine

    # -- what follows ------------------------------------------------------------------------------------------------

    def _follow(
        self, run: RunInfo, connection: Connection | None, move: LedgerEntry, deployment: Deployment | None
    ) -> Result:
        """Have MLflow and the endpoint follow the ledger. The endpoint does not wait for an MLflow that is away."""
        shown: Shown | LeptonError
        try:
            shown = show(run, self.name, move.version, self.tracking_uri, connection)
        except Preempted:
            raise
        except LeptonError as error:
            log.info("MLflow does not show it yet: %s", error)
            shown = error
        champion = Ledger(run.store, self.name).newest() or move
        summary = f"version {move.version} of {self.name} is champion again, version {move.previous} was taken out: {move.sentence}"
        status = None
        if champion.sequence != move.sequence:
            summary += f" Version {champion.version} became champion since, so nothing else was changed."
        elif deployment is not None:
            asked = deployment.ask()
            assert not isinstance(asked, str), "a champion never stays out for its data"
            status = wait_until_served(run, asked[0], self.timeout_s)
            summary += f" Version {status.version} is in service at {status.url}."
        if isinstance(shown, LeptonError):
            raise shown
        links = {"mlflow": shown.link, "endpoint": status and f"{status.url}/v2/models/{self.endpoint}"}
        return Result(
            summary=summary,
            values=self._values(champion.version, move, status),
            links={name: link for name, link in links.items() if link},
        )

    def _values(
        self, champion: int, move: LedgerEntry | None = None, status: Status | None = None
    ) -> dict[str, Any]:
        return {
            "champion": champion,
            "rolled_back": move and move.previous,
            "reason": move.sentence if move else self.reason.strip(),
            "deployed": status is not None and status.version == str(champion),
            "url": status and status.url,
        }
