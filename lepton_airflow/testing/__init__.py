"""What does a test of a DAG, a stage or a runner need? Real servers on this machine, and the runners' conformance suites."""

from typing import TYPE_CHECKING, Any

from lepton_airflow.testing.local_airflow import LocalAirflow
from lepton_airflow.testing.local_endpoint import LocalEndpoint
from lepton_airflow.testing.local_mlflow import LocalMlflow
from lepton_airflow.testing.local_postgres import LocalPostgres

if TYPE_CHECKING:
    from lepton_airflow.testing.conformance import (
        IsolatedRunnerConformance,
        LocalRunnerConformance,
        RunnerConformance,
        StageConformance,
        WorkerRunnerConformance,
        probe,
        until,
    )

__all__ = [
    "IsolatedRunnerConformance",
    "LocalAirflow",
    "LocalEndpoint",
    "LocalMlflow",
    "LocalPostgres",
    "LocalRunnerConformance",
    "RunnerConformance",
    "StageConformance",
    "WorkerRunnerConformance",
    "probe",
    "until",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the suites need pytest, which the demo does not
        import pytest

        pytest.register_assert_rewrite("lepton_airflow.testing.conformance")
        from lepton_airflow.testing import conformance

        return getattr(conformance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
