"""What several tests share: the flight data, and real programs from Debian."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from lepton_airflow.runners.subprocess import ALLOWED_ENVIRONMENT
from lepton_airflow.testing import LocalPostgres
from lepton_airflow.testing.local_postgres import Address

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a task: docs/decisions/0004

# What tells a process to measure coverage ([tool.coverage.run] in pyproject.toml) reaches stages too, which else get few variables.
ALLOWED_ENVIRONMENT.append("COVERAGE_PROCESS_CONFIG")


# Which files come first, by the beginning of their names; the others follow. What takes longest is at the front, or one
# worker would end long after the other; what needs the image of the pods is not, so that it can be built meanwhile.
ORDER = (
    "tests/dags/test_on_airflow.py",
    "tests/dags/test_backfill.py",
    "tests/dags/test_watch.py",
    "tests/dags/",
    "tests/compat/",
    "tests/stages/",
    "tests/runners/",
    "tests/cluster/test_drills.py",
    "tests/cluster/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in their order, and mark what fetches something from a package index."""
    items.sort(
        key=lambda item: next((n for n, p in enumerate(ORDER) if item.nodeid.startswith(p)), len(ORDER))
    )
    for item in items:
        if "raw_flights" in getattr(item, "fixturenames", ()):
            item.add_marker("network")


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed, nobody calls it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to a worker whole, and the folder ``dags`` too, whose files share one Airflow."""
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope
    scheduler._split_scope = lambda test: "tests/dags" if test.startswith("tests/dags/") else file_of(test)
    return scheduler


# -- what each folder takes --------------------------------------------------------------------------------------------

FACTOR = 3  # by which a folder may exceed its budget
SLACK_S = 120  # so much more is never a failure: beside another program a short folder may take several times its budget


class Budgets:
    """Compares the seconds that each folder's tests took with the table in ``tests/README.md``.

    A machine that is slow or busy slows all folders, so a folder is held against the median of all: it is too slow when it
    exceeds its budget by more than three times as much as the median folder does, and by two minutes. In CI that fails the run.
    """

    def __init__(self) -> None:
        table = (ROOT / "tests" / "README.md").read_text()
        rows = re.findall(r"^\| `([\w./]+)` \|.*\| (\d+) \|$", table, re.MULTILINE)
        self.budgets = {name: int(seconds) for name, seconds in rows}
        self.took: dict[str, dict[str, float]] = {}  # folder, test: seconds

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add what one phase of a test took."""
        name = report.nodeid.split("/")[1].split("::")[0] if "/" in report.nodeid else ""
        tests = self.took.setdefault(name if (ROOT / "tests" / name).is_dir() else ".", {})
        tests[report.nodeid] = tests.get(report.nodeid, 0) + report.duration

    def complaints(self) -> list[str]:
        """A sentence for each folder that took too long, or that has no budget."""
        seconds = {name: sum(tests.values()) for name, tests in self.took.items()}
        of_budget = {n: seconds[n] / budget for n, budget in self.budgets.items() if n in seconds}
        usual = max(1.0, median(of_budget.values())) if of_budget else 1.0
        found = [f"tests/{n} has no budget in tests/README.md" for n in seconds if n not in self.budgets]
        for name, share in of_budget.items():
            if share > FACTOR * usual and seconds[name] > self.budgets[name] + SLACK_S:
                slowest = sorted(self.took[name].items(), key=lambda test: -test[1])[:3]
                found.append(
                    f"tests/{name} took {seconds[name]:.0f} s; its budget is {self.budgets[name]} s, and the median folder "
                    f"took {usual:.1f} times its own. Slowest: "
                    + ", ".join(f"{test} ({s:.0f} s)" for test, s in slowest)
                )
        return found

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In CI a folder that took too long fails the run."""
        if os.environ.get("LEPTON_REQUIRE_ALL") == "1" and self.complaints() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what each folder took."""
        terminalreporter.section("seconds of each folder, and its budget")
        for name, tests in sorted(self.took.items()):
            terminalreporter.line(f"{name:12} {sum(tests.values()):5.0f} {self.budgets.get(name, 0):5}")
        for complaint in self.complaints():
            terminalreporter.line(complaint, red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the budgets, where all tests of a run are reported: not in pytest-xdist's workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets())


# -- fixtures ----------------------------------------------------------------------------------------------------------


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
