"""The champion as the store has it now, and MLflow's aliases, which show it."""

from __future__ import annotations

from dataclasses import dataclass

from lepton_airflow.connections import Connection
from lepton_airflow.registry.ledger import Ledger, Registrations, find_version
from lepton_airflow.registry.mlflow import glance, open_registry
from lepton_airflow.sdk.stage import RunInfo
from lepton_airflow.store.files import Store
from lepton_airflow.store.lease import lease


@dataclass(frozen=True)
class Shown:
    """What MLflow shows: the versions of the champion and of the previous one, and a version's page, where there is one."""

    champion: int | None
    previous: int | None
    link: str | None


def show(
    run: RunInfo, name: str, version: int, tracking_uri: str | None, connection: Connection | None
) -> Shown:
    """Set MLflow's aliases to what the ledger says now, unless they are; a version's page is told as well.

    The ledger is read again under the lease, so that of two tasks the one that writes last never shows the older state.
    """
    shown = glance(tracking_uri, connection, name, version)
    champion, previous, aliases = _decided(run.store, name)
    if shown and shown.agrees(tags={}, aliases=aliases):
        return Shown(champion, previous, shown.link)
    with open_registry(tracking_uri, connection, run.workdir) as mlflow:
        with lease(run.store, f"register/{name}", run.check_stop):
            champion, previous, aliases = _decided(run.store, name)
            mlflow.point(name, aliases, lambda version: find_version(run.store, name, version).sha256)
        return Shown(champion, previous, mlflow.link(name, version))


def _decided(store: Store, name: str) -> tuple[int | None, int | None, dict[str, int | None]]:
    """Champion, previous and all aliases as the store has them now."""
    move = Ledger(store, name).newest()
    registration = Registrations(store, name).newest()
    champion, previous = (move.version, move.previous) if move else (None, None)
    aliases: dict[str, int | None] = {"champion": champion, "previous": previous}
    return champion, previous, aliases | (registration.alias_versions if registration else {})
