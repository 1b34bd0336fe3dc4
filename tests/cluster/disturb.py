"""The drills: what befalls a pod, a worker, a cluster, done for real to one task of a running Airflow.

``test_drills.py`` runs them on Pod and asserts; ``benchmarks/drills.py`` runs them on Pod and on a plain
KubernetesPodOperator and puts both into a table.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lepton_airflow.errors import LeptonError
from lepton_airflow.testing import LocalAirflow

HERE = Path(__file__).parent
SLOW_S = 480  # until something happens on a busy machine


@dataclass
class Outcome:
    """How a drill ended.

    :ivar state: of the task: ``success``, ``failed``, …
    :ivar tries: how many tries the task used. Tries of which Airflow keeps no record are not counted: when its scheduler learns
        late that a worker has deferred a task, it takes the resumed task for dead and starts it again.
    :ivar pods: how many pods were ever made for it, by uid.
    :ivar alive: how many of them still ran when the task had ended.
    :ivar starts: how often the stage itself began.
    :ivar log: of all tries.
    :ivar notes: what the drill saw on its way.
    """

    state: str
    tries: int
    pods: int
    alive: int
    starts: int
    log: str
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Arena:
    """An Airflow, a namespace, and everything that a drill does to them.

    :param shared: a folder that pods see at the same path.
    :param kind: which DAGs are drilled: ``drill`` (Pod) or ``plain`` (KubernetesPodOperator).
    """

    airflow: LocalAirflow
    namespace: str
    shared: Path
    kind: str
    proxy: Proxy
    # every pod ever seen, by uid: as it was last
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    # the task instances, by DAG and run: a second old
    instances: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Write down every pod of the namespace from now on."""
        command = [
            "kubectl",
            "get",
            "pods",
            "-n",
            self.namespace,
            "--watch",
            "--output-watch-events",
            "-o",
            "json",
        ]
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert watch.stdout is not None
        reader = threading.Thread(target=self._write_down, args=(watch.stdout,), daemon=True)
        reader.start()
        try:
            yield
        finally:
            watch.terminate()
            watch.wait()
            reader.join(timeout=10)

    def _write_down(self, stream: Any) -> None:
        decoder, text = json.JSONDecoder(), ""
        for line in stream:  # older versions print an event in one line, newer ones in many
            text += line
            with suppress(ValueError):
                event, _ = decoder.raw_decode(text)
                pod = event["object"] | {"gone": event["type"] == "DELETED"}
                self.pods[pod["metadata"]["uid"]] = pod
                text = ""

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Ask Airflow for all task instances once a second, so that many drills at once do not."""
        over = threading.Event()

        def ask() -> None:
            while not over.wait(1):
                with suppress(LeptonError):
                    found = self.airflow.api(
                        "GET", "/dags/~/dagRuns/~/taskInstances", limit=100, order_by="-run_after"
                    )
                    self.instances = {(t["dag_id"], t["dag_run_id"]): t for t in found["task_instances"]}

        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        try:
            yield
        finally:
            over.set()
            asker.join(timeout=60)

    def pods_of(self, drill: str) -> list[dict[str, Any]]:
        """All pods ever made for a drill, oldest first."""
        found = [p for p in list(self.pods.values()) if p["metadata"].get("labels", {}).get("drill") == drill]
        return sorted(found, key=lambda p: p["metadata"]["creationTimestamp"])

    def alive(self, drill: str) -> list[dict[str, Any]]:
        """Those that run or may run, and that nobody asked to go."""
        return [
            p
            for p in self.pods_of(drill)
            if not p["gone"]
            and not p["metadata"].get("deletionTimestamp")
            and p["status"]["phase"] in ("Pending", "Running")
        ]

    def start(self, how: str, **params: Any) -> Task:
        """Start a run of one of the drills' DAGs."""
        drill = f"d{secrets.token_hex(4)}"
        folder = self.shared / drill
        folder.mkdir()
        folder.chmod(0o777)
        dag = f"{self.kind}_{how}"
        run = self.airflow.trigger(dag, {"drill": drill, "folder": str(folder), **params})
        return Task(self, dag, run, drill, folder)


