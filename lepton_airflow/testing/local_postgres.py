"""A PostgreSQL server on this machine, for tests, demos and benchmarks: the kind of database that Airflow has in production."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

from lepton_airflow.errors import LeptonError
from lepton_airflow.testing.processes import free_port


class Address(TypedDict):
    """Where a PostgreSQL server is reached, as psycopg2's arguments."""

    host: str
    port: int
    user: str
    password: str
    dbname: str


class LocalPostgres:
    """A PostgreSQL server on a free loopback port: made by ``with``, and removed with all its data after it.

    Not durable: it does not wait for the disk.

    :ivar address: of its first database, which is empty.
    """

    def __init__(self) -> None:
        found = pg_ctl()
        if found is None:
            raise LeptonError("PostgreSQL is not installed here: apt-get install postgresql")
        self._pg_ctl = found
        self.address = Address(
            host="127.0.0.1",
            port=free_port(),
            user="lepton",
            password=secrets.token_hex(8),
            dbname="postgres",
        )

    def __enter__(self) -> Self:
        # Not in pytest's temporary folder, which only its user may enter: the server runs as another one.
        self._home = Path(tempfile.mkdtemp(prefix="postgres-"))
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root; the package brings the user postgres
            shutil.chown(self._home, "postgres", "postgres")
        password = self._home / "password"
        password.write_text(self.address["password"])
        try:
            self._call(
                *(self._pg_ctl.with_name("initdb"), "-D", self._data, "-U", self.address["user"]),
                *("--pwfile", password, "--auth", "scram-sha-256"),
                *("--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"),
            )
            options = (
                f"-c listen_addresses=127.0.0.1 -c port={self.address['port']} -c fsync=off -k {self._home}"
            )
            self._call(self._pg_ctl, "start", "-w", "-D", self._data, "-l", self._home / "log", "-o", options)
        except LeptonError:
            shutil.rmtree(self._home, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:  # by the pid that its data folder records
            self._call(self._pg_ctl, "stop", "-w", "-m", "immediate", "-D", self._data)
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    def new_database(self) -> str:
        """Make an empty database; its SQLAlchemy URL, as :class:`LocalAirflow` takes it."""
        import psycopg2

        name = f"database_{secrets.token_hex(4)}"
        with closing(psycopg2.connect(**self.address)) as server:
            server.autocommit = True  # a database cannot be created within a transaction
            server.cursor().execute(f"CREATE DATABASE {name}")
        a = self.address
        return f"postgresql+psycopg2://{a['user']}:{a['password']}@{a['host']}:{a['port']}/{name}"

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _call(self, *command: object) -> None:
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = {"user": "postgres", "group": "postgres", "extra_groups": []}
        done = subprocess.run(
            [str(part) for part in command],
            check=False,
            capture_output=True,
            text=True,
            cwd=self._home,
            **account,
        )
        if done.returncode:
            raise LeptonError(f"{command[0]} failed: {done.stderr or done.stdout}")


def pg_ctl() -> Path | None:
    """PostgreSQL's own program, or None where it is not installed."""
    # Debian keeps the server's programs out of PATH, one folder a version.
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), reverse=True)
    found = shutil.which("pg_ctl") or next(map(str, debian), None)
    return Path(found) if found else None
