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
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
import re
import sysconfig
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lepton_airflow.contract import Artifact, RunIdentity, Window, digest_of, split_pin
from lepton_airflow.errors import BadConfiguration, Preempted, did_you_mean
from lepton_airflow.store import Connection, Store, total_bytes

log = logging.getLogger(__name__)

_F = typing.TypeVar("_F", bound=Callable[..., Any])


def _once_a_class(function: _F) -> _F:
    """``functools.cache`` for functions of a class, which mypy believes to be unhashable."""
    return typing.cast("_F", cache(function))


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
    pins: dict[str, Any] = field(default_factory=dict)  # what this run found to be current, by source

    @classmethod
    def local(cls, directory: str | Path, **overrides: Any) -> RunInfo:
        """A run without Airflow, with its store and scratch space under ``directory``: for tests and notebooks."""
        directory = Path(directory)
        workdir = directory / "work"
        workdir.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "store": Store(str(directory / "store")),
            "workdir": workdir,
            "run_key": "local",
        }
        return cls(**values | overrides)

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

    def need_window(self, what: str) -> Window:
        """The run's window; raises BadConfiguration when there is none: ``what`` needs it, and why it is missing."""
        if self.window is None:
            why = f" Why it has none: {self.window_note}." if self.window_note else ""
            raise BadConfiguration(
                f"{what}, and this run has no window: run it on a schedule with data intervals, or give the window as "
                f"run parameters.{why}"
            )
        return self.window

    def check_stop(self) -> None:
        """Raise :class:`Preempted` once the stage was asked to stop: call it between resumable steps."""
        if self.should_stop():
            raise Preempted(
                "asked to stop (SIGTERM); what is finished is kept and the next try goes on from there."
            )


@dataclass(kw_only=True)
class Stage:
    """One stage of a model's life. Fields are parameters; every field is described by a ``:param`` line."""

    cacheable: ClassVar[bool] = (
        True  # False for what changes the world outside the store (a registry, an endpoint)
    )
    windowed: ClassVar[bool] = (
        True  # False: the result does not depend on the run's window, so neither does the cache key
    )
    measures_machine: ClassVar[bool] = False  # True: the CPU model enters the cache key
    resumable: ClassVar[bool] = False  # True: asks run.should_stop itself, so that SIGTERM loses nothing
    engines: ClassVar[
        tuple[str, ...]
    ] = ()  # distributions whose versions enter the cache key and the receipt
    extra: ClassVar[str] = ""  # the extra of lepton-airflow that brings them
    links: ClassVar[
        tuple[str, ...]
    ] = ()  # names of the links it returns: buttons of the task in Airflow's UI
    outputs: ClassVar[tuple[str, ...]] = ()  # names of the artifacts and values it returns: its XCom keys
    emits: ClassVar[str] = ""  # name of the boolean value on which the task's AssetAlias outlets get an event

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = _typed(getattr(self, f.name), hints[f.name], f"{type(self).__name__}: {f.name}")
            setattr(self, f.name, value)

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

    def bytes_to_digest(self, store: Store) -> int | None:
        """How much :meth:`input_digests` would read [bytes]; None: other than a few local files, or nobody knows."""
        values = [
            value
            for name, marker in markers(type(self)).items()
            if marker == "artifact"
            for value in _flat(getattr(self, name))
            if not is_inline(value)
        ]
        sizes = [0 if split_pin(value)[1] else store.local_bytes(value) for value in values]
        return total_bytes(sizes) if values else None

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
    if not isinstance(value, (Mapping, list, tuple)):
        return [str(value)]
    # By name: the order in which a dict was written changes no result.
    items = [value[name] for name in sorted(value)] if isinstance(value, Mapping) else value
    return [text for item in items for text in _flat(item)]


@_once_a_class
def _hints(stage: type[Stage]) -> dict[str, Any]:
    return typing.get_type_hints(stage, include_extras=True)


@_once_a_class
def markers(stage: type[Stage]) -> dict[str, str]:
    """Which fields of a stage are artifacts, code or connections."""
    found = {f.name: _marker(_hints(stage)[f.name]) for f in fields(stage)}
    return {name: marker for name, marker in found.items() if marker}


