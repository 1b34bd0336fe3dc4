"""The runner Venv: with a given interpreter it keeps the whole contract; what it builds holds its libraries and no Airflow."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lepton_airflow
from lepton_airflow import runners
from lepton_airflow.contract import Request
from lepton_airflow.errors import BadConfiguration, BadInput, Preempted, RunnerError
from lepton_airflow.execution.environments import Environment
from lepton_airflow.runners import Runner, Venv
from lepton_airflow.stages import Stage
from lepton_airflow.testing import LocalRunnerConformance, WorkerRunnerConformance, probe, until
from lepton_airflow.testing.conformance import running

PACKAGE = Path(lepton_airflow.__file__).parent


class TestGivenInterpreter(LocalRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return Venv(python=sys.executable, **settings)


@pytest.mark.network
class TestBuiltEnvironment(WorkerRunnerConformance):
    def make_runner(self, **settings: Any) -> Runner:
        return Venv(requirements=["toolz"], **settings)

    @pytest.fixture(autouse=True)
    def _root(self, root: Path) -> None:
        """All tests share what the first one builds."""


@pytest.fixture(scope="session")
def built_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the environments of these tests lie."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def root(built_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the installation's setting."""
    monkeypatch.setenv("AIRFLOW__LEPTON__ENVIRONMENTS", str(built_root))
    return built_root


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``look(runner)``: what a stage beside the DAG sees there."""
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "probe_of_surroundings.py").write_text(
        "import importlib.util as u, os, sys\nimport lepton_airflow\n"
        "def answer():\n"
        "    names = ('airflow', 'pandas', 'toolz', 'fsspec')\n"
        "    return [[n for n in names if u.find_spec(n)], os.path.realpath(lepton_airflow.__file__), sys.prefix,\n"
        "            list(sys.version_info[:2]), os.environ['PATH'].split(os.pathsep)[0], os.environ['VIRTUAL_ENV']]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "dags")])

    def call(runner: Runner) -> Any:
        request = probe("Look", tmp_path / "store", module="probe_of_surroundings")
        return runner.run(request, [], {}).values["answer"]

    return call


@pytest.mark.network
def test_a_built_one_has_what_was_asked_for_and_the_workers_own_code(root: Path, look: Any) -> None:
    home = str(root / Environment.of([], ["toolz"]).name)
    # As where this package lies beside Airflow and on PYTHONPATH: none of it may be seen there.
    sys.path.insert(0, sysconfig.get_path("purelib"))
    try:
        found, code, prefix, _, first, venv = look(Venv(requirements=["toolz"]))
    finally:
        sys.path.pop(0)
    assert found == ["toolz", "fsspec"]
    assert code == os.path.realpath(PACKAGE / "__init__.py")
    assert (prefix, first, venv) == (home, f"{home}/bin", home)


@pytest.mark.network
def test_another_version_of_python(root: Path, look: Any) -> None:
    # On PATH, or beside this one, as version managers lay them out.
    named = [path for minor in range(11, 15) if (path := shutil.which(f"python3.{minor}"))]
    beside = [str(path) for path in Path(sys.base_prefix).parent.glob("3.1*/bin/python3")]
    for python in [*named, *beside]:
        asked = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        version = subprocess.run(asked, check=False, capture_output=True, text=True).stdout.split()
        if version and (3, 11) <= tuple(map(int, version)) != sys.version_info[:2]:
            break
    else:
        pytest.skip("there is one Python on this machine: install python3.12 besides")
    found, code, _, seen, *_ = look(Venv(python=python, requirements=["toolz"]))
    assert found == ["toolz", "fsspec"]
    assert code == os.path.realpath(PACKAGE / "__init__.py")
    assert [*map(str, seen)] == version


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with what the entry point needs, but without lepton_airflow."""
    root = tmp_path_factory.mktemp("bare")
    return Environment.of([]).build(root, lambda _: None)


@pytest.mark.network
def test_a_given_interpreter_without_lepton_airflow(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadConfiguration, match=r"python has no lepton_airflow: .*--no-deps lepton-airflow==.*Venv"
    ):
        Venv(python=str(bare)).run(probe("Copy", tmp_path), [], {})


@pytest.mark.network
def test_a_given_interpreter_with_an_older_lepton_airflow(bare: Path, tmp_path: Path) -> None:
    libraries = next(bare.parents[1].glob("lib/python*/site-packages"))
    older = libraries / "lepton_airflow"
    shutil.copytree(PACKAGE, older, ignore=shutil.ignore_patterns("__pycache__"))
    contract = older / "contract.py"
    text = contract.read_text()
    contract.write_text(text.replace("\nPROTOCOL = 1\n", "\nPROTOCOL = 0\n"))
    assert contract.read_text() != text
    with pytest.raises(BadInput, match=r"speaks protocol 1, this lepton_airflow knows up to 0: upgrade"):
        Venv(python=str(bare)).run(probe("Copy", tmp_path), [], {})


def test_a_given_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match="no interpreter '/nowhere/python' on this worker"):
        Venv(python="/nowhere/python").run(probe("Copy", tmp_path), [], {})
    (tmp_path / "python").write_text("no program")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(BadConfiguration, match="python did not run as a Python interpreter"):
        Venv(python=str(tmp_path / "python")).run(probe("Copy", tmp_path), [], {})


