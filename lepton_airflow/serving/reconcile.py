"""Follows what the store asks an endpoint to serve: loads a version, checks it, and puts it into service or rejects it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, Status
from lepton_airflow.errors import LeptonError, StoreError
from lepton_airflow.serving.model import ServedModel, measure, over_budget
from lepton_airflow.store.files import Store, now

log = logging.getLogger(__name__)

_LATEST = 20  # errors that a status tells of


class Reconciler:
    """Keeps one server at the newest desired version that was not rejected.

    :param status: who this server is; its ``server`` and ``url`` stay.
    :param swap: called with each version that is put into service; from then on it answers new requests.
    :param poll_s: how often to look for a newer desired version [seconds].
    """

    def __init__(
        self, store: Store, endpoint: str, status: Status, swap: Callable[[ServedModel], None], poll_s: float
    ) -> None:
        self.store = store
        self.endpoint = endpoint
        self.status = status
        self.failures = 0  # looks at the store that failed
        self._swap = swap
        self._poll_s = poll_s
        self._log = DesiredLog(store, endpoint)
        self._newest: Desired | None = None
        self._errors: dict[int, LeptonError] = {}
        self._looked = False
        self._settled = False
        self._left = False
        self._stop = threading.Event()
        self._writing = threading.Lock()

    def run(self) -> None:
        """Look, act and report until :meth:`stop`; when the store fails, try again."""
        while True:
            try:
                self.step()
            except LeptonError as error:
                self.failures += 1
                if self.status.reason != str(error):  # log it once, not at every look
                    log.warning("endpoint %s: %s", self.endpoint, error)
                self._set_status(reason=str(error))
            except Exception:
                self.failures += 1
                log.exception("endpoint %s: the reconciler tries again", self.endpoint)
            if self._stop.wait(self._poll_s):
                return

    def stop(self) -> None:
        """Have :meth:`run` return soon."""
        self._stop.set()

    def recover(self) -> None:
        """Reject the version whose loading has killed this server's former process, so that it is not loaded again and again.

        A crash of ONNX Runtime or a lack of memory leaves no exception and no verdict, only a status that says "loading".
        """
        statuses = endpoints.read_statuses(self.store, self.endpoint)
        former = next((s for s in statuses if s.server == self.status.server), None)
        if former is None or former.state != "loading" or not former.desired:
            return
        if endpoints.read_verdict(self.store, self.endpoint, former.desired) is None:
            error = LeptonError(
                "the server was killed while it loaded this version; its log and the kernel's say why, such as too little "
                "memory. Deploy a lighter model, or this one again."
            )
            self._decide(former.desired, error=endpoints.error_record(error))

    def step(self) -> None:
        """Serve what should be served now, if that is not what is served already."""
        fresh = self._look()
        if fresh is not None:
            self._newest = fresh
            self._settled = False
            self._set_status(
                state="loading", desired=fresh.sequence, reason=f"version {fresh.version} is being loaded."
            )
        if self._newest is None:
            self._set_status(reason="")
            return
        if not self._settled:
            self._settle(self._newest)
            self._settled = True
        newest = self._newest.sequence
        if newest in self._errors:
            self._set_status(state="rejected", reason=str(self._errors[newest]))
        elif self.status.serving == newest:
            self._set_status(state="serving", reason="")

    def _look(self) -> Desired | None:
        """The newest desired version when it is not the one known: one request to the store, after the first look."""
        if not self._looked:
            newest = self._log.newest()
            self._looked = True
            return newest
        fresh = self._log.after(self._newest.sequence if self._newest else 0)
        return fresh[-1] if fresh else None

    def _settle(self, newest: Desired) -> None:
        """Put the newest version into service that was not rejected and that this server can serve, unless it is there."""
        desired: Desired | None = newest
        while desired is not None and desired.sequence != self.status.serving and not self._stop.is_set():
            if desired.sequence not in self._errors and self._put_into_service(desired):
                return
            before = endpoints.not_rejected(self.store, self.endpoint, desired.sequence - 1)
            desired = self._log.existing(before) if before else None

    def report(self) -> None:
        """Write this server's status to the store, with the time."""
        with self._writing:  # one writer at a time, so that an older status never replaces a newer one
            if not self._left:
                status = replace(self.status, beat=endpoints.precise_now())
                endpoints.write_status(self.store, self.endpoint, status)

    def leave(self) -> None:
        """Remove this server's status from the store: it has ended."""
        with self._writing:
            self._left = True  # a heartbeat that waits for the lock must not write the status again
            endpoints.remove_status(self.store, self.endpoint, self.status.server)

    def _put_into_service(self, desired: Desired) -> bool:
        """Load and check a version and put it into service; False when a check or an earlier verdict rejects it."""
        verdict = endpoints.read_verdict(self.store, self.endpoint, desired.sequence)
        if verdict and verdict.error:
            return self._reject(desired, endpoints.error_of(verdict.error))
        started = time.monotonic()
        log.info("endpoint %s: loading version %s (%s)", self.endpoint, desired.version, desired.package)
        try:
            model = ServedModel.load(self.store, desired)
            numbers = measure(model, self.store, self._stop.is_set)
        except StoreError:  # which says nothing about the version
            raise
        except Exception as failure:
            error = (
                failure
                if isinstance(failure, LeptonError)
                else LeptonError(f"it cannot be loaded: {failure!r}.")
            )
            if error is not failure:
                log.exception("endpoint %s: version %s", self.endpoint, desired.version)
            if verdict is None:
                self._decide(desired.sequence, error=endpoints.error_record(error))
            return self._reject(desired, error)
        if self._stop.is_set():  # the measurement was cut short
            return False
        numbers = {"load_s": time.monotonic() - started} | numbers
        over = over_budget(desired, numbers)
        if verdict is None:
            verdict = self._decide(desired.sequence, numbers, endpoints.error_record(over) if over else None)
        if verdict.error:
            return self._reject(desired, endpoints.error_of(verdict.error))
        # The budgets decide about a new version; one that was accepted before is served on a slow day too.
        if over:
            log.warning(
                "endpoint %s: version %s was accepted before: %s", self.endpoint, desired.version, over
            )
        self._swap(model)
        log.info("endpoint %s: version %s is in service", self.endpoint, desired.version)
        self._set_status(
            serving=desired.sequence, version=desired.version, sha256=desired.sha256, numbers=numbers
        )
        return True

    def _decide(
        self,
        sequence: int,
        numbers: dict[str, float] | None = None,
        error: dict[str, object] | None = None,
    ) -> LoadVerdict:
        mine = LoadVerdict(
            sequence=sequence,
            accepted=error is None,
            server=self.status.server,
            numbers=numbers or {},
            error=error,
            decided=now(),
        )
        return endpoints.decide(self.store, self.endpoint, mine)

    def _reject(self, desired: Desired, error: LeptonError) -> bool:
        log.error("endpoint %s: version %s is rejected: %s", self.endpoint, desired.version, error)
        self._errors[desired.sequence] = error
        latest = sorted(self._errors)[-_LATEST:]
        self._set_status(errors={str(n): endpoints.error_record(self._errors[n]) for n in latest})
        return False

    def _set_status(self, **changes: object) -> None:
        """Change the status, and write it at once if it differs."""
        status = replace(self.status, **changes)  # type: ignore[arg-type]
        if status == self.status:
            return
        self.status = status
        try:
            self.report()
        except StoreError as error:  # the next heartbeat writes it
            log.warning("endpoint %s: %s", self.endpoint, error)