def environment(image: str, namespace: str, shared: Path, *, plain: bool) -> dict[str, str]:
    """What the Airflow of the drills needs: their settings, and lost heartbeats noticed after 15 s, not 300."""
    code = shared / "code"
    code.mkdir()
    shutil.copy(HERE / "in_pods" / "drill_stages.py", code)
    (shared / "store").mkdir(mode=0o777)
    user = {"runAsUser": os.getuid(), "runAsGroup": os.getgid()} if os.getuid() else {}
    settings = {
        "image": image,
        "namespace": namespace,
        "shared": str(shared),
        "code": str(code),
        "config_file": os.environ["KUBECONFIG"],
        "security": user,
        "plain": plain,
    }
    return {
        "LEPTON_DRILLS": json.dumps(settings),
        "AIRFLOW__LEPTON__STORE": str(shared / "store"),
        "AIRFLOW__CORE__MAX_ACTIVE_RUNS_PER_DAG": "100",
        "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "100",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "3",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "15",
    }


@contextmanager
def arena(airflow: LocalAirflow, namespace: str, shared: Path, kind: str) -> Iterator[Arena]:
    """An arena whose pods are written down while it is open."""
    proxy = Proxy(own_config()["clusters"][0]["cluster"]["server"])
    made = Arena(airflow, namespace, shared, kind, proxy)
    try:
        with made.watched(), made.asked():
            yield made
    finally:
        proxy.close()


@dataclass
class Task:
    """One task under drill."""

    arena: Arena
    dag: str
    run: str
    drill: str
    folder: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def instance(self) -> dict[str, Any]:
        """The task instance, as Airflow's API showed it a second ago."""
        return self.arena.instances.get((self.dag, self.run), {"id": "", "state": None, "try_number": 0})

    @property
    def starts(self) -> list[str]:
        """The names of the pods in which the stage began."""
        file = self.folder / "starts"
        return file.read_text().split() if file.exists() else []

    def until(self, condition: Callable[[], bool], what: str, wait_s: float = SLOW_S) -> None:
        """Wait for a condition, while Airflow's components run."""
        self.arena.airflow.until(condition, f"{self.dag} {self.drill}: {what}", wait_s)

    def until_it_runs(self, times: int = 1) -> str:
        """Wait until the stage has begun that many times; returns the name of its last pod."""
        self.until(
            lambda: len(self.starts) >= times or self.instance["state"] in ("success", "failed"),
            f"start {times} of the stage",
        )
        return self.starts[times - 1]

    def until_state(self, *states: str) -> str:
        """Wait until the task is in one of these states."""
        self.until(lambda: self.instance["state"] in states, f"one of {states}")
        return str(self.instance["state"])

    def until_watched(self) -> None:
        """Wait until its trigger runs: Airflow does not tell a trigger of what ended before it ran.

        The first trigger of a triggerer may take a minute to begin on a busy machine, because Airflow builds its own API there.
        """
        self.until_state("deferred")

        says = r"pod \S+ runs" if self.arena.kind == "drill" else r"\(ID \d+\) starting"

        def watched() -> bool:
            log = self.arena.airflow.log(self.dag, self.run, "stage", int(self.instance["try_number"]))
            return re.search(says, log) is not None

        self.until(watched, "its trigger to see it run")

    def until_logged(self, text: str) -> None:
        """Wait until the task's log holds what the pod wrote: the log of a pod that is gone cannot be read."""
        if self.arena.kind == "drill":  # a plain pod's log comes at its end

            def logged() -> bool:
                log = self.arena.airflow.log(self.dag, self.run, "stage", int(self.instance["try_number"]))
                return text in log

            self.until(logged, f"{text!r} in its log")

    def go(self) -> None:
        """Let the stage end."""
        (self.folder / "go").touch()

    def end(self, **notes: Any) -> Outcome:
        """Wait for the end of the run."""
        self.until_state("success", "failed")
        seconds = time.monotonic() - self.began
        with suppress(Exception):  # what still runs may be about to be removed
            self.until(lambda: not self.arena.alive(self.drill), "its pods to end", 60)
        instance = self.instance
        logs = [self._log(n) for n in range(1, int(instance["try_number"]) + 1)]
        return Outcome(
            state=instance["state"],
            tries=len([text for text in logs if text is not None]),
            pods=len(self.arena.pods_of(self.drill)),
            alive=len(self.arena.alive(self.drill)),
            starts=len(self.starts),
            log="\n".join(text or "(a try without a record)" for text in logs),
            seconds=round(seconds, 1),
            notes=notes,
        )

    def _log(self, n: int) -> str | None:
        try:
            return self.arena.airflow.log(self.dag, self.run, "stage", n)
        except LeptonError as error:
            if ": 404 " in str(error):
                return None
            raise