@pytest.mark.network
def test_a_version_that_does_not_exist_is_not_retried(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadConfiguration, match=r"^environment own-\w+ could not be built: .*toolz==99"
    ) as caught:
        Venv(requirements=["toolz==99"]).run(probe("Copy", tmp_path), [], {})
    assert caught.value.exit_code == 80


def test_an_index_that_is_away_may_be_retried(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(RunnerError, match=r"127\.0\.0\.1:9.*A retry") as caught:
        Venv(requirements=["--index-url http://127.0.0.1:9/simple"]).run(probe("Copy", tmp_path), [], {})
    assert caught.value.exit_code == 1


@pytest.fixture
def silent_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package index that accepts connections and never answers; uv is told to use it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        monkeypatch.setenv("UV_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        yield


def _installers(root: Path) -> list[int]:
    """Process ids of the installers at work under a root."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = cmdline.read_bytes()
        except OSError:
            continue
        if b"install" in command and os.fsencode(root) in command and b"-c\0" not in command:
            found.append(int(cmdline.parent.name))
    return found


def test_cancel_while_it_builds(tmp_path: Path, silent_index: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LEPTON__ENVIRONMENTS", str(tmp_path / "root"))
    runner, errors = Venv(requirements=["toolz"], installer="uv"), []

    def run() -> None:
        try:
            runner.run(probe("Copy", tmp_path / "store"), [], {})
        except Preempted as error:
            errors.append(error)

    task = threading.Thread(target=run, daemon=True)
    task.start()
    pids = until(lambda: _installers(tmp_path / "root"), "the installer", within_s=60)
    runner.cancel()
    task.join(60)
    assert "while environment own-" in str(errors[0])
    assert running(pids) == []


_WORKER = """
import sys
from lepton_airflow.contract import Request
from lepton_airflow.runners import Venv
Venv(requirements=["toolz"], installer="uv").run(Request.from_json(sys.argv[1]), [], {})
"""


def test_nothing_survives_a_worker_killed_while_it_builds(tmp_path: Path, silent_index: None) -> None:
    root = tmp_path / "root"
    env = os.environ | {"AIRFLOW__LEPTON__ENVIRONMENTS": str(root)}
    request: Request = probe("Copy", tmp_path / "store")
    worker = subprocess.Popen([sys.executable, "-c", _WORKER, request.to_json()], env=env)
    try:
        pids = until(lambda: _installers(root), "the installer", within_s=60)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    until(lambda: not running(pids), "the installer to end", within_s=30)


# -- in a DAG file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"extras": "prepar"}, r"Venv\('prepar'\): did you mean 'prepare'"),
        ({"extras": "train, prepar"}, "did you mean 'prepare'"),
        ({"extras": ["train", "torch"]}, r'expected text, such as Venv\("train,torch"\)'),
        ({"python": ""}, "expected a path or a name"),
        ({"python": 3.12}, "expected a path or a name"),
        ({"requirements": "toolz"}, "expected a list of lines"),
        ({"requirements": ["-r more.txt"]}, "other files .* are not read"),
        ({"requirements": ["a\nb"]}, "expected a list of lines"),
        ({"installer": "conda"}, "known: pip, uv"),
        ({"python": "/x/python", "constraints": "pins.txt"}, "alone installs nothing"),
        ({"extras": "train", "memory_limit_mb": 1}, r"^Venv\(memory_limit_mb=1\): .*at least 64 MiB"),
    ],
)
def test_bad_values_are_refused_where_they_are_written(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadConfiguration, match=sentence):
        Venv(**arguments)


def test_a_stage_of_your_own_needs_a_word_about_its_libraries(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadConfiguration, match=r"what .*:Copy needs is not known; say it, such as Venv\(requirements="
    ):
        Venv().run(probe("Copy", tmp_path), [], {})


def test_so_does_one_that_a_package_brings(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lepton_airflow.runners.venv.get_stage", lambda name: Stage
    )  # by its entry point: no extra of ours
    with pytest.raises(BadConfiguration, match="what Theirs needs is not known; say it"):
        Venv()._environment_of("Theirs")
    assert "toolz" in Venv(requirements=["toolz"])._environment_of("Theirs").requirements


def test_left_alone_it_has_the_extra_of_the_stage() -> None:
    assert Venv()._environment_of("PrepareData") == Venv("prepare")._environment_of("IngestData")


def test_the_repr_makes_an_equal_one() -> None:
    runner = Venv("train,torch", requirements=["toolz"], constraints="pins.txt", memory_limit_mb=4096)
    assert eval(repr(runner), {"Venv": Venv}) == runner


def test_a_dag_file_pays_for_what_it_names_and_builds_nothing(tmp_path: Path) -> None:
    code = """
import sys
from lepton_airflow.runners import Venv
Venv("prepare")
heavy = {"airflow", "duckdb", "fsspec", "numpy", "pandas", "psutil", "lepton_airflow.runners.in_process"}
print(sorted(heavy & set(sys.modules)))
"""
    env = os.environ | {
        "AIRFLOW__LEPTON__ENVIRONMENTS": str(tmp_path / "root"),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]"
    assert [*tmp_path.iterdir()] == []


def test_a_runner_is_found_by_its_file() -> None:
    assert {"InProcess", "Runner", "Subprocess", "Venv", "settle"} <= set(runners.__all__)
    for name in runners.__all__:
        assert getattr(runners, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Cloud'"):
        runners.Cloud  # noqa: B018
