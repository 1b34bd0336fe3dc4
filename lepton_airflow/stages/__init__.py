"""What can be done to data and models: one file here is one stage of the lifecycle.

A stage is a keyword-only dataclass whose fields are its parameters (JSON values) and whose :meth:`Stage.run` does
the work. It knows no Airflow and no runner, so ``TrainModel(...).run(RunInfo.local(tmp_path))`` is all a test needs.
A new file with a :class:`Stage` in it is found by the door (``python -m lepton_airflow stages``) and gets its named
operator; a stage of your own package is found through the entry point group ``lepton_airflow.stages``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lepton_airflow.contract import Artifact, RunIdentity, Window, digest_of, split_pin
from lepton_airflow.errors import BadConfiguration, Preempted, did_you_mean
from lepton_airflow.store import Connection, Store

log = logging.getLogger(__name__)

# Markers for a field's meaning. To a type checker and to a caller they are plain strings.
ArtifactUri = Annotated[str, "artifact"]  # a URI, pinned or plain; its digest enters the cache key
CodeRef = Annotated[str, "code"]  # "module:function"; the digest of that module's source enters the cache key
ConnectionId = Annotated[str, "connection"]  # id of an Airflow Connection that the stage needs at run time


@dataclass(frozen=True)
class Result:
    """What :meth:`Stage.run` returns; the door makes the receipt of it."""

    summary: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


@dataclass
class RunInfo:
    """What a stage may know about its run, and its only way to the store.

    :ivar workdir: an empty scratch directory, removed after the run.
    :ivar window: the half-open span of data time this run is about, or None.
    :ivar connections: the Connections the stage declared, by id.
    """

    store: Store
    workdir: Path
    run_key: str
    identity: RunIdentity = field(default_factory=RunIdentity)
    window: Window | None = None
    window_note: str = ""  # why there is no window
    connections: Mapping[str, Connection] = field(default_factory=dict)
    cache_key: str | None = None
    refresh: bool = False  # the user asked that nothing finished earlier be reused
    should_stop: Callable[[], bool] = lambda: False  # True once SIGTERM came

    @classmethod
    def local(cls, directory: str | Path, **overrides: Any) -> RunInfo:
        """A run without Airflow, with its store and scratch space under ``directory``: for tests and notebooks."""
        directory = Path(directory)
        workdir = directory / "work"
        workdir.mkdir(parents=True, exist_ok=True)
        return cls(**{"store": Store(str(directory / "store")), "workdir": workdir, "run_key": "local"} | overrides)

    def save(self, name: str, content: Path | bytes | str) -> Artifact:
        """Put a file, a directory or bytes into the store under its digest; ``name`` is its last path segment."""
        return self.store.put(name, content)

    def fetch(self, uri: str) -> Path:
        """A local path of what ``uri`` names, a file or a directory, with its digest verified if it is pinned."""
        return self.store.fetch(uri, self.workdir)

    def connection(self, conn_id: str) -> Connection:
        """The Connection of that id; raises BadConfiguration when the request did not bring it."""
        if conn_id not in self.connections:
            raise BadConfiguration(
                f"Connection {conn_id!r} did not reach the stage: create it in Airflow (Admin, Connections) or set "
                f"AIRFLOW_CONN_{conn_id.upper()} for Airflow. {did_you_mean(conn_id, self.connections)}"
            )
        return self.connections[conn_id]

    def check_stop(self) -> None:
        """Raise :class:`Preempted` once the stage was asked to stop: call it between resumable steps."""
        if self.should_stop():
            raise Preempted("asked to stop (SIGTERM); what is finished is kept and the next try goes on from there.")


@dataclass(kw_only=True)
class Stage:
    """One stage of a model's life. Fields are parameters; every field is described by a ``:param`` line."""

    cacheable: ClassVar[bool] = True  # False for what changes the world outside the store (a registry, an endpoint)
    measures_machine: ClassVar[bool] = False  # True: the CPU model enters the cache key
    resumable: ClassVar[bool] = False  # True: asks run.should_stop itself, so that SIGTERM loses nothing
    engines: ClassVar[tuple[str, ...]] = ()  # distributions whose versions enter the cache key and the receipt
    extra: ClassVar[str] = ""  # the extra of lepton-airflow that brings them
    outputs: ClassVar[tuple[str, ...]] = ()  # names of the artifacts and values it returns: its XCom keys

    def run(self, run: RunInfo) -> Result:
        """Do the work."""
        raise NotImplementedError(f"{type(self).__name__} must define run(self, run)")

    def input_digests(self, run: RunInfo) -> dict[str, str] | None:
        """Digests of everything the result depends on besides the parameters; None: never reuse a result.

        By default the artifacts and the user code among the fields. Raises when an input does not exist.
        """
        digests: dict[str, str] = {}
        for name, marker in markers(type(self)).items():
            for index, value in enumerate(_flat(getattr(self, name))):
                key = f"{name}[{index}]"
                if marker == "artifact" and not is_inline(value):
                    digests[key] = split_pin(value)[1] or run.store.digest(value)
                elif marker == "code" and is_code(value):
                    digests[key] = code_digest(value)
        return digests

    def connection_ids(self) -> list[str]:
        """Ids of the Airflow Connections this stage needs: the fields of type ConnectionId that are set."""
        return [
            value
            for name, marker in markers(type(self)).items()
            if marker == "connection"
            for value in _flat(getattr(self, name))
        ]


