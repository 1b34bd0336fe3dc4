"""The boundary between Airflow and a stage: a Request goes in, a Receipt comes out.

Standard library only, so that any interpreter, container or other program can take part. Both are JSON with a
protocol number; a number newer than :data:`PROTOCOL` is refused by name, an older one is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from lepton_airflow.errors import ContractError

PROTOCOL = 1
# A receipt travels through XCom, which is a row of Airflow's database.
MAX_RECEIPT_BYTES = 8192

# XCom keys of every receipt; no artifact or value may take them.
RESERVED = frozenset({"return_value", "metrics"})

_PIN = re.compile(r"^(?P<uri>.+)@sha256:(?P<digest>[0-9a-f]{64})$", re.DOTALL)


def pin(uri: str, sha256: str) -> str:
    """Join a URI and the digest of what it names: ``s3://b/train.parquet@sha256:…``."""
    return f"{uri}@sha256:{sha256}"


def split_pin(uri: str) -> tuple[str, str | None]:
    """Split a pinned URI; the digest is None when there is none.

    Only a trailing ``@sha256:`` and 64 hex digits is a pin, so ``user@host`` and the like stay whole.
    """
    match = _PIN.match(uri)
    return (match["uri"], match["digest"]) if match else (uri, None)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()  # raises for half a surrogate pair, see _json
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"a value cannot travel as JSON: {error}. Pass strings, numbers, lists, dicts."
        ) from None
    return text


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def run_key(*, deployment: str, dag_id: str, task_id: str, run_id: str, map_index: int = -1) -> str:
    """Name what one task instance owns (its receipt, study, registered version); the same on every try."""
    return digest_of([deployment, dag_id, task_id, run_id, map_index])[:24]


@dataclass(frozen=True)
class Artifact:
    """Something in the store: its pinned URI, digest and size in bytes."""

    uri: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Window:
    """The half-open span of data time ``[start, end)`` that a run is about, as ISO 8601 with a UTC offset."""

    start: str
    end: str


@dataclass(frozen=True)
class RunIdentity:
    """Which task instance asks; shown in the UI, the registry and the ledger."""

    deployment: str = "local"
    dag_id: str = "local"
    task_id: str = "local"
    run_id: str = "local"
    map_index: int = -1
    try_number: int = 1
    run_type: str = "manual"  # scheduled, manual, backfill, asset_triggered, asset_materialization


