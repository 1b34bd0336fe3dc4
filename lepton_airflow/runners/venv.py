"""Run a stage on the worker in an interpreter of its own, whose libraries may conflict with Airflow's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import lepton_airflow
from lepton_airflow.errors import (
    DO_NOT_RETRY,
    BadConfiguration,
    LeptonError,
    Preempted,
    RunnerError,
    did_you_mean,
)
from lepton_airflow.execution import environments
from lepton_airflow.execution.environments import ENTRY_POINT_NEEDS, PACKAGE, Environment
from lepton_airflow.runners.subprocess import Interpreter, Subprocess, log, own_interpreter
from lepton_airflow.settings import setting
from lepton_airflow.stages import get_stage

# The environment variables of the worker that an installer may see besides those of a stage: they name its package index.
_OF_INSTALLERS = ("PIP_", "UV_", "XDG_CACHE_HOME", "XDG_CONFIG_", "NETRC")


@dataclass(kw_only=True)
class Venv(Subprocess):
    """Run the stage in an environment built from extras of lepton-airflow, or in an interpreter you give.

    ``Venv("drift")`` builds what CheckDrift needs, once on each worker, and runs the worker's own code of this package in
    it; ``Venv("train,torch")`` has two extras, ``Venv()`` those of whichever stage runs. ``Venv(python="/opt/ml/bin/python")``
    builds nothing: that interpreter must have lepton_airflow, fsspec, psutil and the stage's libraries.

    An environment is named by the hash of its contents and kept in ``[lepton] environments``; see ``python -m
    lepton_airflow envs``. The stage finds user code beside the DAG, but not the libraries installed in the worker's
    environment. The arguments of :class:`Subprocess` (``memory_limit_mb``, ``grace_s``, ``env``, ``pass_env``) apply too;
    the memory limit does not apply to building the environment.

    :param extras: extras of lepton-airflow, with commas between them as in pip's brackets; default: those of the stage.
    :param python: an interpreter of the worker, as a path or a name on PATH. Alone, the stage runs in it; with extras or
        requirements, the environment is built from it. Default: built from the worker's own.
    :param requirements: further lines as in a requirements file, such as ``my-package==1.2`` or ``--index-url …``. No
        secrets: they show in the serialized DAG.
    :param constraints: path or URL of a constraints file; a file counts by its content, a URL by its text. Default: the
        installation's ``[lepton] constraints``.
    :param installer: ``uv`` or ``pip``; default: uv where it is installed, else pip.
    :raises BadConfiguration: there is no such extra, interpreter, package or version.
    :raises RunnerError: the package index did not answer; a retry may find it.
    """

    extras: str = field(default="", kw_only=False)
    python: str | None = None
    requirements: list[str] = field(default_factory=list)
    constraints: str | None = None
    installer: Literal["uv", "pip"] | None = None
    _same_interpreter: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.extras, str):
            raise BadConfiguration(
                f'Venv(extras={self.extras!r}): expected text, such as Venv("train,torch").'
            )
        known = environments.known_extras()
        for extra in _names(self.extras):
            if known and extra not in known:
                raise BadConfiguration(f"Venv({self.extras!r}): {did_you_mean(extra, known)}")
        if self.python is not None and (not isinstance(self.python, str) or not self.python):
            raise BadConfiguration(
                f'Venv(python={self.python!r}): expected a path or a name, such as Venv(python="/opt/ml/bin/python").'
            )
        if not isinstance(self.requirements, list) or not all(map(_is_requirement, self.requirements)):
            raise BadConfiguration(
                f"Venv(requirements={self.requirements!r}): expected a list of lines, such as "
                '["my-package==1.2"]; other files (-r, -c, -e) are not read, constraints= takes one.'
            )
        if self.installer not in ("uv", "pip", None):
            raise BadConfiguration(
                f"Venv(installer={self.installer!r}): {did_you_mean(str(self.installer), ('uv', 'pip'))}"
            )
        if self._given and (self.constraints or self.installer):
            raise BadConfiguration(
                "Venv(python=…) alone installs nothing, so constraints= and installer= say nothing: name extras too, "
                f'such as Venv("drift", python={self.python!r}), or leave them out.'
            )

    @property
    def _given(self) -> bool:
        """Whether ``python`` is used as it is, and nothing is built."""
        return bool(self.python) and not self.extras and not self.requirements

    @contextmanager
    def _interpreter(self, stage: str, folder: str, supervised: bool) -> Iterator[Interpreter]:
        if self._given:
            given = environments.find_python(self.python)
            environments.facts(given)
            yield _elsewhere(given, [])
            return
        root, environment = environments.default_root(), self._environment_of(stage)
        # The worker's own code, whatever its version. Only this package is linked: beside it may lie all of Airflow.
        code = Path(folder, "code")
        code.mkdir()
        (code / "lepton_airflow").symlink_to(Path(lepton_airflow.__file__).parent)
        # The first pass does not wait for a build of another task: the process that builds does, which is logged and can be
        # stopped.
        for say in (None, log.info):
            with environment.use(root, say) as python:
                if python:
                    yield _elsewhere(python, [str(code)])
                    return
            if say is None:
                self._build(environment, root, folder, supervised)
        raise RunnerError(
            f"environment {environment.name} was built and is gone again: something else clears {root}; try again."
        )

    def _environment_of(self, stage: str) -> Environment:
        extras = self.extras
        if not extras and ":" not in stage:
            extras = get_stage(stage).extra
        if not extras and not self.requirements:
            raise BadConfiguration(
                f"Venv(): what {stage} needs is not known; say it, such as Venv(requirements=['scikit-learn>=1.7'])."
            )
        constraints = self.constraints or setting("constraints")
        return Environment.of(_names(extras), self.requirements, self.python, constraints, self.installer)

    def _build(self, environment: Environment, root: Path, folder: str, supervised: bool) -> None:
        """Build it with ``python -m lepton_airflow envs build``, a process that is logged and stopped as a stage's is."""
        own = own_interpreter()
        wanted = {k: v for k, v in os.environ.items() if k.startswith(_OF_INSTALLERS)}
        arguments = ["envs", "build", ",".join(environment.extras), f"--root={root}"]
        arguments += [f"--python={environment.python}", f"--installer={environment.installer}"]
        arguments += [f"--constraints={environment.constraints or ''}"]
        arguments += [f"--requirement={line}" for line in self.requirements]
        ended = self._run_entry_point(replace(own, env=wanted), arguments, folder, supervised)
        if ended.code == -signal.SIGTERM:
            raise Preempted(
                f"asked to stop (SIGTERM) while environment {environment.name} was built; the next try builds it."
            )
        said = ended.last_line.removeprefix("lepton_airflow: ")
        if ended.code == DO_NOT_RETRY:
            raise BadConfiguration(said)
        if ended.code > 0:
            raise RunnerError(said)
        if ended.code < 0:
            raise RunnerError(f"environment {environment.name}: its installer was killed; try again.")

    def _without_receipt(self, stage: str, code: int, last_line: str) -> LeptonError:
        if self._given and code in (1, 2) and (reason := _why_unfit(environments.find_python(self.python))):
            return BadConfiguration(reason)
        return super()._without_receipt(stage, code, last_line)


