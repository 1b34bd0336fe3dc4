"""The contract of a stage: parameters as fields, ``run(run)`` that does the work, and what it may know of its run."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Artifact, RunIdentity, Window, split_pin
from lepton_airflow.errors import BadConfiguration, Preempted, did_you_mean
from lepton_airflow.sdk.closure import PACKAGE, package_digest, source_file
from lepton_airflow.sdk.code import code_digest, is_code
from lepton_airflow.sdk.values import is_union, typed
from lepton_airflow.store.files import Store, total_bytes

_F = typing.TypeVar("_F", bound=Callable[..., Any])


def once_a_class(function: _F) -> _F:
    """``functools.cache`` for functions of a class, which mypy believes to be unhashable."""
    return typing.cast("_F", cache(function))


# Markers for a field's meaning. To a type checker and to a caller they are plain strings.
# A URI, pinned or plain: its digest enters the cache key.
ArtifactUri = Annotated[str, "artifact"]
# "module:function", or a standard model's name: the digest of its source enters the cache key.
CodeRef = Annotated[str, "code"]
# The id of an Airflow Connection that the stage needs at run time.
ConnectionId = Annotated[str, "connection"]


@dataclass(frozen=True)
class Result:
    """What :meth:`Stage.run` returns; the receipt is made from it."""

    summary: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


@dataclass
class RunInfo:
    """What a stage may know about its run, and its only way to the store.

    :ivar workdir: an empty scratch directory, removed after the run.
    :ivar window: the half-open span of data time this run is about, or None; ``window_note`` says why it is None.
    :ivar connections: the Connections the stage declared, by id.
    :ivar refresh: the user asked that no result of an earlier run be used.
    :ivar should_stop: returns True once SIGTERM came.
    :ivar pins: by source, the version that this run found to be current, so that it reads the same one throughout.
    """

    store: Store
    workdir: Path
    run_key: str
    identity: RunIdentity = field(default_factory=RunIdentity)
    window: Window | None = None
    window_note: str = ""
    connections: Mapping[str, Connection] = field(default_factory=dict)
    cache_key: str | None = None
    refresh: bool = False
    should_stop: Callable[[], bool] = lambda: False
    pins: dict[str, Any] = field(default_factory=dict)

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
                f"AIRFLOW_CONN_{conn_id.upper()} for Airflow; {did_you_mean(conn_id, self.connections)}"
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
    """One stage of a model's life. Fields are parameters; every field is described by a ``:param`` line.

    :cvar cacheable: False for what changes the world outside the store: a registry, an endpoint.
    :cvar windowed: False where the result does not depend on the run's window: then the cache key does not either.
    :cvar measures_machine: True where something is measured on the machine: the CPU's model then enters the cache key.
    :cvar resumable: True for a stage that asks ``run.should_stop`` itself, so that SIGTERM loses no finished work.
    :cvar engines: distributions whose versions enter the cache key and the receipt.
    :cvar extra: the extra of lepton-airflow that brings them.
    :cvar links: names of the links that it returns: buttons of the task in Airflow's UI.
    :cvar outputs: names of the artifacts and values that it returns: its XCom keys.
    :cvar emits: name of the boolean value on which the task's ``AssetAlias`` outlets get an event.
    """

    cacheable: ClassVar[bool] = True
    windowed: ClassVar[bool] = True
    measures_machine: ClassVar[bool] = False
    resumable: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    links: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ()
    emits: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = typed(getattr(self, f.name), hints[f.name], f"{type(self).__name__}: {f.name}")
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
                elif marker == "code" and value.isidentifier() and source_file(f"{PACKAGE}.models.{value}"):
                    # It is loaded by name at run time, so the import scan cannot see it.
                    digests[key] = package_digest(f"{PACKAGE}.models.{value}")
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


@once_a_class
def _hints(stage: type[Stage]) -> dict[str, Any]:
    return typing.get_type_hints(stage, include_extras=True)


@once_a_class
def markers(stage: type[Stage]) -> dict[str, str]:
    """Which fields of a stage are artifacts, code or connections."""
    found = {f.name: _marker(_hints(stage)[f.name]) for f in fields(stage)}
    return {name: marker for name, marker in found.items() if marker}


@once_a_class
def choices(stage: type[Stage]) -> dict[str, tuple[Any, ...]]:
    """The values that each field takes, of those that take one of a few (``Literal``)."""
    found = {}
    for name, marked in _hints(stage).items():
        hint = marked.__origin__ if typing.get_origin(marked) is Annotated else marked
        options = typing.get_args(hint) if is_union(hint) else (hint,)
        if all(o is type(None) or typing.get_origin(o) is typing.Literal for o in options):
            found[name] = tuple(value for o in options for value in typing.get_args(o))
    return found


def _marker(hint: Any) -> str | None:
    if typing.get_origin(hint) is Annotated:
        return str(hint.__metadata__[0])
    return next((m for m in map(_marker, typing.get_args(hint)) if m), None)