@dataclass(frozen=True)
class Request:
    """What to run: a stage with its parameters, for which run, over which window, into which store."""

    stage: str
    parameters: dict[str, Any]
    store: str
    identity: RunIdentity = field(default_factory=RunIdentity)
    window: Window | None = None
    window_note: str = ""  # why there is no window, for the stage that needs one
    cache: str = "use"  # use: take a hit; refresh: run again and record; off: neither look nor record
    cache_ttl_s: float | None = None  # a hit older than this is a miss; None: entries do not age
    store_connection: str | None = None  # id of the Connection that opens the store; None: ambient identity
    connections: tuple[str, ...] = ()  # ids of all Connections this request needs; never their contents
    nonce: str = ""  # drawn at each start of the stage; the receipt repeats it, which proves that it answers this start
    protocol: int = PROTOCOL

    @property
    def run_key(self) -> str:
        """The name of what this task instance owns."""
        i = self.identity
        return run_key(
            deployment=i.deployment,
            dag_id=i.dag_id,
            task_id=i.task_id,
            run_id=i.run_id,
            map_index=i.map_index,
        )

    def to_json(self) -> str:
        """The request as JSON text; raises :class:`ContractError` when a parameter is no JSON value."""
        return _json(
            asdict(self),
            f"request of {self.stage}",
            "Pass strings, numbers, lists and dicts; None for no number.",
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Request:
        """Read a request; raises :class:`ContractError` on a newer protocol or a wrong shape."""
        record = _record(text, "request")
        request = _build(cls, record, "request")
        if request.cache not in ("use", "refresh", "off"):
            raise ContractError(f"request: cache={request.cache!r} is not one of 'use', 'refresh', 'off'.")
        return request


@dataclass(frozen=True)
class Receipt:
    """What a stage did: artifacts, values, metrics and one sentence; also written when it failed."""

    stage: str
    run_key: str
    cache_key: str | None
    status: str  # done, cached, skipped, refused (80: do not retry), preempted, failed
    summary: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # wall time of the stage; of the run that computed it, when cached
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""  # ISO 8601, UTC
    error: dict[str, Any] | None = None  # {"kind", "message", "exit_code"}
    nonce: str = ""  # that of the request this answers
    protocol: int = PROTOCOL

    def to_json(self) -> str:
        """The receipt as JSON text; raises :class:`ContractError` above 8 KB or on a reserved or double name."""
        double = sorted(
            (set(self.artifacts) & set(self.values)) | (RESERVED & (set(self.artifacts) | set(self.values)))
        )
        if double:
            raise ContractError(
                f"receipt of {self.stage}: {', '.join(double)} names both an artifact and a value, or is reserved; "
                "each output is one XCom key, so rename one."
            )
        text = _json(
            asdict(self),
            f"receipt of {self.stage}",
            "Outputs must be JSON; a metric without a value is null, not NaN.",
        )
        if len(text.encode()) > MAX_RECEIPT_BYTES:
            sizes = {k: len(json.dumps(v)) for k, v in asdict(self).items()}
            largest = max(sizes, key=lambda k: sizes[k])
            raise ContractError(
                f"receipt of {self.stage} has {len(text.encode())} bytes, the limit is {MAX_RECEIPT_BYTES} "
                f"({largest!r} alone has {sizes[largest]}): save bulk as an artifact and return its URI."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain dicts, as it travels through XCom."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """Read a receipt; raises :class:`ContractError` on a newer protocol or a wrong shape."""
        record = _record(text, "receipt")
        try:
            record["artifacts"] = {
                name: Artifact(**item) for name, item in record.get("artifacts", {}).items()
            }
        except (TypeError, AttributeError) as error:
            raise ContractError(f"receipt: an artifact is not {{uri, sha256, bytes}}: {error}.") from None
        for name, artifact in record["artifacts"].items():
            if not (
                isinstance(artifact.uri, str)
                and isinstance(artifact.sha256, str)
                and isinstance(artifact.bytes, int)
            ):
                raise ContractError(f"receipt: artifact {name!r} is misshapen: {artifact!r}.")
        return _build(cls, record, "receipt")


_T = TypeVar("_T", Request, Receipt)

# What a field must be where a wrong type would go unnoticed until something else breaks on it.
_SHAPES: dict[str, tuple[type, ...]] = {
    "stage": (str,),
    "parameters": (dict,),
    "store": (str,),
    "identity": (RunIdentity,),
    "window": (Window, type(None)),
    "connections": (tuple,),
    "run_key": (str,),
    "nonce": (str,),
    "artifacts": (dict,),
    "values": (dict,),
    "error": (dict, type(None)),
    "status": (str,),
    "summary": (str,),
    "cache_key": (str, type(None)),
    "created": (str,),
    "seconds": (int, float),
    "metrics": (dict,),
    "links": (dict,),
    "versions": (dict,),
}


def _json(value: Any, what: str, advice: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # raises for a lone surrogate, which a file name that is not UTF-8 contains: JSON cannot hold it
    except (TypeError, ValueError) as error:
        raise ContractError(f"{what}: {error}. {advice}") from None
    return text


def _record(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"the {what} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise ContractError(f"the {what} is a JSON {type(record).__name__}, expected an object.")
    if "protocol" not in record:
        raise ContractError(f'the {what} names no protocol: add "protocol": {PROTOCOL}.')
    protocol = record["protocol"]
    if type(protocol) is not int or protocol < 1:
        raise ContractError(
            f"the {what} has protocol {protocol!r}, expected a whole number from 1 to {PROTOCOL}."
        )
    if protocol > PROTOCOL:
        raise ContractError(
            f"the {what} speaks protocol {protocol}, this lepton_airflow knows up to {PROTOCOL}: "
            "upgrade lepton_airflow where the stage runs."
        )
    return record


def _build(cls: type[_T], record: dict[str, Any], what: str) -> _T:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(record) - known)
    if unknown:
        raise ContractError(
            f"the {what} has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}."
        )
    record = dict(record)
    missing = [
        f.name
        for f in fields(cls)
        if f.name not in record and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ContractError(
            f"the {what} has no {', '.join(map(repr, missing))}; known: {', '.join(sorted(known))}."
        )
    try:
        if isinstance(record.get("window"), dict):
            record["window"] = Window(**record["window"])
        if isinstance(record.get("identity"), dict):
            record["identity"] = RunIdentity(**record["identity"])
        if isinstance(record.get("connections"), list):
            record["connections"] = tuple(record["connections"])
        built = cls(**record)
    except TypeError as error:
        raise ContractError(f"the {what} is incomplete or misshapen: {error}.") from None
    for name, value in record.items():
        if not isinstance(value, _SHAPES.get(name, (object,))):
            raise ContractError(
                f"the {what} is misshapen: {name}={value!r} has the wrong type, {type(value).__name__}."
            )
    return built
