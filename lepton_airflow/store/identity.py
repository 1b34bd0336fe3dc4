"""What tells one store from another, wherever either is mounted."""

from __future__ import annotations

import secrets

from lepton_airflow.contract import digest_of
from lepton_airflow.store.files import Store

_KEY = "identity"
_LENGTH = 24  # hex digits


def identity_of(store: Store) -> str:
    """The id of a store: drawn once, kept in it, and the same for whoever opens it."""
    if not store.can_create_exclusively:
        return digest_of(store.root)[:_LENGTH]
    found = store.read(_KEY)
    if found is None:
        store.create_exclusive(_KEY, secrets.token_hex(_LENGTH // 2).encode())
        found = store.read(_KEY) or b""
    return found.decode()
