"""The entry point, ``python -m lepton_airflow``: runners start ``run`` here, and people the other commands.

``stages`` and ``describe`` need neither Airflow nor an engine.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress

from lepton_airflow import __version__
from lepton_airflow.cli import cache, envs, pods, rollback, run, serve, stages
from lepton_airflow.errors import LeptonError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lepton_airflow", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (run, stages, cache, envs, pods, serve, rollback):
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.call(args))
    except LeptonError as error:
        print(f"lepton_airflow: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
