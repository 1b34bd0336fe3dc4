"""What several tests share: the flight data, and real programs from Debian."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypedDict

import pytest

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a task: docs/decisions/0004


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests on a real Airflow: they take longest, and the others fill the second core meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("airflow") is None)


@pytest.fixture(scope="session")
def raw_flights() -> Path:
    """The raw sources of 2013's flights, landed once in ``.cache/flights`` (see ``demo/flights.py``)."""
    spec = importlib.util.spec_from_file_location("flights", ROOT / "demo" / "flights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.land(ROOT / ".cache" / "flights")
    return folder


@pytest.fixture(scope="session")
def require_program() -> Callable[[str, str], Path]:
    """``require_program("chromium", "chromium")``: the program's path, or a skip that names its Debian package."""
    return _require_program


def _require_program(program: str, package: str) -> Path:
    found = shutil.which(
        program
    ) or next(  # Debian keeps the server's programs out of PATH, one folder a version
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), reverse=True)),
        None,
    )
    if found:
        return Path(found)
    reason = f"{program} is not installed: apt-get install {package}"
    if (
        os.environ.get("LEPTON_REQUIRE_ALL") == "1"
    ):  # CI installs them all, so there a skip would hide a mistake
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class PostgresAddress(TypedDict):
    """Where a test reaches its PostgreSQL server."""

    host: str
    port: int
    user: str
    password: str
    dbname: str


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresAddress]:
    """A real PostgreSQL server on a free loopback port, made for this session and removed after it."""
    pg_ctl = _require_program("pg_ctl", "postgresql")
    # Not under pytest's own temporary folder, whose parents are closed to the server's user.
    home = Path(tempfile.mkdtemp(prefix="postgres-"))
    account: dict[str, object] = {"cwd": home}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root; the package brings the user postgres
        shutil.chown(home, "postgres", "postgres")
        account |= {"user": "postgres", "group": "postgres", "extra_groups": []}

    def call(*command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command], check=False, capture_output=True, text=True, **account
        )  # type: ignore[call-overload]
        assert done.returncode == 0, f"{command[0]} failed: {done.stderr or done.stdout}"

    address = PostgresAddress(
        host="127.0.0.1", port=_free_port(), user="lepton", password=secrets.token_hex(8), dbname="postgres"
    )
    password = home / "password"
    password.write_text(address["password"])
    data = home / "data"
    try:
        call(
            *(pg_ctl.with_name("initdb"), "-D", data, "-U", address["user"], "--pwfile", password),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"),
        )
        options = f"-c listen_addresses=127.0.0.1 -c port={address['port']} -c fsync=off -k {home}"
        call(pg_ctl, "start", "-w", "-D", data, "-l", home / "log", "-o", options)
        try:
            yield address
        finally:
            call(
                pg_ctl, "stop", "-w", "-m", "immediate", "-D", data
            )  # by the pid that its data folder records
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def new_airflow_database(request: pytest.FixtureRequest) -> Callable[[], str | None]:
    """``new_airflow_database()``: URL of an empty PostgreSQL database; None, which means sqlite, without PostgreSQL."""

    def make() -> str | None:
        try:
            address: PostgresAddress = request.getfixturevalue("postgres")
        except pytest.skip.Exception:
            return None
        import psycopg2

        name = f"airflow_{secrets.token_hex(4)}"
        with closing(psycopg2.connect(**address)) as server:
            server.autocommit = True  # a database cannot be created within a transaction
            server.cursor().execute(f"CREATE DATABASE {name}")
        where = f"{address['user']}:{address['password']}@{address['host']}:{address['port']}"
        return f"postgresql+psycopg2://{where}/{name}"

    return make


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
