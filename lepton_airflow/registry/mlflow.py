"""The model registry of MLflow: it shows what the store has decided, where people look for models.

Every call finds what an earlier one has made, or makes it, so it may be repeated: runs and versions carry the tags
``lepton.run_key`` and ``lepton.package``, which are set in the same request that creates them. Two callers must not be in
:meth:`MlflowRegistry.publish` for one model at the same time (see :mod:`lepton_airflow.store.lease`), as MLflow cannot tell
them apart. Needs ``mlflow-skinny``, and for a database as the tracking URI SQLAlchemy and alembic. The ``MLmodel`` file is
written here, because MLflow's own writer would load the model and needs numpy and onnx for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode
from urllib.request import urlopen

from lepton_airflow.connections import Connection
from lepton_airflow.errors import BadConfiguration, IntegrityError, LeptonError, require

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

    from lepton_airflow.packaging.card import ModelCard

log = logging.getLogger(__name__)

RUN_KEY, PACKAGE, SUPERSEDED = "lepton.run_key", "lepton.package", "lepton.superseded_by"
_ARTIFACT = "model"  # the package's folder among the artifacts of the run
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ADVICE = "Pass a server (http://…) or a database such as sqlite:////data/mlflow.db."


def resolve_tracking(tracking_uri: str | None, connection: Connection | None) -> str:
    """The tracking URI to use; raises BadConfiguration when none is given, or one that is MLflow's file store."""
    if connection is not None:
        if tracking_uri is not None:
            raise BadConfiguration(
                f"tracking_uri={tracking_uri!r} and mlflow={connection.id!r} are both set: pass one."
            )
        tracking_uri = connection_uri(connection)
    if not tracking_uri:
        raise BadConfiguration(
            "neither tracking_uri nor mlflow is set: pass tracking_uri='sqlite:////data/mlflow.db', or mlflow= the id of "
            "an Airflow Connection to a server. (MLFLOW_TRACKING_URI of Airflow's environment does not reach a stage.)"
        )
    scheme = tracking_uri.partition(":")[0].partition("+")[0].lower() if ":" in tracking_uri else ""
    if scheme in ("http", "https", *_DATABASES):
        return tracking_uri
    kind = (
        "MLflow's file store, which keeps no consistent registry"
        if scheme in ("", "file")
        else f"{scheme}://"
    )
    raise BadConfiguration(f"tracking_uri={tracking_uri!r} is {kind}, not a database or a server. {_ADVICE}")


def connection_uri(connection: Connection) -> str:
    """The URI of an MLflow server from an Airflow Connection (host, port, schema http or https)."""
    if not connection.host:
        raise BadConfiguration(
            f"Connection {connection.id!r} has no host: set it to the MLflow server, https://…."
        )
    host = connection.host.rstrip("/")
    if "://" not in host:
        host = f"{connection.schema or 'http'}://{host}"
    if connection.port and not re.search(r":\d+(/|$)", host.partition("://")[2]):
        scheme, _, rest = host.partition("://")
        netloc, slash, path = rest.partition("/")
        host = f"{scheme}://{netloc}:{connection.port}{slash}{path}"
    return host


@dataclass(frozen=True)
class VersionShown:
    """What an MLflow server shows now: a version's tags, the version that each alias means, and the version's page."""

    tags: dict[str, str]
    aliases: dict[str, int]
    link: str

    def agrees(self, *, tags: Mapping[str, str], aliases: Mapping[str, int | None]) -> bool:
        """Whether all these tags are shown, and each alias means its version, or none."""
        return all(self.tags.get(k) == v for k, v in tags.items()) and all(
            self.aliases.get(k) == v for k, v in aliases.items()
        )


def glance(
    tracking_uri: str | None,
    connection: Connection | None,
    name: str,
    version: int,
    mlflow_run_id: str | None = None,
) -> VersionShown | None:
    """What a server shows of a version, without importing MLflow, which costs two seconds of CPU.

    None when that cannot be told (a database, special credentials, no such version, no answer): then open the registry.

    :param mlflow_run_id: a run that must be there, too.
    """
    uri = resolve_tracking(tracking_uri, connection)
    special = connection is not None and (connection.login or connection.password or connection.extra)
    if not uri.startswith("http") or "@" in uri or special:
        return None
    try:
        found = _get(uri, "model-versions/get", name=name, version=str(version))["model_version"]
        aliases = _get(uri, "registered-models/get", name=name)["registered_model"].get("aliases", [])
        if mlflow_run_id is not None:
            run = _get(uri, "runs/get", run_id=mlflow_run_id)["run"]
            if run["info"]["lifecycle_stage"] != "active":
                return None
        return VersionShown(
            tags={tag["key"]: tag["value"] for tag in found.get("tags", [])},
            aliases={alias["alias"]: int(alias["version"]) for alias in aliases},
            link=version_link(uri, name, version) or "",
        )
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def _get(uri: str, call: str, **query: str) -> Any:
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/{call}?{urlencode(query)}"
    with urlopen(address, timeout=10) as reply:  # noqa: S310 - glance() takes http and https only
        return json.load(reply)


