"""Follows what the store asks an endpoint to serve: has a version checked, and puts it into service or rejects it.

A store that is damaged in places takes nothing out of service: of the versions that were not rejected the newest whole one is
served, and the status says what is wrong with those after it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, LoadVerdict, Status
from lepton_airflow.errors import BadInput, IntegrityError, LeptonError, StoreError
from lepton_airflow.serving.model import over_budget
from lepton_airflow.store.files import Store, now
from lepton_airflow.store.identity import KEY as IDENTITY, identity_of

log = logging.getLogger(__name__)

_LATEST = 20  # errors that a status tells of
_TRIES = 3  # of a version whose loading ends the process that tries it
_PAUSE_S = 2.0  # between two tries, for what has ended to be replaced and its memory to be free
_AGAIN_S = 30.0  # between two looks at what could not be read, and whether the log is the same

_MOST_LOOKS = 20  # of these until a version that was accepted and fails here is tried again; at first one

_T = TypeVar("_T")


class Died(LeptonError):
    """Raised when the process that tried a version ended without a word."""


@dataclass
class _Failure:
    """Of a version that was accepted, and could not be loaded here.

    :ivar looks: until it is tried again, of which ``left`` are to come.
    """

    error: LeptonError
    looks: int
    left: int


class NotNow(LeptonError):
    """Raised when a version cannot be tried or loaded for reasons that say nothing about it."""


class Fleet(Protocol):
    """What loads versions and answers requests with them."""

    def try_out(
        self, desired: Desired, files: Mapping[str, bytes], golden: Mapping[str, Any]
    ) -> dict[str, float]:
        """Load and measure a version where its failure harms nobody; raises LeptonError, :class:`Died` when it ends the process, :class:`NotNow`."""
        ...

    def put(
        self,
        desired: Desired,
        files: Mapping[str, bytes],
        numbers: dict[str, float],
        accept: Callable[[], bool],
    ) -> None:
        """Have requests answered by a version that was tried, if ``accept`` says so when all processes that answer hold it.

        Else, and when this raises LeptonError (:class:`Died`: a process with it has ended), the former version stays, alone.
        """
        ...


class Reconciler:
    """Keeps one server at the newest desired version that was not rejected.

    :param status: who this server is; its ``server`` and ``url`` stay.
    :param poll_s: how often to look for a newer desired version [seconds].
    """

    def __init__(self, store: Store, endpoint: str, status: Status, fleet: Fleet, poll_s: float) -> None:
        self.store = store
        self.endpoint = endpoint
        self.status = status
        self.failures = 0  # looks at the store that failed
        self.beat_failures = 0  # reports that could not be written
        self.beaten = 0.0  # when the last one was written, time.time()
        self._fleet = fleet
        self._poll_s = poll_s
        self._log = DesiredLog(store, endpoint)
        self._newest: Desired | None = None
        self._in_service: Desired | None = None
        self._errors: dict[int, LeptonError] = {}
        self._digests: dict[int, str] = {}  # of the packages that these are about
        self._told: dict[int, str] = {}  # the error of each version that the log tells of
        self._failures: dict[int, _Failure] = {}
        self._problems: list[str] = []
        self._identity: bytes | None = None  # of the store, where it can change at its path
        self._looked = False
        self._settled = False
        self._look_again = 0.0
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
            except Exception as error:
                self.failures += 1
                reason = f"{type(error).__name__}: {error}"
                if self.status.reason != reason:
                    log.exception("endpoint %s: the reconciler tries again", self.endpoint)
                self._set_status(reason=reason)
            if self._stop.wait(self._poll_s):
                return

    def stop(self) -> None:
        """Have :meth:`run` return soon."""
        self._stop.set()

    def recover(self) -> None:
        """Count how often this server was ended while it loaded a version, and reject that one when it was often.

        A lack of memory may end a whole container, without an exception and a verdict. Once may have another cause.
        """
        statuses = endpoints.read_statuses(self.store, self.endpoint)
        former = next((s for s in statuses if s.server == self.status.server), None)
        if former is None or former.state != "loading" or not former.desired:
            return
        if not former.reason.endswith(_LOADING):  # it could not be read, or not be tried
            return
        if self._verdict_of(former.desired) is not None:
            return
        tries = former.tries + 1
        if tries < _TRIES:
            self.status = replace(self.status, tries=tries, desired=former.desired)
            return
        error = LeptonError(
            f"the server was killed {tries} times while it loaded this version; its log and the kernel's say why, such as too "
            "little memory. Deploy a lighter model, or this one again."
        )
        self._decide(former.desired, error=endpoints.error_record(error))

    def step(self) -> None:
        """Serve what should be served now, if that is not what is served already."""
        self._check_store()
        if self._look_again and time.monotonic() > self._look_again:
            self._check_log()
        fresh = self._look()
        if fresh is not None:
            self._newest = fresh
            self._settled = False
            if fresh == self._in_service:
                self._set_status(desired=fresh.sequence)
            else:
                same = self.status.desired == fresh.sequence
                self._set_status(
                    state="loading",
                    desired=fresh.sequence,
                    reason=f"version {fresh.version} {_LOADING}",
                    tries=self.status.tries if same else 0,
                )
        if self._newest is None:
            self._set_status(reason="", problems=self._problems)
            return
        self._look_again = self._look_again or time.monotonic() + _AGAIN_S
        if not self._settled:
            self._problems = [p for p in self._problems if p.startswith(_OF_LOG)]
            self._settle(self._newest)
            self._settled = True
        newest = self._newest.sequence
        if newest in self._errors:
            self._set_status(state="rejected", reason=str(self._errors[newest]), problems=self._problems)
        elif self._in_service == self._newest:
            self._set_status(
                state="serving", reason="", problems=self._problems, tries=0, errors=self._latest_errors()
            )
        else:
            self._set_status(reason=" ".join(self._problems), problems=self._problems)

    def _look(self) -> Desired | None:
        """The newest desired version when it is not the one known: one request to the store, after the first look."""
        if not self._looked:
            newest, damaged = self._log.newest_whole()
            self._problems = [f"{_OF_LOG}{sentence}" for sentence in damaged]
            self._looked = True
            here = self._in_service
            is_back = here is not None and (newest.sequence if newest else 0) < here.sequence
            # The log could not be read for a moment, or its end is damaged.
            if here is not None and is_back and (self._log_has(here) or self._is_damaged(here)):
                return here
            return newest
        try:
            fresh = self._log.after(self._newest.sequence if self._newest else 0)
        except LeptonError as error:
            if any(problem.startswith(_OF_LOG) for problem in self._problems):
                return None  # it is known, and looked at again now and then
            if not isinstance(error, IntegrityError):
                self._log.highest()  # raises where it is not that record alone
            self._looked = False  # a record is damaged since: the log is read anew, past it
            return None
        return fresh[-1] if fresh else None

    def _check_store(self) -> None:
        """Raise StoreError where another store than before is at its path, or none, as when a file system is unmounted."""
        if not self.store.is_local:
            return
        if self._identity is None:
            with suppress(LeptonError):  # one that is damaged serves what it can
                identity_of(self.store)  # makes it where there is none yet
                self._identity = self.store.read(IDENTITY)
        elif (found := self.store.read(IDENTITY)) != self._identity:
            if found and self._newest is None:  # before a version was asked for there
                self._identity = found
                return
            what = "another store than before" if found else "no store any more"
            raise StoreError(
                f"{self.store.root} holds {what}: mount the one that was there again, or restart the server where this one is meant."
            )

    def _log_has(self, known: Desired) -> bool:
        with suppress(LeptonError):
            return self._log.whole(known.sequence) == known
        return False

    def _is_damaged(self, known: Desired) -> bool:
        """Whether the record of a version that was read before is there, and cannot be read any more."""
        try:
            self._log.record(known.sequence)
        except LeptonError:
            return True
        return False

    def _check_log(self) -> None:
        """Look from the start where the log is not the one that was read, and at what could not be read before."""
        self._look_again = 0.0
        for failure in self._failures.values():
            failure.left -= 1
        known = self._newest
        # One behind a record that is missing is not found by its number.
        is_behind = self._log.highest() > (known.sequence if known else 0)
        if known is not None and self._is_damaged(known):
            self._looked = False  # which tells of it
        elif known is not None and self._log.whole(known.sequence) != known:
            log.warning(
                "endpoint %s: record %d is another one than before, or is gone, as after the restoration of a backup: the log "
                "is read anew",
                self.endpoint,
                known.sequence,
            )
            self._newest, self._looked = None, False
            self._errors, self._told, self._failures = {}, {}, {}
            self._set_status(errors={})
        elif is_behind or self._problems or self.status.state == "rejected":
            # What was accepted and could not be loaded here may be mended by now; a verdict stays.
            self._looked = not is_behind and not any(p.startswith(_OF_LOG) for p in self._problems)
            self._newest = known if self._looked else None
            self._errors = {}
            self._settled = False

    def _settle(self, newest: Desired) -> None:
        """Put the newest version into service that was not rejected and that this server can serve, unless it is there."""
        failed: Exception | None = None
        for desired in self._candidates(newest):
            here = self._in_service
            if desired == here or self._stop.is_set():
                return
            if here and desired.sequence < here.sequence <= newest.sequence:
                return  # a record that was damaged leads no server back
            try:
                if self._put_into_service(desired):
                    return
            except _UNREADABLE as error:  # which says nothing about the version
                failed = failed or error
                what = "waits" if isinstance(error, NotNow) else "cannot be read"
                self._problems.append(f"version {desired.version} {what}: {error}")
                if self._in_service is not None:
                    return
        if failed and self._in_service is None:
            raise failed

    def _candidates(self, newest: Desired) -> Iterator[Desired]:
        """The newest version, and those before it that were not rejected and whose records are whole."""
        yield newest
        number = newest.sequence - 1
        while number > 0:
            try:
                verdict = self._verdict_of(number)
                if verdict is not None and verdict.error:
                    number = min(verdict.instead, number - 1)
                    continue
                yield self._log.existing(number)
            except _UNREADABLE as error:
                self._problems.append(str(error))
            number -= 1

    def report(self) -> None:
        """Write this server's status to the store, with the time."""
        with self._writing:  # one writer at a time, so that an older status never replaces a newer one
            if not self._left:
                status = replace(self.status, beat=endpoints.precise_now())
                try:
                    self._check_store()
                    endpoints.write_status(self.store, self.endpoint, status)
                except Exception:
                    self.beat_failures += 1
                    raise
                self.beaten = time.time()

    def leave(self) -> None:
        """Remove this server's status from the store: it has ended."""
        with self._writing:
            self._left = True  # a heartbeat that waits for the lock must not write the status again
            self._check_store()
            endpoints.remove_status(self.store, self.endpoint, self.status.server)

    def _verdict_of(self, sequence: int) -> LoadVerdict | None:
        return endpoints.read_verdict(self.store, self.endpoint, sequence)

    def _put_into_service(self, desired: Desired) -> bool:
        """Have a version checked and put it into service; False when a check or an earlier verdict rejects it."""
        verdict = self._verdict_of(desired.sequence)
        if verdict and verdict.error:
            return self._reject(desired, endpoints.error_of(verdict.error))
        former = self._failures.get(desired.sequence)
        if former and former.left > 0:
            return self._reject(desired, former.error)
        if not former:
            log.info("endpoint %s: loading version %s (%s)", self.endpoint, desired.version, desired.package)
        numbers: dict[str, float] = {}

        def accept() -> bool:
            nonlocal verdict
            verdict = verdict or self._decide(desired.sequence, numbers)
            return not verdict.error

        try:
            files = self.store.load(self.store.here(desired.package))
            golden = self._golden(desired)
            numbers = self._tried(desired, lambda: self._fleet.try_out(desired, files, golden))
            if over := over_budget(desired, numbers):
                # The budgets decide about a new version; one that was accepted before is served on a slow day too.
                if verdict is None:
                    raise over
                log.warning(
                    "endpoint %s: version %s was accepted before: %s", self.endpoint, desired.version, over
                )
            self._tried(desired, lambda: self._fleet.put(desired, files, numbers, accept))
        except (StoreError, NotNow):
            raise
        except LeptonError as error:
            if self._stop.is_set():
                return False
            if verdict is None:
                verdict = self._decide(desired.sequence, numbers, endpoints.error_record(error))
            if not verdict.error:
                looks = min(2 * former.looks, _MOST_LOOKS) if former else 1
                self._failures[desired.sequence] = _Failure(error, looks, looks)
            return self._reject(desired, error)
        if verdict and verdict.error:
            return self._reject(desired, endpoints.error_of(verdict.error))
        self._failures.pop(desired.sequence, None)
        self._told.pop(desired.sequence, None)
        self._in_service = desired
        log.info("endpoint %s: version %s is in service", self.endpoint, desired.version)
        self._set_status(
            serving=desired.sequence, version=desired.version, sha256=desired.sha256, numbers=numbers
        )
        return True

    def _golden(self, desired: Desired) -> dict[str, Any]:
        content = self.store.load(self.store.here(desired.golden))
        try:
            golden: dict[str, Any] = json.loads(content[""])
            if len(golden["rows"]) == len(golden["answers"]):
                return golden
        except (KeyError, TypeError, ValueError):
            pass
        raise BadInput(f"{desired.golden} holds no golden requests: deploy the version again.")

    def _tried(self, desired: Desired, call: Callable[[], _T]) -> _T:
        """What a call gives. One whose process is killed is made again: the kernel, or anybody, may have ended it."""
        for last in range(_TRIES):
            try:
                return call()
            except Died as error:
                if self._stop.is_set():
                    raise
                if desired.sequence not in self._failures:
                    log.warning("endpoint %s: version %s: %s", self.endpoint, desired.version, error)
                if last == _TRIES - 1:
                    raise LeptonError(
                        f"{error} So it was {_TRIES} times; its log and the kernel's say why, such as too little memory. "
                        "Deploy a lighter model, or this one again."
                    ) from None
                self._stop.wait(_PAUSE_S)
        raise AssertionError  # pragma: no cover

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
        self._check_store()
        return endpoints.decide(self.store, self.endpoint, mine)

    def _reject(self, desired: Desired, error: LeptonError) -> bool:
        if desired.sequence in self._failures:  # which the status logs as a problem
            self._problems.append(f"version {desired.version} was accepted and fails here: {error}")
        elif self._told.get(desired.sequence) != str(error):
            log.error("endpoint %s: version %s is rejected: %s", self.endpoint, desired.version, error)
        self._told[desired.sequence] = str(error)
        self._errors[desired.sequence] = error
        self._digests[desired.sequence] = desired.sha256
        self._set_status(errors=self._latest_errors())
        return False

    def _latest_errors(self) -> dict[str, dict[str, Any]]:
        """The errors of a status, each with the digest of its package: after a restoration another version has its number."""
        return {
            str(n): endpoints.error_record(self._errors[n]) | {"sha256": self._digests[n]}
            for n in sorted(self._errors)[-_LATEST:]
        }

    def _set_status(self, **changes: object) -> None:
        """Change the status, and write it at once if it differs."""
        status = replace(self.status, **changes)  # type: ignore[arg-type]
        if status == self.status:
            return
        for problem in status.problems:
            if problem not in self.status.problems:
                log.warning("endpoint %s: %s", self.endpoint, problem)
        self.status = status
        try:
            self.report()
        except StoreError as error:  # the next heartbeat writes it
            log.warning("endpoint %s: %s", self.endpoint, error)


# What a damaged store raises. A record of the wrong types shows when it is used.
_UNREADABLE = (LeptonError, TypeError, ValueError, AttributeError, KeyError)
_LOADING = "is being loaded."
_OF_LOG = "the log of the endpoint is damaged: "
