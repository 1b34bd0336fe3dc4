"""The ``[lepton]`` section of an installation's Airflow configuration (``AIRFLOW__LEPTON__STORE`` and so on).

=================  =========================================================================================
store              URI of the artifact store; default: ``lepton`` under AIRFLOW_HOME
store_conn_id      id of the Connection that opens the store; default: ambient identity
runner             default runner: ``Subprocess``, or JSON such as ``{"Subprocess": {"memory_limit_mb": 4096}}``
                   or ``{"Venv": {"extras": "drift"}}``; ``Venv`` alone gives each stage what its own extra brings
environments       folder of the environments that ``Venv`` builds; default: ``lepton_airflow/environments`` in the user's
                   cache (``XDG_CACHE_HOME``, else ``~/.cache``)
constraints        path or URL of the constraints file of those environments; default: none
deployment         name of this Airflow, when several share one store: each needs its own; default: ``airflow``
cache_ttl_s        age in seconds above which a cache entry is a miss; default: entries do not age
=================  =========================================================================================
"""

from __future__ import annotations

import os

from lepton_airflow.errors import BadConfiguration


def setting(name: str, fallback: str | None = None) -> str | None:
    """One value of the ``[lepton]`` section, or the fallback when it is not set.

    Without Airflow, where only a stage's libraries are installed, the environment variable is read instead.
    """
    try:
        from airflow.configuration import conf
    except ModuleNotFoundError:
        return os.environ.get(f"AIRFLOW__LEPTON__{name.upper()}") or fallback
    value: str | None = conf.get("lepton", name, fallback=None)
    return value or fallback


def default_store() -> str:
    """The URI of the installation's artifact store: ``[lepton] store``, else ``lepton`` under AIRFLOW_HOME."""
    from airflow.configuration import AIRFLOW_HOME

    return setting("store") or f"{AIRFLOW_HOME}/lepton"


def default_ttl_s() -> float | None:
    """The age above which a cache entry is a miss [seconds]; None: entries do not age."""
    text = setting("cache_ttl_s")
    try:
        return float(text) if text else None
    except ValueError:
        raise BadConfiguration(f"[lepton] cache_ttl_s={text!r} is not a number of seconds.") from None
