"""What comes out of a run of a stage, as those read it who started it: the receipt, and the lines of the log."""

from __future__ import annotations

import logging
import re

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import RunnerError, from_record


def settle(request: Request, receipt: Receipt) -> Receipt:
    """The receipt if it is of this request and good; else raises what it records."""
    if receipt.run_key != request.run_key or receipt.stage != request.stage:
        raise RunnerError(
            f"{request.stage}: the receipt is of {receipt.stage} with run key {receipt.run_key}, expected "
            f"{request.run_key}: two runs share a place; clear the task."
        )
    if receipt.error:
        raise from_record(receipt.error["kind"], receipt.error["message"], int(receipt.error["exit_code"]))
    return receipt


_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) ")


def level_of(line: str) -> tuple[int, str]:
    """The level of a line of the door's output, and what it says."""
    found = _LEVEL.match(line)
    return (getattr(logging, found[1]), line[found.end() :]) if found else (logging.INFO, line)