def version_link(uri: str, name: str, version: int) -> str | None:
    """The page of a version for a person; None when MLflow is a database without a server."""
    return (
        f"{_without_password(uri).rstrip('/')}/#/models/{quote(name)}/versions/{version}"
        if uri.startswith("http")
        else None
    )


@contextmanager
def open_registry(
    tracking_uri: str | None, connection: Connection | None, scratch: Path
) -> Iterator[MlflowRegistry]:
    """An MLflow registry, with the Connection's credentials in the environment for as long as it is open.

    Login and password become ``MLFLOW_TRACKING_USERNAME`` and ``_PASSWORD``, a password alone becomes
    ``MLFLOW_TRACKING_TOKEN``; entries of the extra named ``MLFLOW_…`` or ``AWS_…`` are taken as they are.
    """
    uri = resolve_tracking(tracking_uri, connection)
    require("mlflow-skinny", "the model registry", "register")
    if uri.partition(":")[0].partition("+")[0] in _DATABASES:
        for library in ("sqlalchemy", "alembic"):
            require(library, f"MLflow on {uri.partition(':')[0]}", "register")
    with _environment(_credentials(connection)):
        from mlflow import MlflowClient

        # Making a database takes fifty migrations, each of which would log a line.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with _errors_of_mlflow(f"opening {_without_password(uri)}"), _first_use_of_sqlite(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            # The first calls make or migrate the tables of tracking and of the registry: here, under the lock.
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        yield MlflowRegistry(client, uri, scratch)


