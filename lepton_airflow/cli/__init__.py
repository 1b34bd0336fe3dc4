"""What can be asked of ``python -m lepton_airflow``? One file is one command."""

from __future__ import annotations

import argparse
import math
from typing import TypeAlias

from lepton_airflow.errors import ContractError
from lepton_airflow.store.files import Store

# argparse has no public name for what add_subparsers() returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def store_of(args: argparse.Namespace) -> Store:
    """The store that ``--store`` names; raises ContractError when nothing does."""
    if not args.store:
        raise ContractError("which store? Pass --store URI, or set AIRFLOW__LEPTON__STORE.")
    return Store(args.store)


def seconds(text: str) -> float:
    """A length of time for argparse: a number, zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no length of time: expected seconds, zero or more"
        )
    return value
