"""Put a model into service at an endpoint, and wait until its servers say that it is."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import Artifact, Receipt, canonical_json, digest_of, pin, split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog, Status, check_endpoint_name
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, require
from lepton_airflow.registry.ledger import Ledger, LedgerEntry, check_model_name, is_newer
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage
from lepton_airflow.store.files import now

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.packaging.card import ModelCard
    from lepton_airflow.packaging.package import ModelPackage

log = logging.getLogger(__name__)

_GOLDEN_ROWS = 32
_POLL_S = 0.25


@dataclass(kw_only=True)
class DeployModel(Stage):
    """Put a model into service at a named endpoint, and wait until its servers report that it is.

    The version asked for becomes a numbered record in the store. The servers of the endpoint follow these records; start
    them yourself, with ``python -m lepton_airflow serve ENDPOINT``. Each server loads the package, verifies its digest,
    answers golden requests whose answers this stage has computed, and measures itself. It answers clients with the
    version only when all is within the limits; otherwise it rejects the version, and the former one stays in service.
    When the version is in service already, the task ends at once. A task that comes late never replaces a champion by an
    older one, nor a package by one of older data.

    Returns the values ``endpoint``, ``deployed`` (whether this task's version is in service), ``version``, ``sha256``
    and ``url`` (those in service after this task, or None), and the artifact ``golden`` (JSON).

    :param endpoint: name of the endpoint: letters, digits, ``.``, ``_`` and ``-``.
    :param name: name of a registered model: its champion, as the ledger has it when this stage runs, is deployed.
    :param model: instead of ``name`` a package, such as ``train.output["model"]``: this one is deployed.
    :param golden: rows for the golden requests, such as ``prepare.output["test"]``; None: rows made from the profile
        that the package holds, and of zeros, ones and missing values where it holds none.
    :param max_difference: of a server's answer from the golden one [probability; for regression a share of the largest
        golden answer].
    :param max_latency_ms: 95th percentile of a one-row request inside the server [milliseconds].
    :param max_memory_mb: a process with this version loaded [MiB].
    :param timeout_s: how long to wait for the servers [seconds].
    :param allow_other_inputs: deploy a model whose inputs, outputs or classes differ from those of the one in service, whose
        clients it refuses or misleads.
    :param on_backfill: in a backfill, ``register_only`` leaves the endpoint as it is, ``skip`` does nothing, ``full``
        deploys.
    :raises BadConfiguration: both or neither of ``name`` and ``model``, a model without a champion, a wrong name, other inputs
        than those of the model in service.
    :raises IntegrityError: a server found bytes that are not those of the digest; not retried.
    :raises BadInput: a server cannot run the package, or answers otherwise than here; not retried.
    :raises LeptonError: no server within ``timeout_s``, or one over its budget; may be retried.
    """

    cacheable: ClassVar[bool] = False
    windowed: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    extra: ClassVar[str] = "evaluate"
    links: ClassVar[tuple[str, ...]] = ("endpoint",)
    outputs: ClassVar[tuple[str, ...]] = ("golden", "endpoint", "deployed", "version", "sha256", "url")

    endpoint: str
    name: str | None = None
    model: ArtifactUri | None = None
    golden: ArtifactUri | None = None
    max_difference: float = 1e-4
    max_latency_ms: float = 100.0
    max_memory_mb: float = 2048.0
    timeout_s: float = 120.0
    allow_other_inputs: bool = False
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"

    def run(self, run: RunInfo) -> Result:
        for library in self.engines:
            require(library, "DeployModel", self.extra)
        check_endpoint_name(self.endpoint)
        if (self.name is None) == (self.model is None):
            raise BadConfiguration(
                f"name={self.name!r} and model={self.model!r}: pass one of them, a registered model whose champion "
                "should be deployed, or a package."
            )
        if not backfill.may_act(run, self.on_backfill, f"endpoint {self.endpoint!r} gets no version"):
            return self._unchanged(run, backfill.reason(self.on_backfill))
        started = time.monotonic()
        wanted = _Wanted(self, run)
        records = DesiredLog(run.store, self.endpoint)
        while True:
            run.check_stop()
            newest = records.newest()
            # Read the ledger after the endpoint's records: then this request is never older than the newest record.
            desired, golden = wanted.look()
            newer = self._newer(run, newest, desired)
            if newer:
                return self._unchanged(run, newer)
            if not self.allow_other_inputs:
                self._refuse_other_inputs(run, newest, desired)
            asked = self._asked_before(run, newest, desired) or records.append_after(newest, desired)
            if asked:
                desired = asked
                break
            log.info("endpoint %s: another task asked for a version meanwhile, looking again", self.endpoint)
        log.info(
            "endpoint %s: version %s is asked for by record %d",
            self.endpoint,
            desired.version,
            desired.sequence,
        )
        status = self._wait(run, desired)
        deployed = status.serving == desired.sequence
        numbers = status.numbers
        summary = (
            f"version {desired.version} is in service at {status.url}: p95 {numbers['latency_p95_ms']:.2f} ms, "
            f"{numbers['memory_mib']:.0f} MiB, answers within {numbers['difference']:.1g} of the golden ones."
            if deployed
            else f"version {desired.version} was asked for and then version {status.version}, which is in service at "
            f"{status.url}."
        )
        return Result(
            summary=summary,
            artifacts={"golden": golden},
            values=self._values(status, deployed=deployed),
            metrics={**numbers, "ready_s": time.monotonic() - started},
            links={"endpoint": f"{status.url}/v2/models/{self.endpoint}"},
        )

    # -- what to ask for -------------------------------------------------------------------------------------------

    def _asked_before(self, run: RunInfo, newest: Desired | None, wanted: Desired) -> Desired | None:
        """The record that asks for the same already, this task's own or the newest one, unless it was rejected."""
        if newest is None:
            return None
        records = DesiredLog(run.store, self.endpoint)
        mine = [d for d in records.find("run_key", run.run_key) if d.sequence < newest.sequence]
        for desired in (newest, *reversed(mine)):
            if wanted.asks_as(desired):
                verdict = endpoints.read_verdict(run.store, self.endpoint, desired.sequence)
                if verdict and verdict.error:
                    return None
                # A server that could not load an accepted version, as its bytes were damaged, tries again for a new record only.
                statuses = endpoints.read_statuses(run.store, self.endpoint)
                failed = any(
                    s.alive
                    and (error := s.errors.get(str(desired.sequence)))
                    and error.get("sha256", desired.sha256) == desired.sha256
                    for s in statuses
                )
                return None if failed else desired
        return None

    def _newer(self, run: RunInfo, newest: Desired | None, wanted: Desired) -> str | None:
        """Why a package of older data is not deployed. A champion is not compared: the ledger decides which one is newer."""
        desired = self._standing(run, newest) if self.name is None else None
        if desired is None or not is_newer(desired.window, wanted.window):
            return None
        return (
            f"version {desired.version} there was trained on newer data, until {(desired.window or {})['end']}, than "
            f"this package, until {(wanted.window or {})['end']}."
        )

    def _standing(self, run: RunInfo, newest: Desired | None) -> Desired | None:
        """The newest version that was not rejected."""
        standing = endpoints.not_rejected(run.store, self.endpoint, newest.sequence) if newest else 0
        return DesiredLog(run.store, self.endpoint).existing(standing) if standing else None

    def _refuse_other_inputs(self, run: RunInfo, newest: Desired | None, wanted: Desired) -> None:
        """Raise BadConfiguration where clients of the version in service could not ask the wanted one, or would misread it."""
        standing = self._standing(run, newest)
        if standing is None or standing.sha256 == wanted.sha256:
            return
        try:
            former = _card(run, standing.package)
        except LeptonError as error:
            log.warning("endpoint %s: what is in service cannot be read to compare: %s", self.endpoint, error)
            return
        if differences := _differences(former, _card(run, wanted.package)):
            raise BadConfiguration(
                f"version {wanted.version} has other {differences} than version {standing.version}, which endpoint "
                f"{self.endpoint!r} serves: its clients would be refused or misled. Give it an endpoint of its own, or pass "
                "allow_other_inputs=True."
            )

    # -- what the servers say --------------------------------------------------------------------------------------

    def _wait(self, run: RunInfo, desired: Desired) -> Status:
        """Wait until every living server serves this record or a later one; returns what one of them says."""
        log = DesiredLog(run.store, self.endpoint)
        deadline = time.monotonic() + self.timeout_s
        while True:
            statuses = endpoints.read_statuses(run.store, self.endpoint)
            living = [status for status in statuses if status.alive]
            for status in living:
                error = status.errors.get(str(desired.sequence))
                if error and error.get("sha256", desired.sha256) == desired.sha256:
                    raise _rejection(self.endpoint, status, error)
            if living and all(_serves(status, desired, log) for status in living):
                return min(living, key=lambda status: (status.serving or 0, status.server))
            if time.monotonic() > deadline:
                raise LeptonError(self._why_not_served(run, statuses, desired.sequence))
            run.check_stop()
            time.sleep(_POLL_S)

    def _why_not_served(self, run: RunInfo, statuses: Sequence[Status], sequence: int) -> str:
        """Why no server has served the record in time, and what to do, in a sentence."""
        start = f"python -m lepton_airflow serve {self.endpoint} --store {run.store.root}"
        within = f"within timeout_s={self.timeout_s:g}"
        if not statuses:
            return f"no server reported for endpoint {self.endpoint!r} {within}: start one with: {start}"
        latest = min(statuses, key=lambda status: abs(status.age_s))
        if not latest.alive:
            when = f"{latest.age_s:.0f} s old" if latest.age_s > 0 else f"{-latest.age_s:.0f} s in the future"
            return (
                f"no server of endpoint {self.endpoint!r} reports: the last heartbeat, of {latest.server}, is {when}. If it has "
                f"ended, start it again ({start}); else its log says why it cannot write to the store, or both clocks differ."
            )
        late = next((s for s in statuses if s.alive and (s.serving or 0) < sequence), latest)
        return (
            f"server {late.server} of endpoint {self.endpoint!r} does not serve version {sequence} of its records "
            f"{within}: {late.reason or 'it has not looked at the store since; see its log.'}"
        )

    # -- results ---------------------------------------------------------------------------------------------------

    def _unchanged(self, run: RunInfo, reason: str) -> Result:
        """The result when nothing was asked for; its values are about what is in service."""
        living = [s for s in endpoints.read_statuses(run.store, self.endpoint) if s.alive and s.serving]
        values = self._values(living[0] if living else None, deployed=False)
        return Result(summary=f"endpoint {self.endpoint!r} stays as it is: {reason}", values=values)

    def _values(self, status: Status | None, *, deployed: bool) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "deployed": deployed,
            "version": status and status.version,
            "sha256": status and status.sha256,
            "url": status and status.url,
        }