def _names(extras: str) -> list[str]:
    return [name for part in extras.split(",") if (name := part.strip())]


def _is_requirement(line: object) -> bool:
    if not isinstance(line, str) or not line.strip() or "\n" in line:
        return False
    return not line.lstrip().startswith(("-r", "-c", "-e", "--requirement", "--constraint", "--editable"))


def _elsewhere(python: str, path: list[str]) -> Interpreter:
    """Another interpreter, with this process's folders of user code and without its folders of libraries."""
    own = own_interpreter()
    user_code = [folder for folder in [*own.path, *own.search_path] if not _has_libraries(Path(folder))]
    home = Path(python).parent.parent
    return Interpreter(
        python,
        path,
        list(dict.fromkeys(user_code)),
        {
            "PATH": os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)]),
            "VIRTUAL_ENV": str(home) if (home / "pyvenv.cfg").exists() else "",
        },
    )


def _has_libraries(folder: Path) -> bool:
    """Whether packages are installed in a folder, as in the site-packages of the system or of the user."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


_PROBE = """
import importlib.util, json, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if "lepton_airflow" not in missing:
    import lepton_airflow
print(json.dumps([missing, getattr(sys.modules.get("lepton_airflow"), "__version__", None)]))
"""


def _why_unfit(python: str) -> str | None:
    """Why a given interpreter cannot run the entry point; None when it can, and something else failed."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PROBE, "lepton_airflow", *ENTRY_POINT_NEEDS],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        missing, version = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    ours = lepton_airflow.__version__
    if missing:
        return (
            f"{python} has no {', '.join(missing)}: {python} -m pip install {' '.join(ENTRY_POINT_NEEDS)}, and --no-deps "
            f'{PACKAGE}=={ours}; or let Venv build an environment, such as Venv("drift").'
        )
    if version != ours:
        return f"{python} has lepton_airflow {version}, this worker {ours}: install {PACKAGE}=={ours} there."
    return None
