"""Airflow's Connections as they reach a stage."""

from __future__ import annotations

from lepton_airflow.connections import Connection
from lepton_airflow.errors import BadConfiguration


def connection_of(conn_id: str) -> Connection:
    """The Connection of that id, read by a task's worker; raises BadConfiguration when Airflow has none."""
    from airflow.providers.common.compat.sdk import AirflowNotFoundException
    from airflow.sdk import Connection as AirflowConnection

    try:
        return Connection.of_airflow(conn_id, AirflowConnection.get(conn_id))
    except AirflowNotFoundException:
        raise BadConfiguration(
            f"Connection {conn_id!r} does not exist: create it in Airflow (Admin, Connections) or set "
            f"AIRFLOW_CONN_{conn_id.upper()}."
        ) from None