class Proxy:
    """The API server behind a port of our own that can be cut, so that it goes away for one client and not for others."""

    def __init__(self, server: str) -> None:
        host, _, port = server.removeprefix("https://").partition(":")
        self._target = (host, int(port or 443))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._up = threading.Event()
        self._up.set()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if not self._up.is_set():
                return
            with socket.create_connection(self._target, timeout=10) as server:
                pair = {client: server, server: client}
                self._open |= set(pair)
                try:
                    while True:
                        ready, _, _ = select.select(list(pair), [], [], 0.2)
                        if not self._up.is_set():
                            return
                        for source in ready:
                            data = source.recv(1 << 16)
                            if not data:
                                return
                            pair[source].sendall(data)
                finally:
                    self._open -= set(pair)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Refuse new connections and close the open ones."""
        self._up.clear()
        try:
            yield
        finally:
            self._up.set()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


# The drills -------------------------------------------------------------------------------------------------------------


def kubectl(*args: str, text: str | None = None) -> str:
    """What ``kubectl ARGS`` prints."""
    done = subprocess.run(
        ["kubectl", *args], check=False, capture_output=True, text=True, input=text, timeout=60
    )
    assert done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
    return done.stdout


def undisturbed(arena: Arena, how: str) -> Outcome:
    """Nothing happens."""
    task = arena.start(how)
    task.until_it_runs()
    task.go()
    return task.end()


def pod_deleted(arena: Arena, how: str) -> Outcome:
    """Somebody deletes the pod while the stage runs."""
    task = arena.start(how)
    pod = task.until_it_runs()
    task.until_logged("start 1 of the stage")
    kubectl("delete", "pod", pod, "-n", arena.namespace, "--wait=false")
    return _once_more(task)


def _once_more(task: Task) -> Outcome:
    """Wait until the stage begins again, or the run ends without; then let it end."""
    task.until(
        lambda: len(task.starts) > 1 or task.instance["state"] in ("success", "failed"),
        "a second start, or the end",
    )
    task.go()
    return task.end()


def evicted(arena: Arena, how: str) -> Outcome:
    """The pod is evicted, as ``kubectl drain`` does."""
    task = arena.start(how)
    pod = task.until_it_runs()
    task.until_logged("start 1 of the stage")
    version = "policy/v1" if "policy/v1\n" in kubectl("api-versions") else "policy/v1beta1"
    if '"minor": "20"' in kubectl("get", "--raw", "/version"):
        version = "policy/v1beta1"
    eviction = {
        "apiVersion": version,
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": arena.namespace},
    }
    kubectl(
        *("create", "--raw", f"/api/v1/namespaces/{arena.namespace}/pods/{pod}/eviction", "-f", "-"),
        text=json.dumps(eviction),
    )
    return _once_more(task)


def out_of_memory(arena: Arena, how: str) -> Outcome:
    """The stage takes more than its 64 MiB."""
    return arena.start(how, memory="64Mi", megabytes=200).end()


def no_image(arena: Arena, how: str) -> Outcome:
    """The image does not exist."""
    return arena.start(how, image="localhost/no-such-image:1").end()


def unschedulable(arena: Arena, how: str) -> Outcome:
    """No node has a thousand CPUs."""
    return arena.start(how, cpu="1000").end()


def full_quota(arena: Arena, how: str) -> Outcome:
    """The quota is full when the pod is made; later another pod that fills it ends."""
    name = f"{arena.namespace}-quota"
    kubectl("create", "namespace", name)
    try:
        kubectl("create", "quota", "team", "--hard=pods=1", "-n", name)
        # It need not run to count.
        containers = [{"name": "none", "image": "example.invalid/none"}]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "another"}}
        kubectl("create", "-n", name, "-f", "-", text=json.dumps(pod | {"spec": {"containers": containers}}))
        task = arena.start(how, namespace=name)
        task.until(
            lambda: "exceeded quota" in _text(task) or "Quota 'team'" in _text(task), "the refusal in the log"
        )
        waits = "running" if how == "sync" else "deferred"
        state = task.until_state(waits, "up_for_retry", "success", "failed")
        task.go()
        kubectl("delete", "pod", "another", "-n", name, "--wait=false")
        ended = task.end(state_while_full=state)
        ended.pods = ended.starts  # its pods are in a namespace that nobody watches
        return ended
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def _text(task: Task) -> str:
    with suppress(Exception):
        return task.arena.airflow.log(task.dag, task.run, "stage", 1)
    return ""


def wrong_namespace(arena: Arena, how: str) -> Outcome:
    """The namespace does not exist."""
    return arena.start(how, namespace="no-such-namespace").end()


def rbac_denied(arena: Arena, how: str) -> Outcome:
    """The service account may do nothing."""
    file = arena.shared / f"nobody-{arena.kind}.kubeconfig"
    with suppress(AssertionError):
        kubectl("create", "serviceaccount", "nobody", "-n", arena.namespace)
    file.write_text(kubeconfig_of(arena.namespace, "nobody"))
    return arena.start(how, config_file=str(file)).end()


def marked_failed(arena: Arena, how: str) -> Outcome:
    """A person marks the task failed while the stage runs."""
    return _marked(arena, how, "failed")


def marked_success(arena: Arena, how: str) -> Outcome:
    """A person marks the task as success while the stage runs."""
    return _marked(arena, how, "success")


def _marked(arena: Arena, how: str, state: str) -> Outcome:
    task = arena.start(how)
    task.until_it_runs()
    if how != "sync":
        task.until_watched()
    arena.airflow.api(
        "PATCH", f"/dags/{task.dag}/dagRuns/{task.run}/taskInstances/stage", {"new_state": state}
    )
    return task.end()


def cleared(arena: Arena, how: str) -> Outcome:
    """A person clears the task while the stage runs."""
    task = arena.start(how)
    task.until_it_runs()
    if how != "sync":
        task.until_watched()
    before = task.instance["id"]
    arena.airflow.clear(task.dag, task.run, ["stage"])
    task.until(
        lambda: task.instance["id"] != before and task.instance["state"] in ("running", "deferred"),
        "the new try",
    )
    task.until_state("deferred" if how != "sync" else "running")
    task.until(lambda: len(arena.alive(task.drill)) == 1, "exactly one live pod")
    (live,) = arena.alive(task.drill)
    task.until(lambda: live["metadata"]["name"] in task.starts, "the stage in the live pod")
    alive = len(arena.alive(task.drill))
    task.go()
    return task.end(alive_after_clear=alive)


def no_receipt(arena: Arena, how: str) -> Outcome:
    """What runs in the pod ends with exit code 0 and leaves nothing: the interpreter is ``true``."""
    return arena.start(how, python="true").end()


def worker_killed(arena: Arena, how: str = "sync") -> Outcome:
    """The worker gets SIGKILL, the task's process and its supervisor, while the stage runs."""
    task = arena.start(how)
    task.until_it_runs()
    process = _process_titled(f"airflow worker -- {task.instance['id']}")
    for pid in (_parent(process), process):
        os.kill(pid, signal.SIGKILL)
    first = task.instance["id"]
    task.until(
        lambda: task.instance["id"] != first and task.instance["state"] == "running", "the next try to run"
    )
    task.go()
    return task.end()


