"""Airflow's Connections as they reach a stage."""

from __future__ import annotations

from typing import Any

from lepton_airflow.connections import Connection
from lepton_airflow.errors import BadConfiguration


def connection_of(conn_id: str) -> Connection:
    """The Connection of that id, read by a task's worker; raises BadConfiguration when Airflow has none."""
    from airflow.providers.common.compat.sdk import AirflowNotFoundException
    from airflow.sdk import Connection as AirflowConnection

    try:
        return plain_connection(conn_id, AirflowConnection.get(conn_id))
    except AirflowNotFoundException:
        raise BadConfiguration(
            f"Connection {conn_id!r} does not exist: create it in Airflow (Admin, Connections) or set "
            f"AIRFLOW_CONN_{conn_id.upper()}."
        ) from None


def plain_connection(conn_id: str, found: Any) -> Connection:
    """What an Airflow Connection says, without Airflow."""
    return Connection(
        id=conn_id,
        type=found.conn_type or "",
        host=found.host,
        login=found.login,
        password=found.password,
        schema=found.schema,
        port=found.port,
        extra=dict(found.extra_dejson),
    )
