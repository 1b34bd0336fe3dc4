"""What tells one store from another, wherever either is mounted; and which Airflow uses it under which name."""

from __future__ import annotations

import re
import secrets

from lepton_airflow.contract import digest_of
from lepton_airflow.errors import IntegrityError
from lepton_airflow.store.files import Store

KEY = "identity"  # under which a store keeps its id
_LENGTH = 24  # hex digits


def identity_of(store: Store) -> str:
    """The id of a store: drawn once, kept in it, and the same for whoever opens it."""
    if not store.can_create_exclusively:
        return digest_of(store.root)[:_LENGTH]
    found = store.read(KEY)
    if found is None:
        store.create_exclusive(KEY, secrets.token_hex(_LENGTH // 2).encode())
        found = store.read(KEY) or b""
    text = found.decode(errors="replace")
    if not re.fullmatch(rf"[0-9a-f]{{{_LENGTH}}}", text):
        raise IntegrityError(
            f"{store.uri(KEY)} is damaged: expected the {_LENGTH} hex digits that tell this store from others. Restore it, or delete it "
            "while no task runs in a pod."
        )
    return text


def owner_of(store: Store, deployment: str) -> str | None:
    """The id of the Airflow that uses the store under this name of a deployment; None: none yet."""
    found = store.read(_owner_key(deployment))
    return None if found is None else found.decode(errors="replace").strip()


def claim(store: Store, deployment: str, installation: str) -> str:
    """Let an Airflow use the store under this name, unless another one does; returns the id of the one that does."""
    key, content = _owner_key(deployment), installation.encode()
    if store.can_create_exclusively:
        store.create_exclusive(key, content)
    elif store.read(key) is None:
        store.write(key, content)
    return owner_of(store, deployment) or ""


def _owner_key(deployment: str) -> str:
    return f"deployments/{digest_of(deployment)[:_LENGTH]}"
