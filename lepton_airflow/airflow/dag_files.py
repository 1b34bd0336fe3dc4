"""Files beside the DAG file: what ``./`` and ``../`` in an operator's arguments name, where the stage runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from lepton_airflow.airflow.connections import connection_of
from lepton_airflow.errors import BadConfiguration
from lepton_airflow.store.files import Store


def resolved(value: Any, folder: str, place: Callable[[str], str]) -> Any:
    """The value with paths that start with ``./`` or ``../`` taken from the DAG file's folder, at any depth.

    Airflow brings what a mapped task pushed as a lazy sequence; it becomes a list. A date or time, as templates give it with
    ``render_template_as_native_obj``, becomes its ISO 8601 text, in UTC if it has an offset.

    :param place: turns such a path on the worker into what the stage is given.
    """
    if isinstance(value, str) and value.startswith(("./", "../")) and folder:
        return place(os.path.normpath(os.path.join(folder, value)))
    if isinstance(value, datetime) and value.tzinfo:
        return value.astimezone(UTC).isoformat()
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {k: resolved(v, folder, place) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [resolved(v, folder, place) for v in value]
    return value


def on_worker(path: str) -> str:
    """The path itself, for a stage that sees the worker's files."""
    return path


@dataclass
class Uploads:
    """Puts files beside the DAG into the store and gives their pinned URIs, for a stage that does not see the worker's files.

    :ivar connection: id of the Connection that opens the store; None: ambient identity.
    """

    store: str
    connection: str | None
    _opened: Store | None = None

    def __call__(self, path: str) -> str:
        if not os.path.exists(path):
            raise BadConfiguration(
                f"there is no file {path} beside the DAG, and where this stage runs the worker's files are not seen: name "
                "one that is there (no pattern), or a URI that the stage can read."
            )
        if self._opened is None:
            self._opened = Store(self.store, connection_of(self.connection) if self.connection else None)
        return self._opened.put(os.path.basename(path), Path(path)).uri
