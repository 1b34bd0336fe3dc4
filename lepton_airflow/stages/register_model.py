"""Make a trained model a version in MLflow, exactly once."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.connections import Connection
from lepton_airflow.contract import pin, split_pin
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.registry.ledger import (
    Registration,
    Registrations,
    as_window,
    check_alias,
    check_model_name,
    find_version,
)
from lepton_airflow.registry.mlflow import (
    PACKAGE,
    RUN_KEY,
    SUPERSEDED,
    MlflowRegistry,
    glance,
    open_registry,
)
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ArtifactUri, ConnectionId, Result, RunInfo, Stage
from lepton_airflow.store.files import now
from lepton_airflow.store.lease import Lease, lease

if TYPE_CHECKING:
    from lepton_airflow.packaging.card import ModelCard

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RegisterModel(Stage):
    """Register a model package as a version in MLflow, once per task instance however often it is called.

    The package is logged as the artifact of an MLflow run (with ``MLmodel``, signature, metrics and hyperparameters)
    and then becomes a version, with its window, digests and origin as tags. A record in the store decides which version
    a task instance has; MLflow shows it, and a retry completes what a crash left undone. When a task is cleared and its
    package has another digest now, the package gets a new version, and the old version the tag ``lepton.superseded_by``. What a
    person has deleted in MLflow is there again once its task is cleared: a run is restored, a version registered again.

    Returns the values ``name``, ``version`` (a number) and ``model_uri`` (``models:/name/version``).

    :param model: the model package, ``train.output["model"]``.
    :param name: name of the registered model.
    :param metrics: numbers to keep with the version, ``evaluate.output["metrics"]`` or any flat dict.
    :param tracking_uri: MLflow as a database, ``sqlite:////data/mlflow.db``, or as a server, ``http://host:5000``.
    :param mlflow: id of an Airflow Connection to an MLflow server; use it instead of ``tracking_uri`` with credentials.
    :param experiment: MLflow experiment that gets the run; None: the name of the model.
    :param alias: alias for this version, unless a version of newer data has it; None: no alias.
    :param tags: more tags for run and version.
    :param description: text shown with the version.
    :param on_backfill: in a backfill, ``skip`` registers nothing; ``register_only`` and ``full`` register as always.
    :raises IntegrityError: the package does not have the digest that it is pinned to.
    :raises BadConfiguration: no tracking URI, MLflow's file store, a name MLflow cannot take, or refused credentials.
    """

    cacheable: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("mlflow-skinny",)
    extra: ClassVar[str] = "register"
    links: ClassVar[tuple[str, ...]] = ("mlflow",)
    outputs: ClassVar[tuple[str, ...]] = ("name", "version", "model_uri")

    model: ArtifactUri
    name: str
    metrics: dict[str, Any] | None = None
    tracking_uri: str | None = None
    mlflow: ConnectionId | None = None
    experiment: str | None = None
    alias: str | None = "candidate"
    tags: dict[str, str] = field(default_factory=dict)
    description: str = ""
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"

    def run(self, run: RunInfo) -> Result:
        from lepton_airflow.packaging.package import ModelPackage

        check_model_name(self.name)
        if self.alias in ("champion", "previous"):
            raise BadConfiguration(
                f"alias={self.alias!r} is moved by PromoteModel and RollbackModel alone: pass another one."
            )
        if self.alias is not None:
            check_alias(self.alias)
        metrics = _numbers(self.metrics)
        # `register_only` means that a backfill does register, so only `skip` makes a difference here.
        backfill.may_act(run, self.on_backfill, f"model {self.name!r} is not registered")
        path = run.fetch(self.model)
        package = ModelPackage.open(path)
        pinned = self.model if split_pin(self.model)[1] else pin(self.model, run.store.digest(self.model))
        connection = run.connection(self.mlflow) if self.mlflow else None
        done = self._already_shown(run, connection, split_pin(pinned)[1] or "", package.card, metrics)
        if done:
            (registration, link), made = done, False
        else:
            with open_registry(self.tracking_uri, connection, run.workdir) as mlflow:
                with lease(run.store, f"register/{self.name}", run.check_stop) as held:
                    registration, made = self._register(
                        run, mlflow, held, path, package.card, pinned, metrics
                    )
                    mlflow.point(
                        self.name,
                        _aliases(run, self.name),
                        lambda version: find_version(run.store, self.name, version).sha256,
                    )
                link = mlflow.link(self.name, registration.version)
        verb = "registered as" if made else "was registered by this task before as"
        return Result(
            summary=f"{self.name} {verb} version {registration.version} (package {registration.sha256[:12]}).",
            values={
                "name": self.name,
                "version": registration.version,
                "model_uri": f"models:/{self.name}/{registration.version}",
            },
            metrics=dict(metrics),
            links={"mlflow": link} if link else {},
        )

    def _already_shown(
        self,
        run: RunInfo,
        connection: Connection | None,
        sha256: str,
        card: ModelCard,
        metrics: dict[str, float],
    ) -> tuple[Registration, str | None] | None:
        """The registration of this run key and its page, when there is nothing left to do, in the store or in MLflow."""
        before = Registrations(run.store, self.name).of_run(run.run_key)
        if before is None or before.sha256 != sha256:
            return None
        shown = glance(self.tracking_uri, connection, self.name, before.version, before.mlflow_run_id)
        tags = self._tags(run, card, metrics) | {RUN_KEY: run.run_key, PACKAGE: sha256}
        if shown and shown.agrees(tags=tags, aliases=_aliases(run, self.name)):
            return before, shown.link
        return None

    def _register(
        self,
        run: RunInfo,
        mlflow: MlflowRegistry,
        held: Lease,
        path: Path,
        card: ModelCard,
        pinned: str,
        metrics: dict[str, float],
    ) -> tuple[Registration, bool]:
        """The registration of this run key, and whether it is new."""
        sha256 = split_pin(pinned)[1] or ""
        tags = self._tags(run, card, metrics)
        records = Registrations(run.store, self.name)
        # The newest is read before the one of this run key: if somebody registers in between, ours is not appended.
        newest = records.newest()
        before = records.of_run(run.run_key)
        if before and before.sha256 == sha256 and mlflow.has(self.name, before.version, run.run_key, sha256):
            mlflow.log(before.mlflow_run_id, metrics, card)
            mlflow.annotate(self.name, before.version, tags)
            mlflow.drop_doubles(self.name, run.run_key, sha256, keep=before.version)
            return before, False
        version, mlflow_run_id = mlflow.publish(
            self.name,
            path,
            card,
            run_key=run.run_key,
            sha256=sha256,
            experiment=self.experiment or self.name,
            metrics=metrics,
            tags=tags,
            description=self.description,
            taken=lambda version: any(
                (r.run_key, r.sha256) != (run.run_key, sha256) for r in records.find("version", version)
            ),
            check=held.check,
        )
        wanted = Registration(
            name=self.name,
            version=version,
            package=pinned,
            run_key=run.run_key,
            mlflow_run_id=mlflow_run_id,
            alias=self.alias,
            window=card.window or as_window(run.window),
            supersedes=before.version if before else None,
            identity=asdict(run.identity),
            created=now(),
        )
        registration = records.append_after(newest, wanted)
        if registration is None:
            # This process stood still until its lease expired, and another one has registered. If that was for the same run
            # key, its record counts, and the version made here is deleted as a double.
            return self._register(run, mlflow, held, path, card, pinned, metrics)
        if before and before.sha256 != sha256:
            log.warning("version %s supersedes %s: the package changed since", version, before.version)
            mlflow.annotate(self.name, before.version, {SUPERSEDED: str(version)})
        elif before:
            log.warning(
                "version %s takes the place of %s, which was deleted in MLflow", version, before.version
            )
            mlflow.drop_doubles(self.name, run.run_key, sha256, keep=version)
        return registration, True

    def _tags(self, run: RunInfo, card: ModelCard, metrics: Mapping[str, float]) -> dict[str, str]:
        identity = run.identity
        window = card.window or as_window(run.window)
        tags = {
            "lepton.dag_id": identity.dag_id,
            "lepton.task_id": identity.task_id,
            "lepton.run_id": identity.run_id,
            "lepton.run_type": identity.run_type,
            "lepton.task": card.task,
            "lepton.target": card.target,
            "lepton.positive_class": ""
            if card.schema.positive_class is None
            else str(card.schema.positive_class),
            "lepton.trainer": card.trainer,
            "lepton.code": card.code,
            "lepton.window": f"{window['start']} to {window['end']}" if window else "",
        }
        tags |= {f"lepton.data.{role}": digest for role, digest in card.data.items()}
        # The bounds of intervals stand with the MLflow run. As tags they would crowd the table of versions.
        point = {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))}
        tags |= {f"metric.{name}": f"{value:.6g}" for name, value in point.items()}
        return {k: str(v) for k, v in (tags | self.tags).items() if v != ""}


def _aliases(run: RunInfo, name: str) -> dict[str, int]:
    """The version that each alias means now."""
    newest = Registrations(run.store, name).newest()
    return newest.alias_versions if newest else {}


def _numbers(metrics: dict[str, Any] | None) -> dict[str, float]:
    """The metrics that have a value; raises BadConfiguration for one that is no number."""
    found = {}
    for name, value in (metrics or {}).items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadConfiguration(
                f"metrics[{name!r}]={value!r} is not a number: pass a flat dict such as {{'roc_auc': 0.71}}."
            )
        if math.isfinite(value):
            found[name] = float(value)
    return found
