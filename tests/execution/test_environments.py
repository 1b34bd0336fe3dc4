"""Environments: what names one, that one is built once, that half of one is none, and what cannot be built says why."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lepton_airflow.errors import BadConfiguration, LeptonError, RunnerError
from lepton_airflow.execution import environments
from lepton_airflow.execution.environments import Environment, extra_lines, list_environments, prune
from lepton_airflow.testing import until

SMALL = ["toolz"]  # one pure Python wheel: an environment of it is built in seconds


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root, and the interpreter of the small environment built there by four processes at once; they print so."""
    root = tmp_path_factory.mktemp("environments with späce")
    tasks = [command("build", "--requirement", *SMALL, root=root) for _ in range(4)]
    printed = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, printed
    log = "".join(err for _, err in printed)
    assert log.count("building environment own-") == 1
    assert log.count("is there:") == 3
    (python,) = {out.strip() for out, _ in printed}
    return root, python


@pytest.fixture
def silent_index() -> Iterator[str]:
    """The address of a package index that takes a call and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"


def command(name: str, *arguments: str, root: Path, **env: str) -> subprocess.Popen[str]:
    """``python -m lepton_airflow envs NAME``, started in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lepton_airflow", "envs", name, *arguments, f"--root={root}", *_NO_PINS[name]],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


_NO_PINS = {"build": ["--constraints="], "ls": [], "prune": []}


@pytest.mark.network
def test_many_ask_and_one_builds(built: tuple[Path, str]) -> None:
    root, python = built
    code = (
        "import fsspec, psutil, toolz, importlib.util as u; print(u.find_spec('airflow'), u.find_spec('pip'))"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "None"]
    (entry,) = list_environments(root)
    assert (entry.state, entry.bytes is not None) == ("ready", True)
    assert "toolz" in entry.requirements


def _as_built(environment: Environment, root: Path) -> str:
    """What a finished environment looks like from outside; returns its interpreter."""
    python = root / environment.name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (root / environment.name / "environment.json").write_text("{}")
    return str(python)