@dataclass(frozen=True)
class MlflowRegistry:
    """An open MLflow registry."""

    client: MlflowClient
    uri: str
    scratch: Path

    def publish(
        self,
        name: str,
        package: Path,
        card: ModelCard,
        *,
        run_key: str,
        sha256: str,
        experiment: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        description: str,
        taken: Callable[[int], bool],
        check: Callable[[], None] = lambda: None,
    ) -> tuple[int, str]:
        """Log a package as a run's artifact and make it a version; returns the version and the id of the run.

        Finds what an earlier call for the same run key and digest has left and goes on from there. ``taken`` tells whether
        another package has a number already: in a model that was deleted, MLflow begins again with 1. ``check`` is called
        before each write that must not be made twice, and raises when another process has taken them over.
        """
        mark = {RUN_KEY: run_key, PACKAGE: sha256}
        with _errors_of_mlflow(f"registering {name!r} in {_without_password(self.uri)}"):
            experiment_id = self._experiment(experiment)
            left = [v for v in self._versions(name, run_key, sha256) if self._has_run(v.run_id)]
            run = self._run(experiment_id, f"{name} {run_key}", mark | dict(tags), check)
            self.log(run.info.run_id, metrics, card)
            found = next((v for v in left if not taken(int(v.version))), None)
            if found is None:
                self._upload(run, package, card)
                self._model(name)
            while found is None:
                check()
                made = self._create(name, run, mark | dict(tags), description)
                if taken(int(made.version)):
                    self.client.delete_model_version(name, made.version)
                else:
                    found = made
            if run.info.status != "FINISHED":
                self.client.set_terminated(run.info.run_id)
            return int(found.version), str(found.run_id)

    def log(self, mlflow_run_id: str, metrics: Mapping[str, float], card: ModelCard) -> None:
        """Set a run's metrics and parameters; those it has already are not written again."""
        from mlflow.entities import Metric, Param

        with _errors_of_mlflow(f"logging metrics and parameters of run {mlflow_run_id}"):
            run = self.client.get_run(mlflow_run_id)
            params = {k: str(v)[:500] for k, v in card.hyperparameters.items()}
            params |= {"trainer": card.trainer, "seed": str(card.seed)}
            self.client.log_batch(
                mlflow_run_id,
                metrics=[
                    Metric(k, float(v), run.info.start_time, 0)
                    for k, v in metrics.items()
                    if run.data.metrics.get(k) != v
                ],
                params=[Param(k, v) for k, v in params.items() if k not in run.data.params],
            )

    def annotate(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        """Set the tags of a version that are absent or differ; a version that was deleted in MLflow is skipped."""
        with (
            _errors_of_mlflow(f"tagging version {version} of {name!r}"),
            _if_exists(f"version {version} of {name!r}"),
        ):
            present = self.client.get_model_version(name, str(version)).tags
            for key, value in tags.items():
                if present.get(key) != value:
                    self.client.set_model_version_tag(name, str(version), key, value)

    def has(self, name: str, version: int, run_key: str, sha256: str) -> bool:
        """Whether MLflow still has the version of a registration, made for the same run key and package, and its run.

        A run that was deleted is restored, since the version's files are its artifacts, and ``mlflow gc`` would remove them.
        """
        with _errors_of_mlflow(f"looking for version {version} of {name!r}"):
            found = [v for v in self._versions(name, run_key, sha256) if int(v.version) == version]
            return any(self._has_run(v.run_id) for v in found)

    def drop_doubles(self, name: str, run_key: str, sha256: str, keep: int) -> None:
        """Delete the versions of a run key and digest, except for the one that the store's record names."""
        with _errors_of_mlflow(f"looking for doubles of version {keep} of {name!r}"):
            for version in self._versions(name, run_key, sha256):
                if int(version.version) != keep:
                    self.client.delete_model_version(name, version.version)

    def point(self, name: str, aliases: Mapping[str, int | None], package_of: Callable[[int], str]) -> None:
        """Set each alias to its version, or remove it; what is set already is not written again.

        An alias is also removed, with a warning, when its version was deleted in MLflow: the store decides which version an
        alias means, and MLflow cannot show one that is gone.

        :param package_of: the digest of a version's package, which tells it from another one of that number.
        """
        with _errors_of_mlflow(f"setting aliases of {name!r}"), _if_exists(f"model {name!r}"):
            present = {k: int(v) for k, v in self.client.get_registered_model(name).aliases.items()}
            for alias, version in aliases.items():
                if version is not None and present.get(alias) == version:
                    continue
                if version is not None and self._holds(name, version, package_of(version)):
                    self.client.set_registered_model_alias(name, alias, str(version))
                    continue
                if version is not None:
                    _warn_of_missing(f"version {version} of {name!r}, which should have the alias {alias!r},")
                if alias in present:
                    self.client.delete_registered_model_alias(name, alias)

    def link(self, name: str, version: int) -> str | None:
        """The page of a version for a person; None when MLflow is a database without a server."""
        return version_link(self.uri, name, version)

    # -- find or create ------------------------------------------------------------------------------------------------

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self.client.create_experiment(name, artifact_location=_artifact_location(self.uri))
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise BadConfiguration(
                f"experiment {name!r} was deleted in MLflow: restore it or name another one."
            )
        return str(found.experiment_id)

    def _run(self, experiment_id: str, title: str, tags: Mapping[str, str], check: Callable[[], None]) -> Run:
        wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (RUN_KEY, PACKAGE))
        found = self.client.search_runs(
            [experiment_id], wanted, order_by=["attributes.start_time ASC"], max_results=1
        )
        if found:
            return found[0]
        check()
        return self.client.create_run(experiment_id, run_name=title, tags=dict(tags))

    def _model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _create(self, name: str, run: Run, tags: Mapping[str, str], description: str) -> ModelVersion:
        return self.client.create_model_version(
            name,
            source=f"{run.info.artifact_uri.rstrip('/')}/{_ARTIFACT}",
            run_id=run.info.run_id,
            tags=dict(tags),
            description=description,
            await_creation_for=0,  # both databases and servers answer only when it exists
        )

    def _has_run(self, run_id: str) -> bool:
        """Whether a run is there; one that was deleted alone, without its experiment, is restored."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if info.lifecycle_stage != "active":
            if self.client.get_experiment(info.experiment_id).lifecycle_stage != "active":
                return False
            self.client.restore_run(run_id)
            log.warning(
                "run %s was deleted in MLflow and is restored, as a version has its files there", run_id
            )
        return True

    def _holds(self, name: str, version: int, sha256: str) -> bool:
        """Whether a version is there and was made of this package."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_model_version(name, str(version)).tags.get(PACKAGE) == sha256)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _versions(self, name: str, run_key: str, sha256: str) -> list[ModelVersion]:
        wanted = f"tags.`{RUN_KEY}` = '{run_key}' and tags.`{PACKAGE}` = '{sha256}'"
        found = [v for v in self.client.search_model_versions(wanted) if v.name == name]
        return sorted(found, key=lambda v: int(v.version))

    def _upload(self, run: Run, package: Path, card: ModelCard) -> None:
        """Upload the package with an MLmodel beside its files, then read every file back and compare it."""
        staged = self.scratch / f"mlflow-{run.info.run_id}"
        shutil.copytree(package, staged, dirs_exist_ok=True)
        (staged / "MLmodel").write_text(mlmodel(card, run.info.run_id), encoding="utf-8")
        (staged / "requirements.txt").write_text(_requirements(card), encoding="utf-8")
        self.client.log_artifacts(run.info.run_id, str(staged), _ARTIFACT)
        back = self.scratch / f"mlflow-{run.info.run_id}-back"
        back.mkdir(parents=True, exist_ok=True)
        landed = Path(self.client.download_artifacts(run.info.run_id, _ARTIFACT, str(back)))
        for file in sorted(p for p in staged.rglob("*") if p.is_file()):
            copy = landed / file.relative_to(staged)
            if not copy.is_file() or _sha256(copy) != _sha256(file):
                raise IntegrityError(
                    f"{file.relative_to(staged)} of run {run.info.run_id} is not in MLflow's artifact store as it was "
                    "uploaded: check that store, then clear this task."
                )
        shutil.rmtree(staged)
        shutil.rmtree(back)


