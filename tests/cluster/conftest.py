"""What the tests on a Kubernetes cluster share: the cluster of ``$KUBECONFIG``, the image of its pods, namespaces, stores."""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.connections import Connection
from lepton_airflow.runners import Runner
from lepton_airflow.store import Store

ROOT = Path(__file__).parents[2]
KEY, SECRET = "testing", "s3-key-that-nobody-may-see"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, so that ``-m 'not cluster'`` leaves it out; the first test may wait for the image of its pods."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(1200))


def _without(reason: str) -> None:
    if os.environ.get("LEPTON_REQUIRE_ALL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@dataclass(frozen=True)
class Cluster:
    """A cluster, as the tests use it.

    :ivar image: what its pods run; it has every stage's libraries and this code.
    :ivar host: the address by which its pods reach this machine.
    """

    image: str
    host: str

    def kubectl(self, *args: str, text: str | None = None) -> str:
        """What ``kubectl ARGS`` prints; fails the test when it fails."""
        done = subprocess.run(
            ["kubectl", *args], check=False, capture_output=True, text=True, input=text, timeout=120
        )
        assert done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
        return done.stdout

    def items(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        """The objects of a kind in a namespace."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-n", namespace, "-o", "json"))[
            "items"
        ]
        return found


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster of ``$KUBECONFIG``, with an image for its pods; without one the tests skip."""
    if not os.environ.get("KUBECONFIG"):  # .ci/run sets it where there is one, so a skip here hides nothing
        pytest.skip("no Kubernetes cluster: set KUBECONFIG to the kubeconfig of one, such as kind's")
    try:
        nodes = subprocess.run(
            ["kubectl", "get", "nodes", "-o", "json", "--request-timeout=20s"],
            check=False,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        _without("kubectl is not installed: apt-get install kubernetes-client")
    if nodes.returncode:
        _without(
            f"the cluster of KUBECONFIG={os.environ['KUBECONFIG']} does not answer: {nodes.stderr.strip()}"
        )
    addresses = json.loads(nodes.stdout)["items"][0]["status"]["addresses"]
    node = next(a["address"] for a in addresses if a["type"] == "InternalIP")
    image = os.environ.get("LEPTON_TEST_IMAGE") or _image()
    return Cluster(image, os.environ.get("LEPTON_TEST_HOST") or _own_address_towards(node))


def _image() -> str:
    built = subprocess.run([ROOT / ".ci" / "cluster"], check=False, capture_output=True, text=True)
    if built.returncode:
        _without(f"no image for the pods; {built.stderr.strip().rpartition(chr(10))[2]}")
    return built.stdout.split()[-1]


def _own_address_towards(node: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((node, 9))
        address: str = probe.getsockname()[0]
        return address


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for the tests of one file; everything in it goes with it."""
    name = f"lepton-test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the nodes see at the same path, as a shared volume; anybody may write there.

    On a cluster whose nodes are not this machine, LEPTON_TEST_SHARED names a folder that is mounted into them.
    """
    root = os.environ.get("LEPTON_TEST_SHARED")
    folder = Path(root, secrets.token_hex(4)) if root else tmp_path_factory.mktemp("shared")
    before = os.umask(0)  # test and pods are different users
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    yield folder
    os.umask(before)


@pytest.fixture(scope="module")
def make_pod(cluster: Cluster, namespace: str, shared: Path) -> Callable[..., Runner]:
    """``make_pod(memory="1Gi")``: a runner in this file's namespace whose pods see the shared folder."""

    def make(**settings: Any) -> Runner:
        from lepton_airflow.runners import Pod

        user = {"runAsUser": os.getuid(), "runAsGroup": os.getgid()} if os.getuid() else {}
        given: dict[str, Any] = {
            "image": cluster.image,
            "namespace": namespace,
            "config_file": os.environ["KUBECONFIG"],
            "image_pull_policy": "IfNotPresent",
            "cpu": "100m",
            "memory": "1500Mi",
            "grace_s": 5.0,
            "volumes": [{"name": "shared", "mount": str(shared), "host_path": str(shared)}],
            "security": user,  # so that the files on a shared volume belong to whom the test is
        }
        return Pod(**(given | settings))

    return make


@pytest.fixture(scope="session")
def s3(cluster: Cluster) -> Iterator[Connection]:
    """An S3 server that test and pods reach at one address, as the Connection that opens it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=cluster.host, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Connection("s3", "aws", login=KEY, password=SECRET, extra={"endpoint_url": f"http://{host}:{port}"})
    server.stop()


@pytest.fixture
def bucket(s3: Connection) -> str:
    """The URI of a store in a new bucket."""
    name = f"b{secrets.token_hex(8)}"
    Store(f"s3://{name}/store", s3).fs.mkdir(name)
    return f"s3://{name}/store"


@pytest.fixture
def hidden(cluster: Cluster, namespace: str) -> Callable[[str], list[str]]:
    """``hidden(secret)``: the objects of the namespace in which a secret can be read, Secrets themselves left out."""

    def holders(secret: str) -> list[str]:
        forms = (secret, base64.b64encode(secret.encode()).decode())
        return [
            f"{kind} {item['metadata']['name']}"
            for kind in ("pods", "events", "configmaps")
            for item in cluster.items(kind, namespace)
            if any(form in json.dumps(item) for form in forms)
        ]

    return holders


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What anybody says here; Airflow's own logging may keep it from pytest's."""
    records: list[logging.LogRecord] = []
    lines: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        if record not in records:  # a record passes several of these loggers
            records.append(record)
            lines.append(record.getMessage())

    handler = logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "lepton_airflow", "lepton_airflow.stage")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield lines
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
