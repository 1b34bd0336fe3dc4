"""How the output of ``python -m lepton_airflow run`` is read where it was started: its receipt, and the lines of its log."""

from __future__ import annotations

import logging
import re

from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import RunnerError, from_record


def settle(request: Request, receipt: Receipt) -> Receipt:
    """The receipt, if it answers this request and records no error; else raises RunnerError, or the error it records."""
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
    """The level of a line of output, and its text without the level; a line that begins with no level is INFO."""
    found = _LEVEL.match(line)
    return (getattr(logging, found[1]), line[found.end() :]) if found else (logging.INFO, line)
