"""What a test of a DAG, a stage or a runner needs: a real Airflow on this machine, and the runner's conformance suite."""

from typing import TYPE_CHECKING, Any

from lepton_airflow.testing.local_airflow import LocalAirflow
from lepton_airflow.testing.local_mlflow import LocalMlflow

if TYPE_CHECKING:
    from lepton_airflow.testing.conformance import RunnerConformance

__all__ = ["LocalAirflow", "LocalMlflow", "RunnerConformance"]


def __getattr__(name: str) -> Any:
    if name == "RunnerConformance":  # it needs pytest, which the demo does not
        import pytest

        pytest.register_assert_rewrite("lepton_airflow.testing.conformance")
        from lepton_airflow.testing.conformance import RunnerConformance

        return RunnerConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
