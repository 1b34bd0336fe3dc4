"""What several tests share: the flight data, and real programs from Debian."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lepton_airflow.testing import LocalPostgres
from lepton_airflow.testing.local_postgres import Address

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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[LocalPostgres]:
    """A real PostgreSQL server on a free loopback port, made for this session and removed after it."""
    _require_program("pg_ctl", "postgresql")
    with LocalPostgres() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: LocalPostgres) -> Address:
    """Where a test reaches its PostgreSQL server."""
    return postgres_server.address


@pytest.fixture(scope="session")
def new_airflow_database(request: pytest.FixtureRequest) -> Callable[[], str | None]:
    """``new_airflow_database()``: URL of an empty PostgreSQL database; None, which means sqlite, without PostgreSQL."""

    def make() -> str | None:
        try:
            server: LocalPostgres = request.getfixturevalue("postgres_server")
        except pytest.skip.Exception:
            return None
        return server.new_database()

    return make


@dataclass
class Element:
    """A tag of a page with its attributes and what is in it; ``str()`` is its text."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The tags of that name within this one, those right below it first."""
        found = [e for e in self.children if e.tag == tag and attributes.items() <= e.attributes.items()]
        return found + [e for child in self.children for e in child.all(tag, **attributes)]

    def __str__(self) -> str:
        return self.text + "".join(map(str, self.children))


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in ("br", "img", "meta"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(Element("#text", text=data))


@pytest.fixture
def read_html() -> Callable[[str], Element]:
    """``read_html(page)``: the page as a tree of tags, each of which must be closed by its own."""

    def read(page: str) -> Element:
        tree = _Tree()
        tree.feed(page)
        tree.close()
        assert [element.tag for element in tree.open[1:]] == []
        return tree.root

    return read
