"""``run``: the stage of a request, wherever it is started; every runner starts this."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO, cast

from lepton_airflow.cli import Commands
from lepton_airflow.connections import Connection, connections_from_json, redactor
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.errors import ContractError, StoreError
from lepton_airflow.stages import get_stage


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    run = commands.add_parser("run", help="run the stage that a request names and write its receipt")
    run.add_argument("request", type=Path)
    run.add_argument("receipt", type=Path)
    run.add_argument(
        "--connections-fd", type=int, help="inherited pipe from which the Connections are read, as JSON"
    )
    run.add_argument(
        "--connections-file", type=Path, help="file from which the Connections are read, as JSON"
    )
    run.add_argument(
        "--termination-message", type=Path, help="file that gets the receipt in at most 4096 bytes"
    )
    run.add_argument(
        "--parent-fd", type=int, help="inherited pipe; when its other end closes, the stage ends"
    )
    run.add_argument(
        "--scratch", type=Path, help="with --parent-fd: a directory that is removed when the other end closes"
    )
    run.add_argument("--search-path", default="", help="folders of user code, appended to sys.path")
    run.set_defaults(call=_run)


def _run(args: argparse.Namespace) -> int:
    from lepton_airflow.execution.processes import end_with_parent
    from lepton_airflow.execution.run_stage import run_stage
    from lepton_airflow.execution.stop import StopOnSigterm

    if args.parent_fd is not None:
        end_with_parent(args.parent_fd, args.scratch)
    connections = connections_from_json(_handed_over(args))
    sys.path += [folder for folder in args.search_path.split(os.pathsep) if folder and folder not in sys.path]
    _log_without_secrets(connections)
    request = Request.from_json(_read(args.request, "request"))
    try:
        kind = get_stage(request.stage)
    except Exception:  # noqa: BLE001 - whatever importing a user's module raises: run_stage raises it again and says it
        kind = None
    stop = StopOnSigterm(resumable=kind is not None and kind.resumable)
    receipt = run_stage(request, connections, stop)
    _write(receipt, args.receipt, args.termination_message)
    level = logging.ERROR if receipt.error else logging.INFO
    logging.getLogger("lepton_airflow").log(
        level, "%s %s: %s", receipt.stage, receipt.status, receipt.summary
    )
    return int(receipt.error["exit_code"]) if receipt.error else 0


def _handed_over(args: argparse.Namespace) -> str | bytes:
    """The Connections as JSON, from the pipe or the file that the runner named; empty without either."""
    if args.connections_fd is not None:
        with open(args.connections_fd, encoding="utf-8") as pipe:
            return pipe.read()
    if args.connections_file is not None:
        return _read(args.connections_file, "file of Connections")
    return ""


def _log_without_secrets(connections: Mapping[str, Connection]) -> None:
    """Send the log to standard output, each line with its level; and keep the Connections' secrets out of all output."""
    from lepton_airflow.execution.output import LevelFormatter, RedactedStream

    hide = redactor(connections)
    if connections:
        sys.stdout = cast(TextIO, RedactedStream(sys.stdout, hide))
        sys.stderr = cast(TextIO, RedactedStream(sys.stderr, hide))
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LevelFormatter(hide))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _write(receipt: Receipt, file: Path, termination_message: Path | None) -> None:
    """Write the receipt, whole or not at all; and what of it fits into a container's termination message."""
    from lepton_airflow.execution.run_stage import in_brief

    try:
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(receipt.to_json(), encoding="utf-8")
        temporary.replace(file)
        if termination_message:
            termination_message.write_text(in_brief(receipt), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"the receipt {file} cannot be written: {error.strerror}.") from None


def _read(file: Path, what: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ContractError(f"the {what} {file} cannot be read: {error.strerror}.") from None
