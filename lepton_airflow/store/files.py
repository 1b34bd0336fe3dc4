"""Artifacts by URI and digest, and small records: atomic, on any fsspec file system.

Layout under the root::

    artifacts/<first 32 hex digits of the digest>/<name>     a file, or a directory of files
    receipts/<run key>.json                                  what the task instance last did
    cache/<stage>/<cache key>.json                           the receipt that a hit returns (cache.py)
    records/…                                                what was decided; keeps the artifacts it names (records.py)
    checkpoints/<run key>/…                                  from where the next try of a fit resumes (checkpoints.py)
    studies/<run key>….db                                    the same for TuneModel, where the store is a local directory
    leases/<key>/…                                           whose turn it is (lease.py)
    index/names.json                                         what eviction has read before (eviction.py)
    sweeping/<key>                                           what eviction is looking at (eviction.py)
    identity                                                 what tells this store from another (identity.py)
    schemas/<task>.json                                      the types that IngestData found in a task's last run

The path of an artifact holds its digest, so writing it again writes the same bytes: concurrent writers do no harm,
and the next run that makes an artifact repairs one that was altered.

Every stage imports this module, so its text is part of every cache key. What only some stages need is in the modules
beside it.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from lepton_airflow.connections import AwsAccess, Connection
from lepton_airflow.contract import Artifact, Receipt, digest_of, pin, split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, ContractError, IntegrityError, StoreError

log = logging.getLogger(__name__)

AT_ONCE = 16  # calls of the store that wait for it at the same time
_CHUNK = 1 << 20  # bytes
_WRITER = "lepton-writer"  # metadata of an object that is created exactly once: who created it
_MANY_FILES = 1000  # looking at more takes longer than starting a process
# s3fs tries a request to S3 five times. Each try waits this long for a connection. With its default of 5 s, a fit failed when
# the network lost all packets for half a minute. A connection that is refused fails after ten seconds, as with the default.
_CONNECT_S = 15
# Object stores show an object only when its upload is complete, so they need no temporary name.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})
_TEMPORARY = ".tmp-"  # begins the name of what is still being written
_SWEEP_S = 30.0  # after which a mark of eviction is one that a killed process left

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Listed:
    """A file in a listing; on a local disk also a folder, whose key ends with a slash.

    :ivar bytes: its size; -1 where the file system does not tell.
    :ivar modified: when it was last written [seconds since 1970].
    :ivar etag: changes whenever the content does; None where the file system has none.
    """

    key: str
    bytes: int
    modified: float
    etag: str | None = None


class Store:
    """An artifact store at a URI.

    :param root: an fsspec URI or a local path; a relative path is taken from the current directory.
    :param connection: opens the store (S3 keys, …); None: ambient identity.
    """

    def __init__(self, root: str, connection: Connection | None = None) -> None:
        import fsspec

        if "://" not in root:
            root = _file_uri(root)
        self.connection = connection
        self.protocol = root.partition("://")[0]
        try:
            self.fs, self._root = fsspec.core.url_to_fs(root, **_storage_options(self.protocol, connection))
        except (ValueError, ImportError) as error:
            expected = "Expected a path or an fsspec URI."
            if self.protocol == "s3" and isinstance(error, ImportError):
                expected = "S3 needs the extra s3: pip install 'lepton-airflow[s3]'."
            raise BadConfiguration(f"store {root!r} cannot be opened: {error}. {expected}") from None
        self._root = self._root.rstrip("/")
        # By default s3fs asks for the size first, in order to read a large object in parts. For a small record that is a
        # second request, so read() switches it off where s3fs has the switch.
        named = inspect.signature(self.fs.cat_file).parameters
        self._in_one_request = {"max_concurrency": 1} if "max_concurrency" in named else {}
        self.root = _file_uri(self._root) if self.is_local else f"{self.protocol}://{self._root}"

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    @property
    def is_local(self) -> bool:
        """Whether this is a directory, and no object store."""
        return self.protocol in ("file", "local")

    # -- artifacts ---------------------------------------------------------------------------------------------------

    def put(self, name: str, content: Path | bytes | str) -> Artifact:
        """Store a file, a directory or bytes; the same content always gets the same URI."""
        if not name or "/" in name or name in (".", ".."):
            raise BadConfiguration(f"{name!r} is not a name for an artifact: expected one path segment.")
        if isinstance(content, str):
            content = content.encode()
        sha256, size = _digest_bytes(content) if isinstance(content, bytes) else digest_path(content)
        key = f"artifacts/{sha256[:32]}/{name}"
        with self._errors(f"writing {key}"):
            if isinstance(content, bytes):
                self._write(key, content)
            elif content.is_dir():
                self._write_tree(key, content)
            else:
                self._write(key, content)
        return Artifact(uri=pin(self.uri(key), sha256), sha256=sha256, bytes=size)

    def fetch(self, uri: str, workdir: Path) -> Path:
        """A local path of what a URI names, with its digest verified when the URI is pinned.

        :raises IntegrityError: the bytes are not those of the pin.
        :raises BadInput: there is nothing at the URI.
        """
        plain, wanted = split_pin(uri)
        fs, path = self._resolve(plain)
        with self._errors(f"reading {plain}"):
            if not fs.exists(path):
                where = (
                    " The store is a folder: workers on several machines need [lepton] store to be one that all reach."
                    if self.is_local and path.startswith(self._root + "/")
                    else ""
                )
                raise BadInput(
                    f"{plain} does not exist; expected an artifact or a file there. Run what makes it again.{where}"
                )
            if _is_local(fs):
                local = Path(path)
            else:
                folder = workdir / "fetched" / hashlib.sha256(uri.encode()).hexdigest()[:16]
                local = folder / path.rstrip("/").rpartition("/")[2]
                if not local.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    # Under another name until it is complete, so that half a download is never taken for the whole.
                    part = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
                    fs.get(path, str(part), recursive=fs.isdir(path))
                    part.rename(local)
        if wanted:
            with self._errors(f"reading {plain}"):
                found, _ = digest_path(local)
            if found != wanted:
                raise IntegrityError(_altered(plain, found, wanted))
        return local

    def load(self, uri: str) -> dict[str, bytes]:
        """The verified bytes of a pinned artifact: of a directory by file name, of a file under the name ``""``.

        Each file is read once. What is returned is what was verified, even if the files are altered in between.

        :raises IntegrityError: the bytes are not those of the pin, or there is no pin.
        :raises BadInput: there is nothing at the URI.
        """
        plain, wanted = split_pin(uri)
        if wanted is None:
            raise IntegrityError(f"{uri} names no digest to verify: expected a pinned URI, …@sha256:….")
        fs, path = self._resolve(plain)
        with self._errors(f"reading {plain}"):
            if not fs.exists(path):
                raise BadInput(
                    f"{plain} does not exist; expected an artifact there. Run what makes it again."
                )
            content = _content if _is_local(fs) else fs.cat_file
            if fs.isdir(path):
                base = path.rstrip("/")
                files = {p[len(base) + 1 :]: bytes(content(p)) for p in fs.find(base)}
                found = digest_of([[name, _digest_bytes(files[name])[0]] for name in sorted(files)])
            else:
                files = {"": bytes(content(path))}
                found = _digest_bytes(files[""])[0]
        if found != wanted:
            raise IntegrityError(_altered(plain, found, wanted))
        return files

    def here(self, uri: str) -> str:
        """The URI of an artifact of this store, also where it was written while the store was mounted elsewhere."""
        plain, sha256 = split_pin(uri)
        key = re.search(r"artifacts/[0-9a-f]{32}/[^/]+$", plain)
        if key is None or sha256 is None or plain.startswith(f"{self.root}/"):
            return uri
        with self._errors(f"reading {key[0]}"):
            is_here = self.fs.exists(self._path(key[0]))
        return pin(self.uri(key[0]), sha256) if is_here else uri

    def digest(self, uri: str) -> str:
        """The sha256 of what a URI names now, whatever its pin says; of a directory that of its manifest."""
        plain, _ = split_pin(uri)
        fs, path = self._resolve(plain)
        with self._errors(f"reading {plain}"):
            if not fs.exists(path):
                raise BadInput(f"{plain} does not exist; expected a file or a directory there.")
            if _is_local(fs):
                return digest_path(Path(path))[0]
            if not fs.isdir(path):
                return self._stream_digest(fs, path)
            base = path.rstrip("/")
            names = sorted(p[len(base) + 1 :] for p in fs.find(base))
            return digest_of([[n, self._stream_digest(fs, f"{base}/{n}")] for n in names])

    def local_bytes(self, pattern: str) -> int | None:
        """The size of the files that a URI or a pattern names [bytes], or None where it cannot be known quickly.

        That is so when they are not on this machine's disk, do not exist or are more than 1,000, and when the path is
        relative, as it would name another file in another working directory.
        """
        plain, _ = split_pin(pattern)
        if not plain.startswith(("/", "~", "file://", "local://")):
            return None
        size = count = 0
        for uri in self.glob(plain):
            path = Path(self._resolve(uri)[1])
            for file in path.rglob("*") if path.is_dir() else [path]:
                count += 1
                if count > _MANY_FILES:
                    return None
                size += file.stat().st_size if file.is_file() else 0
        return size if count else None

    def glob(self, uri: str) -> list[str]:
        """The URIs of the files that a pattern (``*``, ``?``, ``[…]``, ``**``) matches, sorted.

        A path that exists exactly as written is that one file, even if its name contains such characters.
        """
        fs, path = self._resolve(uri)
        with self._errors(f"listing {uri}"):
            if fs.exists(path):
                return [uri]
            found = [p for p in fs.glob(path) if not fs.isdir(p)]
        return sorted(_file_uri(p) if _is_local(fs) else fs.unstrip_protocol(p) for p in found)

    def intact(self, artifact: Artifact) -> bool:
        """Whether an artifact is there with its digest."""
        try:
            return self.digest(artifact.uri) == artifact.sha256
        except BadInput:
            return False

    def present(self, artifact: Artifact) -> bool:
        """Whether an artifact is there with its size. Cheaper than :meth:`intact`: enough for what was just written."""
        fs, path = self._resolve(split_pin(artifact.uri)[0])
        with self._errors(f"reading {artifact.uri}"):
            return (
                bool(fs.exists(path))
                and int(fs.du(path) if fs.isdir(path) else fs.size(path)) == artifact.bytes
            )

    # -- small records ----------------------------------------------------------------------------------------------

    def uri(self, key: str) -> str:
        """The URI of a key under the root."""
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes | None:
        """The bytes of a key, or None when there is none."""
        with self._errors(f"reading {key}"):
            try:
                if self.is_local:
                    return _content(self._path(key))
                return bytes(self.fs.cat_file(self._path(key), **self._in_one_request))
            except FileNotFoundError:
                return None

    def write(self, key: str, content: bytes | Path) -> None:
        """Write bytes, or the bytes of a file, to a key; readers see the old ones or the new ones, never a part."""
        with self._errors(f"writing {key}"):
            self._write(key, content)

    def check_there(self) -> None:
        """Raise BadConfiguration when a local store is not there, as where it is not mounted; writing would make a new one."""
        if self.is_local and not Path(self._root).is_dir():
            raise BadConfiguration(
                f"store {self.root} is not there: mount it, or make the directory where a new store is meant."
            )

    def check_writable(self) -> None:
        """Raise StoreError unless the store can be written: to be called before hours of work, not after them."""
        key = f"receipts/{_TEMPORARY}{secrets.token_hex(8)}"
        self.write(key, b"")
        self.delete(key)

    def keys(self, prefix: str) -> list[str]:
        """All keys below a prefix, sorted."""
        with self._errors(f"listing {prefix}"):
            try:
                found = self.fs.find(self._path(prefix))
            except FileNotFoundError:
                return []
            return sorted(p[len(self._root) + 1 :] for p in found if not is_temporary(p))

    def children(self, key: str) -> list[str]:
        """The names directly below a key, sorted; a folder's name ends with a slash. S3 lists 1,000 in a request."""
        with self._errors(f"listing {key}"):
            try:
                if self.is_local:
                    with os.scandir(self._path(key)) as items:
                        names = [f"{item.name}/" if item.is_dir() else item.name for item in items]
                else:
                    # S3's consoles make an empty object named "folder/" to show an empty folder: it is no child of it.
                    found = [
                        i for i in self.fs.ls(self._path(key), detail=True) if not i["name"].endswith("/")
                    ]
                    names = [i["name"].rpartition("/")[2] + "/" * (i["type"] == "directory") for i in found]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(name for name in names if not is_temporary(name))

    def listing(self, prefix: str) -> list[Listed]:
        """All files at a prefix and below it, temporary ones too, with sizes and times. S3 lists 1,000 in a request."""
        with self._errors(f"listing {prefix}"):
            if self.is_local:
                return list(_walk(self._path(prefix), len(self._root) + 1))
            try:
                found = self.fs.find(self._path(prefix), detail=True)
            except FileNotFoundError:
                return []
            return [
                Listed(
                    key=path[len(self._root) + 1 :],
                    bytes=-1 if info.get("size") is None else int(info["size"]),
                    modified=_modified(info),
                    etag=info.get("ETag") or info.get("etag"),
                )
                for path, info in found.items()
            ]

    def delete(self, key: str) -> None:
        """Remove a file or a directory, if it is there."""
        path = self._path(key)
        with self._errors(f"deleting {key}"), suppress(FileNotFoundError):
            if not self.is_local:
                self.fs.rm(path, recursive=True)
            elif os.path.isdir(path):
                # Under another name first: a writer then finds it gone, and not half of it.
                aside = f"{os.path.dirname(path)}/{_TEMPORARY}{secrets.token_hex(8)}"
                os.rename(path, aside)
                shutil.rmtree(aside, onerror=_unless_gone)
            else:
                os.unlink(path)

    def delete_files(self, keys: Sequence[str]) -> None:
        """Remove many files, of which some may be gone already. S3 removes 1,000 in a request."""

        def delete(key: str) -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._path(key))

        with self._errors(f"deleting {len(keys)} files"):
            if self.is_local:
                for key in keys:
                    Path(self._path(key)).unlink(missing_ok=True)
            elif self.protocol in ("s3", "s3a") and keys:
                self.fs.rm([self._path(key) for key in keys])
            else:
                at_once(delete, keys)

    def create_exclusive(self, key: str, content: bytes) -> bool:
        """Write a key unless it exists; of several callers at once, exactly one gets True.

        On a local disk by a hard link, which fails if the name is taken and shows the content only when it is complete;
        on S3 by If-None-Match. Other file systems cannot promise it and are refused.
        """
        self.check_exclusive()
        path = self._path(key)
        with self._errors(f"creating {key}"):
            if self.is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = f"{os.path.dirname(path)}/{_TEMPORARY}{secrets.token_hex(8)}"
                try:
                    _write_synced(temporary, content)
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                finally:
                    Path(temporary).unlink(missing_ok=True)
                return True
            writer = secrets.token_hex(8)
            try:
                self.fs.pipe_file(path, content, mode="create", Metadata={_WRITER: writer})
            except FileExistsError:
                return self._wrote(path, writer)
            except OSError as error:
                if "PreconditionFailed" in str(error) or "412" in str(error):
                    return self._wrote(path, writer)
                raise
            return True

    def _wrote(self, path: str, writer: str) -> bool:
        """Whether an object that S3 says is there already is this very writer's.

        When the answer to a PUT is lost, the client repeats it, and is told that the key is taken: by itself.
        """
        try:
            return bool(self.fs.metadata(path, refresh=True).get(_WRITER) == writer)
        except FileNotFoundError:
            return False

    @property
    def can_create_exclusively(self) -> bool:
        """Whether this store can create a key exactly once."""
        return self.is_local or self.protocol in ("s3", "s3a")

    def check_exclusive(self) -> None:
        """Raise BadConfiguration when this store cannot create a key exactly once."""
        if not self.can_create_exclusively:
            raise BadConfiguration(
                f"store {self.root}: {self.protocol}:// cannot create a key exactly once, which registration and "
                "promotion need: use a local (or NFS) directory or s3://."
            )

    # -- receipts --------------------------------------------------------------------------------------------------

    def record(self, receipt: Receipt) -> None:
        """Store a receipt as the last one of its task instance."""
        self.write(f"receipts/{receipt.run_key}.json", receipt.to_json().encode())

    def receipt(self, run_key: str) -> Receipt | None:
        """The last receipt of a task instance, or None; an unreadable one counts as none."""
        return self.read_receipt(f"receipts/{run_key}.json")

    def read_receipt(self, key: str) -> Receipt | None:
        """The receipt at a key, or None; an unreadable one counts as none."""
        text = self.read(key)
        if text is None:
            return None
        try:
            return Receipt.from_json(text)
        except ContractError as error:
            log.warning("%s is passed over: %s", key, error)
            return None

    # -- file system --------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _resolve(self, uri: str) -> tuple[Any, str]:
        """The file system and path of a URI; one below the root uses the store's own Connection."""
        import fsspec

        if uri.startswith(self.root + "/"):
            return self.fs, self._path(uri[len(self.root) + 1 :])
        if "://" not in uri:
            uri = _file_uri(uri)
        protocol = uri.partition("://")[0]
        same = self.connection if protocol == self.protocol else None
        try:
            fs, path = fsspec.core.url_to_fs(uri, **_storage_options(protocol, same))
        except (ValueError, ImportError) as error:
            raise BadConfiguration(f"{uri!r} cannot be opened: {error}.") from None
        return fs, path

    def _outlasting(self, key: str, write: Callable[[], None]) -> None:
        """Write to a local disk; again when eviction took away what had been there, which was old.

        Eviction marks what it looks at, looks whether that is old, and removes it. This writes, and looks for the mark. So
        one of the two always sees the other.
        """
        mark = self._path(sweep_mark(key))
        for left in range(20, -1, -1):
            try:
                write()
            except (
                FileNotFoundError,
                FileExistsError,
            ):  # the folder went, or came back, while this wrote into it
                if not left:
                    raise
                continue
            if not _exists_since(mark, _SWEEP_S):
                return
            while _exists_since(mark, _SWEEP_S):
                time.sleep(0.002)
            if os.path.exists(self._path(key)):
                return
        raise StoreError(
            f"{self.root}/{key} was removed each time it was written: an eviction looks at it all the time."
        )

    def _write(self, key: str, content: bytes | Path) -> None:
        path = self._path(key)
        parent, _, _ = path.rpartition("/")
        if self.is_local:
            self._outlasting(key, lambda: _replace(path, content))
            return
        if self.protocol in _ATOMIC_PUT:
            self._upload(content, path)
            return
        self.fs.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/{_TEMPORARY}{secrets.token_hex(8)}"
        self._upload(content, temporary)
        self.fs.mv(temporary, path)

    def _upload(self, content: bytes | Path, path: str) -> None:
        if isinstance(content, bytes):
            self.fs.pipe_file(path, content)
        else:
            self.fs.put_file(str(content), path)

    def _write_tree(self, key: str, directory: Path) -> None:
        if not self.is_local:
            for file in _files(directory):
                self._write(f"{key}/{file.relative_to(directory).as_posix()}", file)
            return
        self._outlasting(key, lambda: _replace_tree(Path(self._path(key)), directory))

    @staticmethod
    def _stream_digest(fs: Any, path: str) -> str:
        digest = hashlib.sha256()
        with fs.open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _DRIVERS:
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            # A pod often runs as another user than the one who made the folder, so the message names both.
            if isinstance(error, PermissionError) and self.is_local:
                reason += f" for user {os.geteuid()}{_owner(error.filename)}"
            advice = "Check that it is reachable, writable and has space"
            if "Credentials" in type(error).__name__:
                advice = (
                    "Name a Connection that has them (store_conn_id for the store, a source's connection for a source), or "
                    "give this machine its own"
                )
            raise StoreError(
                f"store {self.root}: {doing} failed: {reason}. {advice}; nothing that was there is changed."
            ) from error