def test_who_wants_it_waits_for_its_builder_and_says_so(tmp_path: Path) -> None:
    environment, said, answers = Environment.of([], ["toolz"]), list[str](), list[Path]()
    task = threading.Thread(
        target=lambda: answers.append(environment.build(tmp_path, said.append)), daemon=True
    )
    with (tmp_path / f"{environment.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as its builder does
        with environment.use(tmp_path) as interpreter:
            assert interpreter is None
        task.start()
        until(lambda: said, "a word about the other builder")
        assert "by another process: waiting" in said[0]
        python = _as_built(environment, tmp_path)
    task.join(30)
    assert answers == [Path(python)]


@pytest.mark.timeout(60)
def test_nobody_waits_for_the_stages_that_use_it(tmp_path: Path) -> None:
    environment, said = Environment.of([], ["toolz"]), list[str]()
    python = _as_built(environment, tmp_path)
    with environment.use(tmp_path) as interpreter:
        assert interpreter == python
        assert str(environment.build(tmp_path, said.append)) == python
    assert [line.partition(":")[0] for line in said] == [f"environment {environment.name} is there"]


def test_a_path_of_constraints_means_the_same_where_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pins.txt").write_text("toolz==1.0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = {Environment.of([], constraints=text).constraints for text in ("pins.txt", "~/pins.txt")}
    assert named == {str(tmp_path / "pins.txt")}
    url = "https://example.org/pins-1.txt"
    assert Environment.of([], constraints=url).constraints == url


def test_it_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("toolz==1.0.0\n")
    first = Environment.of(["prepare"], ["b", "a"], constraints=str(pins), installer="uv")
    assert first.name.startswith("prepare-")
    assert Environment.of(["prepare"], ["a", "b", "a"], constraints=str(pins), installer="uv") == first
    keys = {
        first.key,
        Environment.of(["train"], ["b", "a"], constraints=str(pins), installer="uv").key,
        Environment.of(["prepare"], ["b"], constraints=str(pins), installer="uv").key,
        Environment.of(["prepare"], ["b", "a"], installer="uv").key,
        Environment.of(["prepare"], ["b", "a"], constraints=str(pins), installer="pip").key,
    }
    pins.write_text("toolz==1.0.1\n")
    keys.add(Environment.of(["prepare"], ["b", "a"], constraints=str(pins), installer="uv").key)
    assert len(keys) == 6


def test_an_extra_brings_its_lines_and_those_of_the_entry_point_without_airflow() -> None:
    names = {line.split(">")[0].split("<")[0] for line in extra_lines(["prepare"])}
    assert names == {"duckdb", "fsspec", "pandas", "psutil", "pyarrow"}
    assert {line.split(">")[0] for line in extra_lines([])} == {"fsspec", "psutil"}


@pytest.mark.network
@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
def test_a_half_built_one_is_built_again(tmp_path: Path, silent_index: str, killed: signal.Signals) -> None:
    task = command("build", "--requirement=toolz", "--installer=uv", root=tmp_path, UV_INDEX_URL=silent_index)
    python = until(lambda: [*tmp_path.glob("own-*/bin/python")], "its interpreter", within_s=60)[0]
    assert [entry.state for entry in list_environments(tmp_path)] == ["building"]
    os.killpg(task.pid, killed)
    task.communicate(timeout=30)
    # The installer holds the lock too, and may end a moment after the process that called it.
    until(
        lambda: [entry.state for entry in list_environments(tmp_path)] == ["half-built"],
        "its lock to be free",
    )
    environment = Environment.of([], ["toolz"], installer="uv")
    with environment.use(tmp_path) as interpreter:
        assert interpreter is None
    said: list[str] = []
    assert environment.build(tmp_path, said.append) == python
    assert "was left half-built" in said[0]
    with environment.use(tmp_path) as interpreter:
        assert interpreter == str(python)


def test_an_interpreter_that_was_removed_takes_its_environments_along(tmp_path: Path) -> None:
    home = tmp_path / Environment.of([], ["toolz"]).name
    (home / "bin").mkdir(parents=True)
    (home / "environment.json").write_text("{}")
    (home / "bin" / "python").symlink_to(tmp_path / "python that was upgraded")
    with Environment.of([], ["toolz"]).use(tmp_path) as interpreter:
        assert interpreter is None


@pytest.mark.network
def test_pip_builds_too_and_without_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_uv", lambda: None)
    environment = Environment.of([], SMALL)
    assert environment.installer == "pip"
    python = environment.build(tmp_path, lambda _: None)
    subprocess.run([python, "-c", "import fsspec, psutil, toolz"], check=True)


@pytest.mark.network
@pytest.mark.parametrize(
    ("requirements", "installer", "kind", "sentence"),
    [
        (["toolz==99"], "uv", BadConfiguration, r"no version of toolz==99.* Change extras"),
        (["--no-index", "toolz==99"], "uv", BadConfiguration, "unsatisfiable|not found"),
        (["--index-url http://127.0.0.1:9/simple"], "uv", RunnerError, "127.0.0.1:9.*A retry may"),
        (["--index-url http://me:hush@127.0.0.1:9/simple"], "uv", RunnerError, r"A retry may"),
    ],
)
def test_what_cannot_be_built_says_why_and_whether_to_retry(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    requirements: list[str],
    installer: str,
    kind: type[LeptonError],
    sentence: str,
) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    environment = Environment.of([], requirements, installer=installer)
    said: list[str] = []
    with pytest.raises(kind, match=sentence) as caught:
        environment.build(tmp_path, said.append)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "hush" not in f"{caught.value}{said}"
    assert list_environments(tmp_path) == []


@pytest.mark.parametrize(
    ("lines", "code", "kind", "sentence"),
    [
        (
            [
                "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(…)': /simple/toolz/",
                "ERROR: Could not find a version that satisfies the requirement toolz (from versions: none)",
                "ERROR: No matching distribution found for toolz",
            ],
            1,
            RunnerError,
            "No matching distribution found for toolz. Before that: WARNING: Retrying .*A retry may",
        ),
        (
            ["Collecting async-timeout", "ERROR: No matching distribution found for async-timeout==99"],
            1,
            BadConfiguration,
            "found for async-timeout==99. Change",
        ),
        (
            ["ERROR: Could not install packages due to an OSError: No space left on device"],
            1,
            RunnerError,
            "retry",
        ),
        (["Collecting toolz"], -9, RunnerError, "Collecting toolz. A retry"),
        (
            ["ensurepip is not available.  On Debian/Ubuntu systems …", ""],
            1,
            BadConfiguration,
            "python3-venv",
        ),
        ([], 2, BadConfiguration, "exit code 2"),
    ],
)
def test_what_installers_say_becomes_one_sentence(
    lines: list[str], code: int, kind: type[LeptonError], sentence: str
) -> None:
    error = environments._failure("x-1", lines, code)
    assert type(error) is kind
    with pytest.raises(kind, match=sentence):
        raise error


DIGITS = "0123456789abcdef"


def test_prune_takes_what_is_old_or_half_built_and_nothing_in_use(tmp_path: Path) -> None:
    for name, complete, age_s in (
        (f"old-{DIGITS}", True, 100),
        (f"new-{DIGITS}", True, 0),
        (f"used-{DIGITS}", True, 100),
        (f"half-{DIGITS}", False, 0),
    ):
        (tmp_path / name / "bin").mkdir(parents=True)
        if complete:
            (tmp_path / name / "environment.json").write_text(json.dumps({"bytes": 7, "requirements": ["x"]}))
        lock = tmp_path / f"{name}.lock"
        lock.touch()
        os.utime(lock, (lock.stat().st_mtime - age_s,) * 2)
    (tmp_path / "not-ours").mkdir()
    with (tmp_path / f"used-{DIGITS}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert {e.name: e.state for e in list_environments(tmp_path)} == {
            f"old-{DIGITS}": "ready",
            f"new-{DIGITS}": "ready",
            f"used-{DIGITS}": "in use",
            f"half-{DIGITS}": "half-built",
        }
        assert {e.name for e in prune(tmp_path, 50)} == {f"old-{DIGITS}", f"half-{DIGITS}"}
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {
        "not-ours",
        f"new-{DIGITS}",
        f"used-{DIGITS}",
    }


@pytest.mark.network
def test_ls_and_prune_on_the_command_line(built: tuple[Path, str]) -> None:
    root, python = built
    out, err = command("ls", root=root).communicate(timeout=60)
    assert "ready" in out, err
    assert Path(python).parents[1].name in out
    out, err = command("prune", root=root).communicate(timeout=60)
    assert out == "0 environments and 0 bytes removed\n", err
    assert Path(python).exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"extras": ["prepar"]}, "no extra 'prepar'; did you mean 'prepare'"),
        ({"extras": [], "python": "/nowhere/python"}, "no interpreter '/nowhere/python'"),
        ({"extras": [], "python": "false"}, "false did not run as a Python interpreter"),
        ({"extras": [], "constraints": "/nowhere/pins.txt"}, "'/nowhere/pins.txt' cannot be read"),
    ],
)
def test_what_does_not_exist_is_a_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadConfiguration, match=sentence):
        Environment.of(**arguments)  # type: ignore[arg-type]


def test_an_interpreter_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("""#!/bin/sh\necho '["cpython", "3.8.1", "linux-x86_64", "/usr/bin/python3.8"]'\n""")
    old.chmod(0o755)
    with pytest.raises(BadConfiguration, match=r"is Python 3\.8\.1: lepton_airflow needs 3\.11 or newer"):
        Environment.of([], python=str(old))


def test_a_root_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadConfiguration, match=r"Set \[lepton\] environments"):
        Environment.of([], SMALL).build(tmp_path / "file" / "root", print)


def test_environments_lie_in_the_users_cache_or_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.default_root() == tmp_path / "lepton_airflow" / "environments"
    monkeypatch.setenv("AIRFLOW__LEPTON__ENVIRONMENTS", "~/envs")
    assert environments.default_root() == Path.home() / "envs"