def mlmodel(card: ModelCard, mlflow_run_id: str) -> str:
    """The ``MLmodel`` file of a package: ONNX and pyfunc flavors and the signature. (JSON is YAML.)"""
    import platform

    def tensor(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
        return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}, "name": name}

    inputs = [tensor(f.input, "str" if f.kind == "category" else "float32", [-1, 1]) for f in card.features]
    shapes = {"probabilities": [-1, len(card.classes)], "prediction": [-1, 1]}
    outputs = [tensor(name, "float32", shapes[name]) for name in card.outputs if name in shapes]
    data = "model.onnx"
    return json.dumps(
        {
            "artifact_path": _ARTIFACT,
            "run_id": mlflow_run_id,
            "flavors": {
                "onnx": {
                    "data": data,
                    "onnx_version": card.versions.get("onnx", ""),
                    "providers": ["CPUExecutionProvider"],
                },
                "python_function": {
                    "loader_module": "mlflow.onnx",
                    "data": data,
                    "env": {"virtualenv": "python_env.yaml"},
                    "python_version": platform.python_version(),
                },
            },
            "signature": {"inputs": json.dumps(inputs), "outputs": json.dumps(outputs), "params": None},
        },
        indent=1,
        ensure_ascii=False,
    )


def _requirements(card: ModelCard) -> str:
    return "".join(
        f"{name}=={card.versions[name]}\n" for name in ("onnx", "onnxruntime") if name in card.versions
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _artifact_location(uri: str) -> str | None:
    """Beside an sqlite database. MLflow's default is the working directory of the process that happens to be first."""
    path = _sqlite_path(uri)
    return (path.parent / "mlartifacts").as_uri() if path else None


def _sqlite_path(uri: str) -> Path | None:
    match = re.match(r"^sqlite(?:\+\w+)?:///(?P<path>[^?]+)", uri)
    return Path(match["path"]).absolute() if match else None


@contextmanager
def _first_use_of_sqlite(uri: str) -> Iterator[None]:
    """Let one process at a time create or migrate the database; the kernel releases the lock of a process that is killed."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _credentials(connection: Connection | None) -> dict[str, str]:
    # By default MLflow makes seven retries with doubling pauses, which hold a worker for minutes. Airflow retries the task.
    found = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    found = {key: value for key, value in found.items() if key not in os.environ}
    if connection is None:
        return found
    if connection.login and connection.password:
        found |= {
            "MLFLOW_TRACKING_USERNAME": connection.login,
            "MLFLOW_TRACKING_PASSWORD": connection.password,
        }
    elif connection.password:
        found["MLFLOW_TRACKING_TOKEN"] = connection.password
    return found | {k: str(v) for k, v in connection.extra.items() if k.startswith(("MLFLOW_", "AWS_"))}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _if_exists(what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _warn_of_missing(what)


def _warn_of_missing(what: str) -> None:
    log.warning("%s is not in MLflow any more; clear the task that registered it to get it back", what)


_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_PARAMETER_VALUE")


@contextmanager
def _errors_of_mlflow(doing: str) -> Iterator[None]:
    """Turn an error of MLflow into one that says what was being done, and whether a retry may help."""
    try:
        yield
    except LeptonError:
        raise
    except (
        Exception
    ) as error:  # also those of requests, SQLAlchemy, boto3 and others, which MLflow lets through
        reason = _without_password(str(error).strip().partition("\n")[0][:400]) or type(error).__name__
        if getattr(error, "error_code", None) in _REFUSALS or re.search(r"error code 40[13]\b", reason):
            raise BadConfiguration(f"MLflow refused {doing}: {reason}") from error
        raise LeptonError(
            f"MLflow failed at {doing}: {reason}. What was done is kept; a retry goes on from there."
        ) from error


def _without_password(text: str) -> str:
    """A URI, or a text with URIs in it, without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)