_DRIVERS = frozenset({"aiohttp", "azure", "botocore", "gcsfs", "google"})  # whose errors are not OSErrors


def _unless_gone(_function: Any, _path: str, failure: Any) -> None:
    """Raise what a deletion met, unless somebody else has deleted the file before."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _owner(path: Any) -> str:
    """The user who owns the folder of a file, as the end of a message."""
    try:
        return f", in a folder of user {os.stat(os.path.dirname(path)).st_uid}"
    except (OSError, TypeError):
        return ""


def _altered(uri: str, found: str, wanted: str) -> str:
    return (
        f"{uri} has sha256 {found[:12]}…, it is pinned to {wanted[:12]}…: it was altered or is damaged. "
        "Clear the task that made it, to make it again."
    )


def at_once(function: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """Call a function for each item, 16 at the same time, as each call waits for the store; the results in order."""
    items = list(items)
    # In chunks, as handing one call to a thread takes 30 us; small ones, so that no thread is idle long before the others.
    size = max(1, min(50, len(items) // (8 * AT_ONCE)))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [
            result
            for done in pool.map(lambda chunk: [function(item) for item in chunk], chunks)
            for result in done
        ]


def is_temporary(path: str) -> bool:
    """Whether a path is that of something that is still being written."""
    return path.rstrip("/").rpartition("/")[2].startswith(_TEMPORARY)


def now() -> str:
    """The time in UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def total_bytes(sizes: Iterable[int | None]) -> int | None:
    """The sum of the sizes, None as soon as one is not known."""
    known = 0
    for size in sizes:
        if size is None:
            return None
        known += size
    return known