@_once_a_class
def choices(stage: type[Stage]) -> dict[str, tuple[Any, ...]]:
    """The values that each field takes, of those that take one of a few (``Literal``)."""
    found = {}
    for name, marked in _hints(stage).items():
        hint = marked.__origin__ if typing.get_origin(marked) is Annotated else marked
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        if all(o is type(None) or typing.get_origin(o) is typing.Literal for o in options):
            found[name] = tuple(value for o in options for value in typing.get_args(o))
    return found


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


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
        if error.name and module_name != error.name and not module_name.startswith(error.name + "."):
            raise  # the user's module was found; something that it imports was not
        raise BadConfiguration(
            f"{wanted}={reference!r}: no module {error.name!r} where the stage runs. Put it beside the DAG file; for a pod, "
            "into the image, on PYTHONPATH."
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        package = module_name.partition(".")[
            0
        ]  # what it re-exports is its own; what it imports from elsewhere is not
        functions = {n: v for n, v in vars(module).items() if inspect.isfunction(v)}
        names = [n for n, v in functions.items() if v.__module__.partition(".")[0] == package]
        raise BadConfiguration(
            f"{wanted}={reference!r}: module {module_name!r} has no function {attribute!r}; "
            f"{did_you_mean(attribute, names)}"
        )
    return typing.cast("Callable[..., Any]", function)


def code_digest(reference: str) -> str:
    """sha256 of the source that ``module:function`` is made of: its module or package, and all it imports from beside it.

    Of an installed library only its own files count. Nothing of it is imported.
    """
    top = reference.partition(":")[0].partition(".")[0]
    folder = _folder_of(top)
    if folder is None:
        raise BadConfiguration(
            f"{reference!r}: no module {top!r} where the stage runs. Put it beside the DAG file; for a pod, into the image, on "
            "PYTHONPATH."
        )
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    todo, seen = [top], {top}
    found: dict[str, str] = {}
    while todo:
        for file in _sources(folder, todo.pop()):
            source = file.read_bytes()
            found[str(file.relative_to(folder))] = hashlib.sha256(source).hexdigest()
            if folder not in installed:
                beside = {
                    name
                    for name in _imports(source)
                    if (folder / name).exists() or (folder / f"{name}.py").exists()
                }
                todo += sorted(beside - seen)
                seen |= beside
    return digest_of(sorted(found.items()))


def _folder_of(top: str) -> Path | None:
    """The folder on ``sys.path`` that holds a top-level module or package."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ in a notebook
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:  # a package, with or without __init__.py
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(spec.origin).parent if spec.has_location and spec.origin else None


def _sources(folder: Path, top: str) -> list[Path]:
    package = folder / top
    return sorted(package.rglob("*.py")) if package.is_dir() else [folder / f"{top}.py"]


def _imports(source: bytes) -> set[str]:
    """Top-level names that a module's source imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # whoever imports it is told
        return set()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    whole = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in plain | whole} - {""}