def is_inline(value: str) -> bool:
    """Whether an artifact field holds a keyword such as ``infer`` rather than a location."""
    return not any(sign in value for sign in "/\\.:")


def _flat(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [text for item in items for text in _flat(item)]


@cache
def markers(stage: type[Stage]) -> dict[str, str]:
    """Which fields of a stage are artifacts, code or connections."""
    hints = typing.get_type_hints(stage, include_extras=True)
    found = {f.name: _marker(hints[f.name]) for f in fields(stage)}
    return {name: marker for name, marker in found.items() if marker}


def _marker(hint: Any) -> str | None:
    if typing.get_origin(hint) is Annotated:
        return str(hint.__metadata__[0])
    return next((m for m in map(_marker, typing.get_args(hint)) if m), None)


_CODE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def is_code(value: str) -> bool:
    """Whether a string is a reference ``module:function``."""
    return bool(_CODE.match(value))


def load_code(reference: str, wanted: str) -> Callable[..., Any]:
    """Import the user's function ``module:function``; raises BadConfiguration with what was looked for and where."""
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the user's module was found; something that it imports was not
        raise BadConfiguration(
            f"{wanted}={reference!r}: no module {module_name!r} where the stage runs. Put it beside the DAG file, "
            "in the plugins folder, or install it there."
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise BadConfiguration(
            f"{wanted}={reference!r}: module {module_name!r} has no function {attribute!r}; "
            f"{did_you_mean(attribute, names)}"
        )
    return typing.cast("Callable[..., Any]", function)


def code_digest(reference: str) -> str:
    """sha256 of the source of the package or module that ``module:function`` lives in; imports nothing of it."""
    module_name = reference.partition(":")[0]
    top = module_name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ in a notebook
        spec = None
    if spec is None or not spec.origin:
        raise BadConfiguration(f"{reference!r}: no module {top!r} where the stage runs.")
    origin = Path(spec.origin)
    sources = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return digest_of([[str(p.relative_to(origin.parent)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in sources])


@cache
def own_code_digest(stage: type[Stage]) -> str:
    """sha256 of the code a stage's result may depend on: its own package for a stage of another package;
    for ours everything but what only starts stages, so that a fix of an operator or a runner keeps the cache."""
    top = stage.__module__.partition(".")[0]
    if top != __name__.partition(".")[0]:
        return code_digest(f"{stage.__module__}:{stage.__name__}")
    package = Path(__file__).parent.parent
    stage_file = package.joinpath(*stage.__module__.split(".")[1:]).with_suffix(".py")
    shared = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in _NOT_STAGE_CODE]
    others = [p for p in shared if p.parent.name != "stages"]
    sources = sorted({stage_file, *others})
    return digest_of([[str(p.relative_to(package)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in sources])


_NOT_STAGE_CODE = frozenset(
    {"operators.py", "triggers.py", "plugin", "runners", "testing", "serving", "window.py", "__main__.py", "store.py"}
)


def versions(stage: type[Stage]) -> dict[str, str]:
    """Installed versions of a stage's engines; absent ones are left out, and the stage says so when it needs them."""
    found = {}
    for name in stage.engines:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cache_key(stage: Stage, run: RunInfo) -> str | None:
    """Name the result of a stage by all it depends on: code, engines, parameters, window, digests of inputs.

    None when some input has no digest, so that nothing may be reused.
    """
    inputs = stage.input_digests(run)
    if inputs is None:
        return None
    kind = type(stage)
    parameters = {f.name: getattr(stage, f.name) for f in fields(stage)}
    for name, marker in markers(kind).items():
        if marker == "artifact" and name in parameters:
            parameters[name] = _without_location(parameters[name])
    window = [run.window.start, run.window.end] if run.window else None
    machine = cpu_model() if kind.measures_machine else None
    return digest_of([kind.__name__, own_code_digest(kind), versions(kind), parameters, window, inputs, machine])


def _without_location(value: Any) -> Any:
    """The value with artifact URIs blanked: their digests count, where they lie does not."""
    if isinstance(value, str):
        return value if is_inline(value) else "@"
    if isinstance(value, Mapping):
        return {k: _without_location(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_location(v) for v in value]
    return value


def cpu_model() -> str:
    """The CPU's model name, as the kernel tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else os.uname().machine


@cache
def all_stages() -> dict[str, type[Stage]]:
    """Every stage by class name: the files of this package, then the entry points ``lepton_airflow.stages``."""
    found: dict[str, type[Stage]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__:
                found[value.__name__] = value
    for entry in importlib.metadata.entry_points(group="lepton_airflow.stages"):
        found[entry.name] = entry.load()
    return dict(sorted(found.items()))


def get_stage(name: str) -> type[Stage]:
    """The stage of that class name; raises BadConfiguration with the nearest known name."""
    stages = all_stages()
    if name not in stages:
        raise BadConfiguration(f"there is no stage {name!r}; {did_you_mean(name, stages)}")
    return stages[name]


def build(name: str, parameters: Mapping[str, Any]) -> Stage:
    """Make a stage from JSON parameters; raises BadConfiguration for unknown, missing or wrongly typed ones."""
    stage = get_stage(name)
    known = {f.name: f for f in fields(stage)}
    for key in parameters:
        if key not in known:
            raise BadConfiguration(f"{name} has no parameter {key!r}; {did_you_mean(key, known)}")
    missing = [k for k, f in known.items() if k not in parameters and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise BadConfiguration(f"{name} needs {', '.join(missing)}: python -m lepton_airflow describe {name}")
    hints = typing.get_type_hints(stage)
    values = {key: _typed(value, hints[key], f"{name}: {key}") for key, value in parameters.items()}
    return stage(**values)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Check a JSON value against a field's type; text from a template becomes the number or flag it spells."""
    if hint is Any or value is None and type(None) in typing.get_args(hint):
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    plain = [o for o in options if o is not type(None)]
    for option in plain:
        if _fits(value, option):
            return float(value) if option is float else value
    if isinstance(value, str):
        for option in plain:
            converted = _from_text(value, option)
            if converted is not None:
                return converted
        if type(None) in options and value in ("", "None"):
            return None
    names = " or ".join(_type_name(o) for o in options)
    raise BadConfiguration(f"{where}={value!r} is not {names}.")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, dict, str, bool):
        return isinstance(value, origin)
    return True


def _from_text(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    try:
        if origin is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if origin in (int, float):
            return origin(text)
        if origin in (list, dict):  # Jinja renders a dict as Python writes it
            value = ast.literal_eval(text)
            return value if isinstance(value, origin) else None
    except (KeyError, ValueError, SyntaxError):
        return None
    return None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a stage, as ``describe`` shows it."""

    name: str
    type: str
    default: str  # "required" when there is none
    unit: str  # from "[unit]" in the text; empty when the value has none
    text: str


def describe(stage: type[Stage]) -> list[Parameter]:
    """The parameters of a stage, from its fields and the ``:param`` lines of its docstring."""
    texts = param_texts(inspect.getdoc(stage) or "")
    result = []
    for f in fields(stage):
        default = f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING
        text = texts.get(f.name, "")
        unit = re.search(r"\[([^\]]+)\]", text)
        kind = re.sub(r"typing\.|^Annotated\[(.*)\]$", r"\1", f.type if isinstance(f.type, str) else str(f.type))
        result.append(
            Parameter(f.name, kind, "required" if default is MISSING else repr(default), unit[1] if unit else "", text)
        )
    return result


def param_texts(doc: str) -> dict[str, str]:
    """The ``:param name: text`` entries of a docstring, each with its continuation lines joined."""
    found = re.findall(r"^:param (\w+):\s*(.*(?:\n[ \t]+.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