def digest_path(path: Path) -> tuple[str, int]:
    """The sha256 and the size in bytes of a file or a directory; a directory's is that of its sorted names and digests."""
    if not path.is_dir():
        digest, size = hashlib.sha256(), 0
        with open(path, "rb", opener=_files_only) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size
    entries, total = [], 0
    for file in _files(path):
        sha256, size = digest_path(file)
        entries.append([file.relative_to(path).as_posix(), sha256])
        total += size
    return digest_of(sorted(entries)), total


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def _files_only(path: str, flags: int) -> int:
    """An opener of files: what is none, such as a pipe, which would keep its reader waiting, is refused."""
    number = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return number


def _content(path: str) -> bytes:
    with open(path, "rb", opener=_files_only) as stream:
        return stream.read()


def _digest_bytes(content: bytes) -> tuple[str, int]:
    return hashlib.sha256(content).hexdigest(), len(content)


def _file_uri(path: str) -> str:
    """The URI of a local path. It is not percent-encoded, as fsspec would not decode it."""
    return f"file://{Path(os.path.expanduser(path)).absolute()}"


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _walk(path: str, cut: int) -> Iterator[Listed]:
    """A local path and all below it; the first ``cut`` characters of a path are no part of its key."""
    path = path.rstrip("/")
    try:
        top = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(top.st_mode):
        yield Listed(path[cut:], top.st_size, top.st_mtime)
        return
    yield Listed(f"{path[cut:]}/", 0, top.st_mtime)
    todo = [path]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                items = list(found)
        except FileNotFoundError:  # removed in the meantime
            continue
        for item in items:
            try:
                info = item.stat()
            except FileNotFoundError:  # likewise
                continue
            if item.is_dir():
                todo.append(item.path)
                yield Listed(f"{item.path[cut:]}/", 0, info.st_mtime)
            else:
                yield Listed(item.path[cut:], info.st_size, info.st_mtime)


