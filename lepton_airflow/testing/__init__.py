"""What a test of a DAG, a stage or a runner needs: a real Airflow on this machine, and the runner's conformance suite."""

from lepton_airflow.testing.local_airflow import LocalAirflow

__all__ = ["LocalAirflow"]
