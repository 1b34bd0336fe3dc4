"""Which Airflow this is: two that share a store, under one ``[lepton] deployment``, would take each other's runs for their own.

An Airflow is known by an id in its Variable ``lepton_installation``, which its first task draws. So it moves with the metadata
database, to whatever machine. A store remembers for each name of a deployment which Airflow used it first
(:func:`~lepton_airflow.store.identity.claim`).
"""

from __future__ import annotations

import logging
import secrets
import time

from lepton_airflow.errors import BadConfiguration, LeptonError
from lepton_airflow.store.files import Store
from lepton_airflow.store.identity import claim, owner_of

log = logging.getLogger(__name__)

VARIABLE = "lepton_installation"
_ABOUT = "Tells this Airflow from others that use the same store of lepton_airflow."
# Between looks [seconds]: several tasks may be the first at the same time, and draw an id each.
_LOOKS = (0.0, 0.2, 0.5, 1.0, 1.5)


def check_deployment(store: Store, deployment: str) -> None:
    """Raise BadConfiguration when another Airflow uses the store under this name.

    Nothing is checked outside a task, and with ``[core] multi_team``, where each team has Variables of its own.
    """
    from airflow.configuration import conf
    from airflow.sdk import get_current_context

    try:
        get_current_context()
    except RuntimeError:
        return
    if conf.getboolean("core", "multi_team", fallback=False):
        return
    owner = None
    try:
        for pause in _LOOKS:
            time.sleep(pause)
            owner, own = _looked(store, deployment)
            if owner == own:
                return
    except LeptonError:
        raise
    except Exception as error:  # noqa: BLE001 - of Airflow's API, or of a secrets backend that is asked before it
        log.warning(
            "not checked whether another Airflow uses the store: Variable %s failed: %r", VARIABLE, error
        )
        return
    raise BadConfiguration(
        f"another Airflow uses the store {store.root} under [lepton] deployment={deployment!r}, so that its runs cannot be told from "
        "those of this one: set [lepton] deployment to another name here. If it was this one, with another metadata database, set its "
        f"Variable {VARIABLE} to {owner}."
    )


def _is_there() -> bool:
    """Whether the Variable exists although it was not given: Airflow answers None also when its API has failed."""
    from airflow.sdk import Variable

    return hasattr(Variable, "keys") and VARIABLE in list(Variable.keys(prefix=VARIABLE))


def _looked(store: Store, deployment: str) -> tuple[str, str | None]:
    """The id of the Airflow that uses the store under this name, and the one of this Airflow; what there is none of is made."""
    from airflow.sdk import Variable

    owner = owner_of(store, deployment)  # looked for first: whoever claims has set the Variable before
    own: str | None = Variable.get(VARIABLE, default=None)
    if own is None and _is_there():
        raise RuntimeError("it is there, and could not be read")
    if owner is not None:
        return owner, own
    first = own is None
    if first:
        Variable.set(VARIABLE, secrets.token_hex(8), description=_ABOUT)
        own = Variable.get(VARIABLE)  # which another task may have set meanwhile
    owner = claim(store, deployment, own or "")
    if first and owner != own:  # by another of the first tasks
        Variable.set(VARIABLE, owner, description=_ABOUT)
        own = owner
    return owner, own