def _modified(info: dict[str, Any]) -> float:
    """When a file was last written; where fsspec does not tell, now, so that the file does not pass for old."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        stamp = info.get(name)
        if isinstance(stamp, str):
            stamp = datetime.fromisoformat(stamp)
        if stamp:
            return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
    return time.time()


def _write_synced(path: str, content: bytes | Path) -> None:
    """Write a file and wait until it is on the disk: after a power cut, its final name must not show an empty file."""
    with open(path, "xb") as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, out, _CHUNK)
        out.flush()
        os.fsync(out.fileno())


def _replace(path: str, content: bytes | Path) -> None:
    """Write a file under another name, and then give it its own."""
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    temporary = f"{parent}/{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        _write_synced(temporary, content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _replace_tree(target: Path, directory: Path) -> None:
    """Copy a directory. If it is there already, it stays if it is intact, as new as a copy; else the copy replaces it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        try:
            shutil.copytree(directory, temporary)
        except shutil.Error:
            if temporary.exists():
                raise
            raise FileNotFoundError(errno.ENOENT, "removed while it was written", str(target)) from None
        try:
            os.rename(temporary, target)
        except OSError:
            os.utime(target)  # first, or eviction might remove it while it is read
            if digest_path(target)[0] != digest_path(directory)[0]:
                aside = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
                os.rename(target, aside)
                os.rename(temporary, target)
                shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep_mark(key: str) -> str:
    """The key of the mark that eviction sets while it decides about a key, or about the folder that holds it."""
    return "sweeping/" + "-".join(key.split("/")[:2])


