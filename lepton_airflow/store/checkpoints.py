"""Checkpoints in the store: a fit that is killed loses at most the work since its last one.

Layout under the key of a fit (run key, digest of all that the fit depends on, name of the fit)::

    <step>-<random>/…       the files of one checkpoint
    <step>-<random>.json    its step, its digest and what was reported before it; written when its files are there
    latest                  the name of the newest; written last, in one piece

So ``latest`` names a complete checkpoint whenever the fit is killed. The two newest are kept: if the bytes of one do not have
their digest, the one before it is used.
"""

from __future__ import annotations

import json
import logging
import operator
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lepton_airflow.contract import pin
from lepton_airflow.errors import BadConfiguration, BadInput, IntegrityError, LeptonError
from lepton_airflow.store.files import Store, digest_path

log = logging.getLogger(__name__)

_KEPT = 2  # the newest, and the one before it in case that is damaged


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back and verified.

    :ivar step: the step after which it was written.
    :ivar path: a directory with the files that were written then; read-only.
    :ivar notes: what the package stored with it.
    """

    step: int
    path: Path
    notes: Mapping[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one fit: uploaded while the fit goes on, read back by the next try.

    :param key: where they lie in the store.
    :param directory: local scratch space, for what is not yet in the store.
    :param every_s: time between two checkpoints [seconds]; 0: every one that is offered is stored.
    """

    def __init__(self, store: Store, key: str, directory: Path, every_s: float) -> None:
        self.store, self.key, self.directory, self.every_s = store, key, directory, every_s
        self._names: list[str] = []  # in the store, oldest first
        self._fetched: Path | None = None
        self._written = time.monotonic()
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[bool] | None = None

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint of an earlier try, verified, or None. A damaged one is skipped with a warning.

        :raises StoreError: the store does not answer. Starting from the beginning instead would throw work away.
        """
        keys = [key[len(self.key) + 1 :] for key in self.store.keys(self.key)]
        whole = sorted(key.removesuffix(".json") for key in keys if "/" not in key and key.endswith(".json"))
        broken_off = sorted({key.partition("/")[0] for key in keys if "/" in key} - set(whole))
        self._names = broken_off + whole
        named = (self.store.read(f"{self.key}/latest") or b"").decode(errors="replace")
        for name in sorted(whole, key=lambda name: (name == named, name), reverse=True):
            try:
                found = self._read(name)
            except (IntegrityError, BadInput, ValueError, KeyError, TypeError) as error:
                why = "its bytes are not those of its digest" if isinstance(error, IntegrityError) else error
                log.warning("checkpoint %s is damaged, so the one before it is used: %s", name, why)
                self._names.remove(name)
                self._names.insert(0, name)  # so that it is removed first
                continue
            self._written = time.monotonic()
            return found
        return None

    def _read(self, name: str) -> Checkpoint:
        record = json.loads(self.store.read(f"{self.key}/{name}.json") or b"")
        uri = pin(self.store.uri(f"{self.key}/{name}"), record["sha256"])
        path = self.store.fetch(uri, self.directory)
        if path.is_relative_to(self.directory):
            self._fetched = path
        return Checkpoint(int(record["step"]), path, dict(record["notes"]))

    def due(self) -> bool:
        """Whether it is time for the next one; not while the last one is still being uploaded."""
        on_its_way = self._upload is not None and not self._upload.done()
        return not on_its_way and time.monotonic() - self._written >= self.every_s

    def save(
        self, step: int, write: Callable[[Path], object], notes: Mapping[str, Any], *, wait: bool = False
    ) -> bool:
        """Have ``write(folder)`` write a checkpoint, and upload it while the fit goes on.

        If the upload fails, that is a warning only: the checkpoint before it stays, and the next one is uploaded when it is due.

        :param wait: return only when the upload has ended.
        :returns: False when ``wait`` was set and the upload failed.
        """
        try:
            step = operator.index(step)  # numpy's integers too, which JSON does not take
        except TypeError:
            raise BadConfiguration(
                f"save_checkpoint: step={step!r}, expected a whole number: how many steps are done."
            ) from None
        self.settle()
        name = f"{step:012d}-{secrets.token_hex(4)}"
        folder = self.directory / name
        folder.mkdir(parents=True)
        write(folder)
        if not any(path.is_file() for path in folder.rglob("*")):
            raise BadConfiguration(
                f"save_checkpoint: write(folder) at step {step} left no file in the folder it was given; write all that the "
                "next try needs into that folder."
            )
        self._upload = self._uploads.submit(self._keep, name, folder, step, dict(notes))
        self._written = time.monotonic()
        return self.settle() if wait else True

    def _keep(self, name: str, folder: Path, step: int, notes: dict[str, Any]) -> bool:
        try:
            sha256, size = digest_path(folder)
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                self.store.write(f"{self.key}/{name}/{path.relative_to(folder).as_posix()}", path)
            record = {"step": step, "sha256": sha256, "bytes": size, "notes": notes}
            self.store.write(f"{self.key}/{name}.json", json.dumps(record).encode())
            self.store.write(f"{self.key}/latest", name.encode())
            self._names.append(name)
            for old in self._names[:-_KEPT]:
                self.store.delete(f"{self.key}/{old}.json")
                self.store.delete(f"{self.key}/{old}")
            del self._names[:-_KEPT]
        except (LeptonError, OSError) as error:
            log.warning("the checkpoint of step %d may not be kept, the one before it is: %s", step, error)
            if name not in self._names:
                self._names.insert(0, name)  # so that its files are removed first: there may be no room left
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if self._fetched is not None:
            shutil.rmtree(self._fetched, ignore_errors=True)
            self._fetched = None
        return True

    def settle(self) -> bool:
        """Wait until the upload has ended; False when it failed."""
        return self._upload is None or self._upload.result()

    def close(self) -> None:
        """End the thread that uploads, once its upload has ended."""
        self._uploads.shutdown(wait=True)

    def drop(self) -> None:
        """Remove them all: the fit is finished."""
        self.settle()
        self.store.delete(self.key)
