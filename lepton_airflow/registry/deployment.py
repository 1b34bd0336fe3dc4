"""Ask an endpoint for the champion of a model, or for one package, with the golden requests that its servers must answer."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lepton_airflow.contract import Artifact, Receipt, canonical_json, digest_of, pin, split_pin
from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Desired, DesiredLog
from lepton_airflow.errors import BadConfiguration, LeptonError
from lepton_airflow.registry.ledger import Ledger, LedgerEntry, check_model_name, is_newer
from lepton_airflow.sdk.stage import RunInfo
from lepton_airflow.store.files import now

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.packaging.card import ModelCard
    from lepton_airflow.packaging.package import ModelPackage

log = logging.getLogger(__name__)

GOLDEN_ROWS = 32


@dataclass(kw_only=True)
class Deployment:
    """What a stage wants an endpoint to serve, as things are whenever it is asked.

    :ivar name: a registered model, whose champion is meant; else ``model`` is the package.
    :ivar rows: reads the rows of the golden requests for a package; None: made from the profile that the package holds.
    """

    run: RunInfo
    endpoint: str
    name: str | None = None
    model: str | None = None
    rows: Callable[[ModelPackage], pd.DataFrame] | None = None
    max_difference: float
    max_latency_ms: float
    max_memory_mb: float
    allow_other_inputs: bool = False
    _golden: dict[str, tuple[Artifact, dict[str, str] | None]] = field(default_factory=dict)

    def ask(self) -> tuple[Desired, Artifact] | str:
        """The record that asks for it, appended unless there is one, and its golden requests; or why the endpoint stays."""
        records = DesiredLog(self.run.store, self.endpoint)
        while True:
            self.run.check_stop()
            newest = records.newest()
            # Read the ledger after the endpoint's records: then this request is never older than the newest record.
            desired, golden = self._look()
            newer = self._newer(newest, desired)
            if newer:
                return newer
            if not self.allow_other_inputs:
                self.refuse_other_inputs(desired)
            asked = self._asked_before(newest, desired) or records.append_after(newest, desired)
            if asked:
                log.info(
                    "endpoint %s: version %s is asked for by record %d",
                    self.endpoint, asked.version, asked.sequence,
                )  # fmt: skip
                return asked, golden
            log.info("endpoint %s: another task asked for a version meanwhile, looking again", self.endpoint)

    def _asked_before(self, newest: Desired | None, wanted: Desired) -> Desired | None:
        """The record that asks for the same already, this task's own or the newest one, unless it was rejected."""
        if newest is None:
            return None
        records = DesiredLog(self.run.store, self.endpoint)
        mine = [d for d in records.find("run_key", self.run.run_key) if d.sequence < newest.sequence]
        for desired in (newest, *reversed(mine)):
            if wanted.asks_as(desired):
                verdict = endpoints.read_verdict(self.run.store, self.endpoint, desired.sequence)
                if verdict and verdict.error:
                    return None
                # A server that could not load an accepted version, as its bytes were damaged, tries at once for a new record only.
                statuses = endpoints.read_statuses(self.run.store, self.endpoint)
                failed = any(
                    s.alive
                    and (error := s.errors.get(str(desired.sequence)))
                    and error.get("sha256", desired.sha256) == desired.sha256
                    for s in statuses
                )
                return None if failed else desired
        return None

    def _newer(self, newest: Desired | None, wanted: Desired) -> str | None:
        """Why a package of older data is not deployed. A champion is not compared: the ledger decides which one is newer."""
        desired = self._standing(newest) if self.name is None else None
        if desired is None or not is_newer(desired.window, wanted.window):
            return None
        return (
            f"version {desired.version} there was trained on newer data, until {(desired.window or {})['end']}, than "
            f"this package, until {(wanted.window or {})['end']}."
        )

    def _standing(self, newest: Desired | None) -> Desired | None:
        """The newest version that was not rejected."""
        standing = endpoints.not_rejected(self.run.store, self.endpoint, newest.sequence) if newest else 0
        return DesiredLog(self.run.store, self.endpoint).existing(standing) if standing else None

    def refuse_other_inputs(self, wanted: Desired | LedgerEntry) -> None:
        """Raise BadConfiguration where clients of the version in service could not ask the wanted one, or would misread it."""
        try:
            standing = self._standing(DesiredLog(self.run.store, self.endpoint).newest())
            if standing is None or standing.sha256 == wanted.sha256:
                return
            former = _card(self.run, standing.package)
        except (LeptonError, OSError) as error:
            log.warning("endpoint %s: what is in service cannot be read to compare: %s", self.endpoint, error)
            return
        if differences := _differences(former, _card(self.run, wanted.package)):
            raise BadConfiguration(
                f"version {wanted.version} has other {differences} than version {standing.version}, which endpoint "
                f"{self.endpoint!r} serves: its clients would be refused or misled. Give it an endpoint of its own, or pass "
                "allow_other_inputs=True."
            )

    def _look(self) -> tuple[Desired, Artifact]:
        """The record to append now, and its golden requests."""
        run = self.run
        move: LedgerEntry | None = None
        if self.name is not None:
            move = _champion(run, self.name)
            package, version = move.package, str(move.version)
        else:
            package = self._pinned(self.model or "")
            version = (split_pin(package)[1] or "")[:12]
        if package not in self._golden:
            self._golden[package] = self._prepare(package)
        golden, window = self._golden[package]
        desired = Desired(
            endpoint=self.endpoint,
            package=package,
            version=version,
            golden=golden.uri,
            max_difference=self.max_difference,
            max_latency_ms=self.max_latency_ms,
            max_memory_mb=self.max_memory_mb,
            run_key=run.run_key,
            name=self.name,
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
        rows = feature_frame((self.rows or _made_up)(model), model.card.features)
        answers = model.predict(rows).reshape(len(rows), -1)
        golden = {
            "rows": [{k: _json_cell(v) for k, v in row.items()} for row in rows.to_dict("records")],
            "answers": [[_json_cell(value) for value in answer] for answer in answers.tolist()],
        }
        return self.run.save("golden.json", canonical_json(golden)), model.card.window


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


def _made_up(model: ModelPackage) -> pd.DataFrame:
    """Rows of typical values, from the quantiles and the frequent categories of the profile, and a row of missing values."""
    import pandas as pd

    profile = model.path / "profile.json"
    columns = json.loads(profile.read_bytes())["columns"] if profile.exists() else {}
    made = {}
    for shift, feature in enumerate(model.card.features):
        column = columns.get(feature.name, {})
        if feature.kind == "category":
            values: list[Any] = [value for value, _ in column.get("top", [])] or [""]
        else:
            values = column.get("quantiles") or [0.0, 1.0, -1.0]
        # Shifted, so that low values of one column meet high ones of another.
        cells = [values[(row + 3 * shift) % len(values)] for row in range(GOLDEN_ROWS - 1)]
        made[feature.name] = [*cells, None]
    return pd.DataFrame(made)


def _json_cell(value: Any) -> Any:
    """A value as JSON can hold it: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