class _Wanted:
    """What a stage wants an endpoint to serve, as things are whenever it is asked."""

    def __init__(self, stage: DeployModel, run: RunInfo) -> None:
        self.stage = stage
        self.run = run
        self._golden: dict[str, tuple[Artifact, dict[str, str] | None]] = {}

    def look(self) -> tuple[Desired, Artifact]:
        """The record to append now, and its golden requests."""
        stage, run = self.stage, self.run
        move: LedgerEntry | None = None
        if stage.name is not None:
            move = _champion(run, stage.name)
            package, version = move.package, str(move.version)
        else:
            package = self._pinned(stage.model or "")
            version = (split_pin(package)[1] or "")[:12]
        if package not in self._golden:
            self._golden[package] = self._prepare(package)
        golden, window = self._golden[package]
        desired = Desired(
            endpoint=stage.endpoint,
            package=package,
            version=version,
            golden=golden.uri,
            max_difference=stage.max_difference,
            max_latency_ms=stage.max_latency_ms,
            max_memory_mb=stage.max_memory_mb,
            run_key=run.run_key,
            name=stage.name,
            ledger=move.sequence if move else None,
            window=window,
            identity=asdict(run.identity),
            decided=now(),
        )
        return desired, golden

    def _pinned(self, uri: str) -> str:
        """The pinned URI of a package in this store, which the servers read; a package from elsewhere is copied into it."""
        plain, sha256 = split_pin(uri)
        if not plain.startswith(self.run.store.root + "/"):
            return self.run.save("model", self.run.fetch(uri)).uri
        return pin(plain, sha256 or self.run.store.digest(plain))

    def _prepare(self, package: str) -> tuple[Artifact, dict[str, str] | None]:
        """The golden answers of a package, and its data window; taken from the cache where an equal run has computed them.

        The stage as a whole is never taken from the cache, as the endpoint may serve something else by now.
        """
        from lepton_airflow.store import cache

        run = self.run
        key = run.cache_key and digest_of([run.cache_key, split_pin(package)[1]])
        if key and not run.refresh:
            known, why = cache.lookup(run.store, "DeployModel", key)
            log.info("golden answers: cache %s", why)
            if known:
                return known.artifacts["golden"], known.values["window"]
        started = time.monotonic()
        golden, window = self._computed(package)
        if key:
            cache.record(
                run.store,
                Receipt(
                    stage="DeployModel",
                    run_key=run.run_key,
                    cache_key=key,
                    status="done",
                    summary=f"golden answers of {split_pin(package)[0]}",
                    artifacts={"golden": golden},
                    values={"window": window},
                    seconds=round(time.monotonic() - started, 3),
                    created=now(),
                ),
            )
        return golden, window

    def _computed(self, package: str) -> tuple[Artifact, dict[str, str] | None]:
        from lepton_airflow.data.features import feature_frame
        from lepton_airflow.packaging.package import ModelPackage

        model = ModelPackage.open(self.run.fetch(package))
        rows = feature_frame(self._rows(model), model.card.features)
        answers = model.predict(rows).reshape(len(rows), -1)
        golden = {
            "rows": [{k: _json_cell(v) for k, v in row.items()} for row in rows.to_dict("records")],
            "answers": [[_json_cell(value) for value in answer] for answer in answers.tolist()],
        }
        return self.run.save("golden.json", canonical_json(golden)), model.card.window

    def _rows(self, model: ModelPackage) -> pd.DataFrame:
        if self.stage.golden is not None:
            from lepton_airflow.evaluation.rows import check_columns

            path = self.run.fetch(self.stage.golden)
            of = f" (champion of {self.stage.name!r})" if self.stage.name else ""
            check_columns(model.card.features, path, f"golden: the model to deploy{of}")
            return _spread(path)
        profile = model.path / "profile.json"
        columns = json.loads(profile.read_bytes())["columns"] if profile.exists() else {}
        return _made_up(model.card, columns)


