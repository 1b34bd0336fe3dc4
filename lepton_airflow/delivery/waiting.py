"""Wait until the servers of an endpoint say that they serve what was asked for, or why they do not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, Status
from lepton_airflow.errors import LeptonError
from lepton_airflow.sdk.stage import RunInfo

_POLL_S = 0.25


def wait_until_served(run: RunInfo, desired: Desired, timeout_s: float) -> Status:
    """Wait until every living server serves this record or a later one; returns what one of them says.

    :raises LeptonError: a server rejected it, or they do not serve it in time.
    """
    log = DesiredLog(run.store, desired.endpoint)
    deadline = time.monotonic() + timeout_s
    while True:
        statuses = endpoints.read_statuses(run.store, desired.endpoint)
        living = [status for status in statuses if status.alive]
        for status in living:
            error = status.errors.get(str(desired.sequence))
            if error and error.get("sha256", desired.sha256) == desired.sha256:
                raise _rejection(desired.endpoint, status, error)
        if living and all(_serves(status, desired, log) for status in living):
            return min(living, key=lambda status: (status.serving or 0, status.server))
        if time.monotonic() > deadline:
            raise LeptonError(_why_not_served(run, statuses, desired, timeout_s))
        run.check_stop()
        time.sleep(_POLL_S)


def _why_not_served(run: RunInfo, statuses: Sequence[Status], desired: Desired, timeout_s: float) -> str:
    """Why no server has served the record in time, and what to do, in a sentence."""
    start = f"python -m lepton_airflow serve {desired.endpoint} --store {run.store.root}"
    within = f"within timeout_s={timeout_s:g}"
    if not statuses:
        return f"no server reported for endpoint {desired.endpoint!r} {within}: start one with: {start}"
    latest = min(statuses, key=lambda status: abs(status.age_s))
    if not latest.alive:
        when = f"{latest.age_s:.0f} s old" if latest.age_s > 0 else f"{-latest.age_s:.0f} s in the future"
        return (
            f"no server of endpoint {desired.endpoint!r} reports: the last heartbeat, of {latest.server}, is {when}. If it has "
            f"ended, start it again ({start}); else its log says why it cannot write to the store, or both clocks differ."
        )
    late = next((s for s in statuses if s.alive and (s.serving or 0) < desired.sequence), latest)
    return (
        f"server {late.server} of endpoint {desired.endpoint!r} does not serve version {desired.sequence} of its records "
        f"{within}: {late.reason or 'it has not looked at the store since; see its log.'}"
    )


def _serves(status: Status, desired: Desired, log: DesiredLog) -> bool:
    """Whether a server serves this record or a later one of the log as it is now, which may be a restored one."""
    serving = status.serving or 0
    if serving <= desired.sequence:
        return serving == desired.sequence and status.sha256 == desired.sha256
    later = log.whole(serving)
    return later is not None and later.sha256 == status.sha256


def _rejection(endpoint: str, status: Status, error: Mapping[str, Any]) -> LeptonError:
    former = f"version {status.version} stays in service" if status.version else "nothing is in service"
    message = (
        f"server {status.server} of endpoint {endpoint!r} rejected the version, {former}: {error['message']}"
    )
    return endpoints.error_of({**error, "message": message})
