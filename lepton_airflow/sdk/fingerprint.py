"""The cache key: a stage's result named by all that it depends on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from lepton_airflow.contract import digest_of
from lepton_airflow.sdk.code import code_digest
from lepton_airflow.sdk.stage import RunInfo, Stage, is_inline, markers, once_a_class


@once_a_class
def own_code_digest(stage: type[Stage]) -> str:
    """sha256 of the code that a stage's result depends on: its module and all that this imports of its own package.

    A module of ours counts with the modules of this package that it imports, directly or through others
    (:func:`lepton_airflow.sdk.closure.closure`); a stage of another package with its own sources and the modules of ours
    that those import.
    """
    return code_digest(f"{stage.__module__}:{stage.__name__}")


def versions(stage: type[Stage]) -> dict[str, str]:
    """Installed versions of a stage's engines; absent ones are left out, and the stage says so when it needs them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in stage.engines:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cache_key(stage: Stage, run: RunInfo) -> str | None:
    """Name the result of a stage by all that it depends on; None when some input has no digest, so nothing may be reused."""
    parts = cache_key_parts(stage, run)
    return None if parts is None else digest_of(list(parts.values()))


def cache_key_parts(stage: Stage, run: RunInfo) -> dict[str, Any] | None:
    """What the cache key is made of, by name: of two runs that should be equal, the part that differs is why one missed.

    ``code`` is the digest of the stage's sources, ``engines`` the versions of the libraries it names, ``inputs`` the digests
    of its artifacts and of the user's code, ``machine`` the CPU's model for a stage that measures it. Where an artifact
    lies does not count. None when some input has no digest.
    """
    inputs = stage.input_digests(run)
    if inputs is None:
        return None
    kind = type(stage)
    parameters = {f.name: getattr(stage, f.name) for f in fields(stage)}
    for name, marker in markers(kind).items():
        if marker == "artifact" and name in parameters:
            parameters[name] = _without_location(parameters[name])
    return {
        "stage": kind.__name__,
        "code": own_code_digest(kind),
        "engines": versions(kind),
        "parameters": parameters,
        "window": [run.window.start, run.window.end] if run.window and kind.windowed else None,
        "inputs": inputs,
        "machine": cpu_model() if kind.measures_machine else None,
    }


def in_short(parts: Mapping[str, Any]) -> str:
    """The parts of a cache key in one line, to be compared with such a line of another run: eight digits each, ``-`` for none."""
    shown = {name: "-" if value is None else digest_of(value)[:8] for name, value in parts.items()}
    shown["code"] = parts["code"][:8]  # a digest already
    return " ".join(f"{name}={digits}" for name, digits in shown.items() if name != "stage")


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
