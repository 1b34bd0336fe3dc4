"""``rollback``: go back to a former champion from a shell, as the stage RollbackModel does in a DAG."""

from __future__ import annotations

import argparse
import os
import sys

from lepton_airflow.cli import Commands, store_of
from lepton_airflow.errors import DO_NOT_RETRY, BadConfiguration

_WAIT_S = 45.0  # for the servers: they take the version later, too


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    rollback = commands.add_parser("rollback", help="go back to a former champion, now")
    rollback.add_argument("model", help="name of the registered model")
    rollback.add_argument("--reason", required=True, help="why, in a sentence that stays in the ledger")
    rollback.add_argument(
        "--version", type=int, help="a former champion; default: the one before the present one"
    )
    rollback.add_argument("--endpoint", help="an endpoint that gets that version, too; default: none")
    rollback.add_argument(
        "--allow-other-inputs",
        action="store_true",
        help="also where clients of the version in service will be refused or misled",
    )
    rollback.add_argument(
        "--store",
        default=os.environ.get("AIRFLOW__LEPTON__STORE"),
        help="the store's URI, opened with ambient identity",
    )
    rollback.add_argument(
        "--tracking-uri",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="MLflow, whose aliases follow; default: MLFLOW_TRACKING_URI",
    )
    rollback.set_defaults(call=_rollback)


def _rollback(args: argparse.Namespace) -> int:
    import secrets

    from lepton_airflow.contract import Request, RunIdentity
    from lepton_airflow.execution.run_stage import run_stage
    from lepton_airflow.registry.ledger import Ledger

    store = store_of(args)
    store.check_there()
    if not args.tracking_uri:
        raise BadConfiguration("which MLflow? Pass --tracking-uri URI, or set MLFLOW_TRACKING_URI.")
    request = Request(
        stage="RollbackModel",
        parameters={
            "name": args.model,
            "reason": args.reason,
            "version": args.version,
            "endpoint": args.endpoint,
            "allow_other_inputs": args.allow_other_inputs,
            "tracking_uri": args.tracking_uri,
            "timeout_s": _WAIT_S,
        },
        store=store.root,
        identity=RunIdentity(
            deployment="shell", dag_id="rollback", task_id=args.model, run_id=secrets.token_hex(8)
        ),
    )
    # The endpoint waits for the answer of an MLflow that is away; by default that is six minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    try:
        receipt = run_stage(request)
    except KeyboardInterrupt:
        moved = Ledger(store, args.model).find("run_key", request.run_key)
        raise BadConfiguration(
            f"interrupted when version {moved[0].version} was champion again: --version {moved[0].version} goes on from there."
            if moved
            else "interrupted before anything was moved."
        ) from None
    if receipt.error:
        # Also what a retry may mend ends with 80: to call this again without --version would go back once more.
        print(f"lepton_airflow: {receipt.error['message']}", file=sys.stderr)
        return DO_NOT_RETRY
    print(receipt.summary)
    for name, link in receipt.links.items():
        print(f"{name}: {link}")
    return 0
