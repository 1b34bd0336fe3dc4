from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.store import Store
from lepton_airflow.testing.local_s3 import LocalS3


@pytest.fixture(scope="session")
def s3() -> Iterator[LocalS3]:
    """An S3 server on loopback."""
    with LocalS3() as server:
        yield server


@pytest.fixture
def bucket(s3: LocalS3, tmp_path: Path) -> tuple[str, Connection]:
    """A new bucket's URI, and the Connection that opens it."""
    store = s3.store(hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20])
    return store.root, s3.connection


@pytest.fixture(params=["file", "s3"])
def exact_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind that can create a key exactly once."""
    if request.param == "file":
        return Store(str(tmp_path / "störe with space"))
    return Store(*request.getfixturevalue("bucket"))
