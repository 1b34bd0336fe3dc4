"""``envs ls``, ``build`` and ``prune``: the environments of the runner ``Venv`` on this machine."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from lepton_airflow.cli import Commands, seconds
from lepton_airflow.errors import BadConfiguration

_MONTH_S = 30 * 24 * 3600.0


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    envs = commands.add_parser(
        "envs", help="the environments of the runner Venv on this machine"
    ).add_subparsers(required=True, metavar="ls|build|prune")
    listed = envs.add_parser("ls", help="list them, the one used longest ago first")
    listed.set_defaults(call=_envs_ls)
    made = envs.add_parser("build", help="build one unless it is there, and print its interpreter")
    made.add_argument(
        "extras", nargs="?", default="", help="extras of lepton-airflow, such as drift or train,torch"
    )
    made.add_argument(
        "--requirement", action="append", default=[], help="a further requirement line; may be repeated"
    )
    made.add_argument("--python", help="the interpreter below it; default: this one")
    made.add_argument(
        "--constraints", help="path or URL of a constraints file; default: [lepton] constraints"
    )
    made.add_argument(
        "--installer", choices=("uv", "pip"), help="default: uv where it is installed, else pip"
    )
    made.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    made.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    made.set_defaults(call=_envs_build)
    pruned = envs.add_parser("prune", help="remove what was not used for long, and what is half-built")
    pruned.add_argument(
        "--older-than-s",
        type=seconds,
        default=_MONTH_S,
        help="only those last used at least this long ago [seconds]; default: 30 days",
    )
    pruned.set_defaults(call=_envs_prune)
    for command in (listed, made, pruned):
        command.add_argument("--root", type=Path, help="where they lie; default: [lepton] environments")


def _environments(args: argparse.Namespace) -> Path:
    from lepton_airflow.execution.environments import default_root

    return args.root.absolute() if args.root else default_root()


def _envs_ls(args: argparse.Namespace) -> int:
    from lepton_airflow.execution import environments

    for e in environments.list_environments(_environments(args)):
        used = datetime.fromtimestamp(e.used, UTC).isoformat(timespec="seconds")
        size = f"{(e.bytes or 0) >> 20:,} MiB" if e.bytes else ""
        print(f"{used}  {e.state:<10} {size:>10}  {e.name}  {', '.join(e.requirements)}".rstrip())
    return 0


def _envs_build(args: argparse.Namespace) -> int:
    from lepton_airflow import settings
    from lepton_airflow.execution.environments import Environment
    from lepton_airflow.execution.processes import end_with_parent

    if args.parent_fd is not None:
        end_with_parent(args.parent_fd, args.scratch)
    extras = [name for part in args.extras.split(",") if (name := part.strip())]
    if not extras and not args.requirement:
        raise BadConfiguration(
            "what to build? Name extras, such as drift or train,torch, or --requirement LINE."
        )
    constraints = settings.setting("constraints") if args.constraints is None else args.constraints
    environment = Environment.of(extras, args.requirement, args.python, constraints or None, args.installer)
    say = partial(print, file=sys.stderr, flush=True)
    print(environment.build(_environments(args), say))
    return 0


def _envs_prune(args: argparse.Namespace) -> int:
    from lepton_airflow.execution import environments

    removed = environments.prune(_environments(args), args.older_than_s)
    for e in removed:
        print(f"{e.name} removed")
    print(f"{len(removed)} environments and {sum(e.bytes or 0 for e in removed):,} bytes removed")
    return 0