def _exists_since(path: str, at_most_s: float) -> bool:
    """Whether there is a file that was written in the last seconds."""
    try:
        return time.time() - os.stat(path).st_mtime < at_most_s
    except FileNotFoundError:
        return False


def _storage_options(protocol: str, connection: Connection | None) -> dict[str, Any]:
    """The options of fsspec for a Connection, which may hold more of them in its extra, under ``storage_options``."""
    # Other processes write to the same store: a listing that fsspec has cached would hide what they have made since.
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in _ATOMIC_PUT - {"memory"} else {}
    options |= connection.extra.get("storage_options", {}) if connection else {}
    if protocol in ("s3", "s3a"):
        import fsspec

        # What is passed here replaces what this machine's configuration of fsspec says, so the two are joined.
        machine = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        told = {"max_pool_connections": AT_ONCE} | machine | options.get("config_kwargs", {})
        options["config_kwargs"] = {"connect_timeout": _CONNECT_S} | told
    if connection and protocol in ("s3", "s3a"):
        aws = AwsAccess.of(connection)
        for key, value in (
            ("key", aws.access_key_id),
            ("secret", aws.secret_access_key),
            ("token", aws.session_token),
            ("endpoint_url", aws.endpoint_url),
            ("client_kwargs", {"region_name": aws.region} if aws.region else None),
        ):
            if value:
                options.setdefault(key, value)
    return options