def _champion(run: RunInfo, name: str) -> LedgerEntry:
    check_model_name(name)
    champion = Ledger(run.store, name).newest()
    if champion is None:
        raise BadConfiguration(
            f"model {name!r} has no champion in {run.store.root}: run PromoteModel before, with the same name and store."
        )
    return champion


def _card(run: RunInfo, package: str) -> ModelCard:
    from lepton_airflow.packaging.card import ModelCard

    return ModelCard.from_json((run.fetch(run.store.here(package)) / "model.json").read_bytes())


def _differences(former: ModelCard, wanted: ModelCard) -> str:
    """What clients would notice of another model, in words; "" where they can go on."""
    found = []
    kinds = [{f.name: f.kind for f in card.features} for card in (former, wanted)]
    changed = sorted(name for name in {*kinds[0], *kinds[1]} if kinds[0].get(name) != kinds[1].get(name))
    if changed:
        found.append(f"inputs ({', '.join(map(repr, changed[:5]))}{', …' if len(changed) > 5 else ''})")
    if not set(former.outputs) <= set(wanted.outputs):
        found.append(f"outputs ({', '.join(wanted.outputs)})")
    if (former.task, former.classes) != (wanted.task, wanted.classes):
        found.append("classes" if former.task == wanted.task else "values")
    return " and ".join(found)


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


