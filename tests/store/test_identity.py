from __future__ import annotations

from pathlib import Path

import pytest

from lepton_airflow.errors import IntegrityError
from lepton_airflow.store import Store
from lepton_airflow.store.identity import identity_of


def test_a_store_is_known_wherever_it_is_mounted(exact_store: Store, tmp_path: Path) -> None:
    one = identity_of(exact_store)
    assert identity_of(Store(exact_store.root, exact_store.connection)) == one
    assert identity_of(Store(str(tmp_path / "another"))) != one


def test_a_store_that_creates_nothing_exactly_once_goes_by_its_address() -> None:
    one, other = (identity_of(Store(f"memory://{name}")) for name in ("a", "b"))
    assert one != other == identity_of(Store("memory://b"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"stage":', b"a" * 23])
def test_a_damaged_identity_is_said(tmp_path: Path, content: bytes) -> None:
    store = Store(str(tmp_path))
    identity_of(store)
    (tmp_path / "identity").write_bytes(content)
    with pytest.raises(IntegrityError, match="identity is damaged: expected the 24 hex digits"):
        identity_of(store)
