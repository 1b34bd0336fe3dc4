"""Keep the study of a search in a file of the store or in a database, so that the next try of a killed run goes on with it."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.connections import Connection
from lepton_airflow.errors import BadConfiguration, StoreError

if TYPE_CHECKING:
    import optuna

    from lepton_airflow.sdk.stage import RunInfo
    from lepton_airflow.store.checkpoints import Checkpoints

log = logging.getLogger(__name__)

_STARTUP_TRIALS = 5  # trials before the pruner compares; a median of fewer says little
_DRIVERS = {"postgres": "postgresql+psycopg2", "postgresql": "postgresql+psycopg2", "mysql": "mysql+mysqldb"}


def finished(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: it is complete, was pruned, or has failed for a reason of its own."""
    return trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs


def open_study(url: str, name: str, *, maximize: bool, prune: bool, anew: bool, most: int) -> optuna.Study:
    """Open the study of that name in the storage at ``url``, or create it.

    :param prune: end trials that are worse than the median of earlier ones.
    :param anew: replace a finished study by a new one.
    :param most: replace a study of more finished trials by a new one: what is asked for is what fewer find.
    :raises StoreError: the database does not answer.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    shown = url.partition("@")[2] or url  # what follows the password, if there is one
    pruners = optuna.pruners
    arguments: dict[str, Any] = {
        "study_name": name,
        "direction": "maximize" if maximize else "minimize",
        "pruner": pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS) if prune else pruners.NopPruner(),
        "load_if_exists": True,
    }
    try:
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        study = optuna.create_study(storage=storage, **arguments)
        if anew and study.user_attrs.get("finished"):
            log.info("a new result was asked for: the finished study %s is made anew", name)
        elif (done := sum(map(finished, study.get_trials(deepcopy=False)))) > most:
            log.info(
                "study %s has %d finished trials, and %d are asked for: it is made anew", name, done, most
            )
        else:
            return study
        optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(storage=storage, **arguments)
    except SQLAlchemyError as error:
        raise StoreError(
            f"the study's storage {shown} cannot be used: {str(error.__cause__ or error).splitlines()[0]}. Check that "
            "the database is reachable and may be written to."
        ) from error
    except (ImportError, ValueError) as error:
        raise BadConfiguration(
            f"storage {shown}: {error}. Expected a URL such as postgresql+psycopg2://user@host/database."
        ) from error
    return study


@dataclass
class StudyFile:
    """The study as a file in the store. If the store is no local directory, a copy is uploaded after every trial.

    Only the process of the search writes the file.

    :ivar copies: where the copies go; None: the file itself is in the store.
    """

    path: Path
    copies: Checkpoints | None = None

    @classmethod
    @contextmanager
    def of(cls, run: RunInfo, name: str) -> Iterator[StudyFile]:
        """Open the file of the study of that name, as the last try left it."""
        if run.store.root.startswith("file://"):
            folder = Path(run.store.root.removeprefix("file://")) / "studies"
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"{folder} cannot be made: {error.strerror}; check that the store is writable."
                ) from error
            yield cls(folder / f"{name}.db")
            return
        from lepton_airflow.store.checkpoints import Checkpoints

        scratch = run.workdir / "study"
        copies = Checkpoints(run.store, f"checkpoints/{run.run_key}/{name}", scratch, 0.0)
        try:
            scratch.mkdir(exist_ok=True)
            file = cls(run.workdir / "study.db", copies)
            # Another run may have left one here; only the copy in the store counts.
            file.path.unlink(missing_ok=True)
            if found := copies.latest():
                shutil.copyfile(found.path / "study.db", file.path)
            yield file
        finally:
            copies.close()

    @property
    def url(self) -> str:
        """The URL for Optuna."""
        from sqlalchemy.engine import URL

        return URL.create("sqlite", database=str(self.path)).render_as_string()  # a path may need quoting

    def keep(self, done: int) -> bool:
        """Bring the study to the store as it is now; returns whether it is there.

        A failure is only warned of, since the copy after the next trial holds all that this one would.
        """
        return self.copies is None or self.copies.save(done, self._write, {}, wait=True)

    def _write(self, folder: Path) -> None:
        with (
            closing(sqlite3.connect(self.path)) as study,
            closing(sqlite3.connect(folder / "study.db")) as copy,
        ):
            study.backup(copy)


def checked_url(storage: str) -> str:
    """Check a database URL that a user wrote; raises BadConfiguration if it is none, or holds a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
        url.get_dialect()
    except ArgumentError:
        raise BadConfiguration(
            f"storage={storage!r} is no database URL; expected one such as "
            "postgresql+psycopg2://user@host/database or sqlite:////absolute/path.db."
        ) from None
    if url.password:
        raise BadConfiguration(
            "storage holds a password, which would be kept in the DAG and the receipt: make an Airflow Connection "
            "of it and name that in storage_connection."
        )
    return storage


def connection_url(connection: Connection) -> str:
    """SQLAlchemy's URL of an Airflow Connection to a database."""
    from sqlalchemy.engine import URL

    if connection.type == "sqlite":
        return f"sqlite:///{connection.host or connection.schema}"
    if connection.type not in _DRIVERS:
        raise BadConfiguration(
            f"Connection {connection.id!r} is of type {connection.type!r}, which holds no study; expected one of "
            f"{', '.join(_DRIVERS)}, sqlite."
        )
    url = URL.create(
        _DRIVERS[connection.type],
        username=connection.login,
        password=connection.password,
        host=connection.host,
        port=connection.port,
        database=connection.schema,
    )
    return url.render_as_string(hide_password=False)