@_once_a_class
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
    return digest_of(
        [[str(p.relative_to(package)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in sources]
    )


_NOT_STAGE_CODE = frozenset(
    {
        "operators.py",
        "triggers.py",
        "plugin",
        "pods",
        "runners",
        "testing",
        "serving",
        "window.py",
        "__main__.py",
        "store.py",
        "processes.py",
        "environments.py",
        "settings.py",
    }
)


def versions(stage: type[Stage]) -> dict[str, str]:
    """Installed versions of a stage's engines; absent ones are left out, and the stage says so when it needs them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in stage.engines:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
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
    window = [run.window.start, run.window.end] if run.window and kind.windowed else None
    machine = cpu_model() if kind.measures_machine else None
    return digest_of(
        [kind.__name__, own_code_digest(kind), versions(kind), parameters, window, inputs, machine]
    )


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
    from importlib.metadata import entry_points  # costs a process of a stage 20 ms

    for entry in entry_points(group="lepton_airflow.stages"):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # noqa: BLE001 - one broken package must not break every DAG
            log.warning("stage %s of %s is left out: %r", entry.name, entry.value, error)
    return dict(sorted(found.items()))


def get_stage(name: str) -> type[Stage]:
    """The stage of that class name, or your own as ``module:Class``; raises BadConfiguration with the nearest known name."""
    if ":" in name:
        found = load_code(name, "stage")
        if not (isinstance(found, type) and issubclass(found, Stage)):
            raise BadConfiguration(f"stage={name!r} is no subclass of lepton_airflow.stages.Stage.")
        return found
    own = _own_module(name)
    if name.isidentifier() and importlib.util.find_spec(own):
        alone: Any = getattr(importlib.import_module(own), name, None)
        if isinstance(alone, type) and issubclass(alone, Stage):
            return alone
    stages = all_stages()
    if name not in stages:
        raise BadConfiguration(f"there is no stage {name!r}; {did_you_mean(name, stages)}")
    return stages[name]


def _own_module(name: str) -> str:
    # The file of a stage of ours is named after it: importing that one alone saves every task a tenth of a second.
    return f"{__name__}.{re.sub(r'(?<!^)(?=[A-Z])', '_', name).lower()}"


def stage_name(stage: type[Stage]) -> str:
    """The name by which :func:`get_stage` finds a stage wherever it runs: its own, or ``module:Class``."""
    if stage.__module__ == _own_module(stage.__name__):
        return stage.__name__
    for name, known in all_stages().items():
        if known is stage:
            return name
    name = f"{stage.__module__}:{stage.__qualname__}"
    # Airflow imports a DAG file under a made-up name, which no other process can import.
    if not is_code(name) or stage.__module__ == "__main__" or stage.__module__.startswith("unusual_prefix_"):
        raise BadConfiguration(
            f"stage {stage.__qualname__} is defined where no other process can import it ({stage.__module__}): put the "
            "class at the top level of a module beside the DAG file."
        )
    return name


def build(name: str, parameters: Mapping[str, Any]) -> Stage:
    """Make a stage from JSON parameters; raises BadConfiguration for unknown, missing or wrongly typed ones."""
    stage = get_stage(name)
    known = {f.name: f for f in fields(stage)}
    for key in parameters:
        if key not in known:
            raise BadConfiguration(f"{name} has no parameter {key!r}; {did_you_mean(key, known)}")
    missing = [
        k
        for k, f in known.items()
        if k not in parameters and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise BadConfiguration(f"{name} needs {', '.join(missing)}: python -m lepton_airflow describe {name}")
    return stage(**parameters)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Check a JSON value against a field's type; text from a template becomes the number or flag it spells."""
    optional = type(None) in typing.get_args(hint)
    if hint is Any or (optional and value is None):
        return value
    if optional and value == "None":  # Jinja renders None as Python writes it
        return None
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    plain = [o for o in options if o is not type(None)]
    for option in plain:
        if _fits(value, option):
            return float(value) if option is float else value
    if isinstance(value, str):
        for option in plain:
            converted = _from_text(value, option)
            if converted is not None:
                return converted
        if optional and not value:
            return None
    names = " or ".join(_type_name(o) for o in options)
    advice = " Pass its .uri." if isinstance(value, Artifact) else ""
    raise BadConfiguration(f"{where}={value!r} is not {names}.{advice}")


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
        if origin in (list, dict):
            value = _literal(text)
            return value if isinstance(value, origin) else None
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError):
        return None
    return None


def _literal(text: str) -> Any:
    """What a text spells: JSON (``{{ x | tojson }}``), or Python as Jinja renders a list or a dict."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


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
        default = (
            f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else MISSING
        )
        text = texts.get(f.name, "")
        unit = re.search(r"\[([^\]]+)\]", text)
        kind = re.sub(
            r"typing\.|^Annotated\[(.*)\]$", r"\1", f.type if isinstance(f.type, str) else str(f.type)
        )
        result.append(
            Parameter(
                f.name,
                kind,
                "required" if default is MISSING else repr(default),
                unit[1] if unit else "",
                text,
            )
        )
    return result


def param_texts(doc: str) -> dict[str, str]:
    """The ``:param name: text`` entries of a docstring, each with its continuation lines joined."""
    found = re.findall(r"^:param (\w+):\s*(.*(?:\n[ \t]+.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