def _process_titled(title: str) -> int:
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and title in (folder / "cmdline").read_bytes().decode():
                return int(folder.name)
    raise AssertionError(f"no process is called {title!r}")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def component_killed(arena: Arena, how: str, component: str) -> Outcome:
    """A component of Airflow gets SIGKILL while the stage runs, and is started again."""
    task = arena.start(how)
    task.until_it_runs()
    if how != "sync":
        task.until_state("deferred")
    arena.airflow.stop_component(component, signal.SIGKILL)
    arena.airflow.start_component(component)
    task.until(lambda: _heartbeat(arena, component), f"the {component} to be back", 120)
    task.go()
    return task.end()


def triggerer_down_and_swept(arena: Arena, how: str) -> Outcome:
    """A person marks the task failed while no triggerer runs that could end its pod; then the pods are swept."""
    task = arena.start(how)
    pod = task.until_it_runs()
    task.until_watched()
    arena.airflow.stop_component("triggerer", signal.SIGKILL)
    try:
        arena.airflow.api(
            "PATCH", f"/dags/{task.dag}/dagRuns/{task.run}/taskInstances/stage", {"new_state": "failed"}
        )
        task.until_state("failed")
        left = len(arena.alive(task.drill))
        printed = [pods_command(arena, "ls"), pods_command(arena, "sweep")]
    finally:
        arena.airflow.start_component("triggerer")
    task.until(lambda: _heartbeat(arena, "triggerer"), "the triggerer to be back", 120)
    return task.end(left=left, printed=printed, pod=pod)


