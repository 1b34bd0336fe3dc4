"""``pods ls`` and ``pods sweep``: what the runner ``Pod`` has left in a cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lepton_airflow.cli import Commands, seconds
from lepton_airflow.errors import BadConfiguration

if TYPE_CHECKING:
    from lepton_airflow.pods.cluster import Cluster
    from lepton_airflow.pods.sweep import Item


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    pods = commands.add_parser(
        "pods", help="the pods and Secrets of the runner Pod in a cluster"
    ).add_subparsers(required=True, metavar="ls|sweep")
    seen = pods.add_parser("ls", help="list them, oldest first: age, state, reason, and whose they are")
    swept = pods.add_parser(
        "sweep",
        help="delete what nobody needs: Secrets without a pod, settled pods, pods of tasks that have ended",
    )
    swept.add_argument("--dry-run", action="store_true", help="only list what would be deleted")
    for command, call in ((seen, _pods_ls), (swept, _pods_sweep)):
        command.add_argument(
            "--older-than-s",
            type=seconds,
            help="pods whose task Airflow does not know here may go too, from this age [seconds]; default: they stay",
        )
        command.add_argument("--namespace", help="default: that of [lepton] runner, else of the Connection")
        command.add_argument("--kubernetes-conn-id", help="the Connection that opens the cluster")
        command.add_argument("--config-file", help="a kubeconfig instead of a Connection")
        command.add_argument("--cluster-context", help="a context of that kubeconfig")
        command.add_argument(
            "--in-cluster", action="store_const", const=True, help="use the service account here"
        )
        command.set_defaults(call=call)


def _pods(args: argparse.Namespace) -> tuple[Cluster, list[Item]]:
    """The cluster that the arguments, or else the installation's runner, name, and what lies in it."""
    if find_spec("airflow") is None:
        raise BadConfiguration(
            "pods: Airflow and its Kubernetes provider are not installed here: run it where a worker or scheduler runs."
        )
    from lepton_airflow import settings
    from lepton_airflow.airflow.connections import connection_of
    from lepton_airflow.pods.cluster import Cluster
    from lepton_airflow.pods.sweep import inventory
    from lepton_airflow.runners import Pod, default_runner
    from lepton_airflow.store.files import Store
    from lepton_airflow.store.identity import identity_of

    runner = default_runner()
    pod = runner if isinstance(runner, Pod) else Pod(image="none")  # it is only asked for its cluster
    names = ("namespace", "kubernetes_conn_id", "config_file", "cluster_context", "in_cluster")
    cluster = Cluster(
        replace(pod, **{n: v for n in names if (v := getattr(args, n)) is not None}), in_airflow=False
    )
    deployment = settings.setting("deployment", "airflow") or "airflow"
    conn_id = settings.setting("store_conn_id")
    store = Store(settings.default_store(), connection_of(conn_id) if conn_id else None)
    found = inventory(
        cluster, deployment, identity_of(store), older_than_s=args.older_than_s, now=time.time()
    )
    return cluster, found


def _pods_ls(args: argparse.Namespace) -> int:
    from lepton_airflow.pods.sweep import table

    cluster, items = _pods(args)
    if not items:
        print(f"nothing of lepton's is in namespace {cluster.namespace}", file=sys.stderr)
        return 0
    print("\n".join(table(items)))
    return 0


def _pods_sweep(args: argparse.Namespace) -> int:
    from lepton_airflow.pods.sweep import sweep, table

    cluster, items = _pods(args)
    gone = [item for item in items if item.why] if args.dry_run else sweep(cluster, items)
    if items:  # what stays is listed too, with why
        print("\n".join(table(items, () if args.dry_run else gone)))
    done = "would be deleted" if args.dry_run else "deleted"
    print(
        f"{_counted(gone)} {done} in namespace {cluster.namespace}; {_counted(i for i in items if i not in gone)} left"
    )
    return 0


def _counted(items: Iterable[Item]) -> str:
    kinds = [item.kind for item in items]
    pods, secrets = kinds.count("pod"), kinds.count("secret")
    return f"{pods} pod{'s' * (pods != 1)} and {secrets} Secret{'s' * (secrets != 1)}"