def _spread(path: Path) -> pd.DataFrame:
    """Rows of a Parquet file at equal distances."""
    import pandas as pd
    import pyarrow.parquet as pq

    parts = []
    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        if not rows:
            raise BadInput(f"golden: {path.name} has no rows; pass a split that has some.")
        wanted = sorted({number * rows // _GOLDEN_ROWS for number in range(_GOLDEN_ROWS)})
        start = 0
        for batch in file.iter_batches():
            here = [number - start for number in wanted if start <= number < start + len(batch)]
            parts.append(batch.take(here).to_pandas())
            start += len(batch)
    return pd.concat(parts, ignore_index=True)


def _made_up(card: ModelCard, columns: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of typical values, from the quantiles and the frequent categories of the profile, and a row of missing values."""
    import pandas as pd

    made = {}
    for shift, feature in enumerate(card.features):
        column = columns.get(feature.name, {})
        if feature.kind == "category":
            values: list[Any] = [value for value, _ in column.get("top", [])] or [""]
        else:
            values = column.get("quantiles") or [0.0, 1.0, -1.0]
        # Shifted, so that low values of one column meet high ones of another.
        cells = [values[(row + 3 * shift) % len(values)] for row in range(_GOLDEN_ROWS - 1)]
        made[feature.name] = [*cells, None]
    return pd.DataFrame(made)


def _json_cell(value: Any) -> Any:
    """A value as JSON can hold it: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
