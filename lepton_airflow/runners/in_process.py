"""Run a stage in this very process: for a debugger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.execution.run_stage import run_stage
from lepton_airflow.runners import Runner, settle


@dataclass
class InProcess(Runner):
    """Run the stage in the process of the task, where breakpoints work; nothing is isolated or limited."""

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Run the request here; it passes through the same JSON as with every other runner."""
        request = Request.from_json(request.to_json())
        return settle(
            request, Receipt.from_json(run_stage(request, {c.id: c for c in connections}).to_json())
        )

    def cancel(self) -> None:
        """Nothing to stop: the task process itself is being ended."""