def pods_command(arena: Arena, *arguments: str) -> str:
    """What ``python -m lepton_airflow pods ARGUMENTS`` prints on a machine of this Airflow."""
    command = [sys.executable, "-m", "lepton_airflow", "pods", *arguments, "--namespace", arena.namespace]
    done = subprocess.run(
        [*command, "--config-file", os.environ["KUBECONFIG"]],
        check=False,
        capture_output=True,
        text=True,
        env=arena.airflow.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _heartbeat(arena: Arena, component: str) -> bool:
    with suppress(Exception):
        health = arena.airflow.api("GET", "/monitor/health")
        return bool(health[component.replace("-", "_")]["status"] == "healthy")
    return False


def api_server_away(arena: Arena, how: str, seconds: float = 20.0) -> Outcome:
    """The API server does not answer for 20 s while the stage runs."""
    file = arena.shared / f"proxied-{arena.kind}.kubeconfig"
    file.write_text(_proxied(arena.proxy.port))
    task = arena.start(how, config_file=str(file))
    task.until_it_runs()
    if how != "sync":
        task.until_state("deferred")
    with arena.proxy.cut():
        over = time.monotonic() + seconds
        task.until(lambda: time.monotonic() > over, "the time to pass")
    task.go()
    return task.end()


def own_config() -> dict[str, Any]:
    """The kubeconfig in use, with its certificates inside."""
    found: dict[str, Any] = json.loads(
        kubectl("config", "view", "--minify", "--flatten", "--raw", "-o", "json")
    )
    return found


def _proxied(port: int) -> str:
    config = own_config()
    cluster = config["clusters"][0]["cluster"]
    cluster["server"] = f"https://127.0.0.1:{port}"
    return json.dumps(config)


def kubeconfig_of(namespace: str, account: str) -> str:
    """A kubeconfig with which one is this service account."""
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600},
    }
    answer = kubectl(
        *("create", "--raw", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", "-f", "-"),
        text=json.dumps(request),
    )
    config = own_config()
    config["users"][0]["user"] = {"token": json.loads(answer)["status"]["token"]}
    return json.dumps(config)
