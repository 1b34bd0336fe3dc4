"""The model server against a server written by hand and against other projects' servers, under load, attacks and for ten minutes.

A model of 26 inputs (20 numbers, 6 categories) answers requests of 1, 100 and 10,000 rows, as JSON and as binary tensors. The
server written by hand is benchmarks/servers/bare.py: FastAPI, uvicorn, orjson and ONNX Runtime, without a check. The numbers of
`cpu_per_request_vs_bare` are CPU seconds of all processes of a server for one request, medians of interleaved rounds with four
clients. `rows_per_s_vs_bare_ort` is one client's rows a second over those of ONNX Runtime on the same rows in this process, on one thread.
Under each attack, made by one address, a client of another address asks for one row 20 times a second and waits at most 2 s for each
answer. The model is a logistic regression, whose computing is small beside the reading; for rows a second it is boosted trees, which take
0.6 ms for 100 rows. Requests a second of two workers and of one are those of 32 clients of wrk, an HTTP load generator; load and servers
share the machine.

`rps_vs_…` are requests a second of one worker over those of MLServer, KServe's Python server, LitServe and MLflow's scoring server, of the
same 32 clients, medians of interleaved rounds; `p99_ms_…` the 99th percentile of the time of one. Each peer has one process that reads
requests (LitServe a second one that computes), the same model by the same ONNX Runtime on one thread, and JSON in its own protocol, which
for MLServer and KServe is the same as ours. Before, its answers are compared with ours for the same rows: all outputs must be equal as
float32, to the last bit. The servers are benchmarks/servers/on_….py. A peer that cannot be installed is `None`, and `…_is_not_measured` says why.

`memory_mib_…` is the resident memory of the server with two workers, 2 minutes after the beginning and at the end of 10 minutes of mixed load,
the median of 30 s each: 1, 100 and 10,000 rows, in JSON and binary, plain and packed, requests that are refused, clients that
are gone before their answer, `/metrics` and other pages, and another version every 30 s.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVERS = Path(__file__).parent / "servers"
GOALS = {
    "cpu_per_request_vs_bare_1": "at most 1.0",
    "cpu_per_request_vs_bare_100": "at most 1.0",
    "cpu_per_request_vs_bare_10000": "at most 1.0",
    "cpu_per_request_binary_vs_bare_10000": "at most 0.5",
    "rows_per_s_vs_bare_ort_json": "0.6",
    "rows_per_s_vs_bare_ort_binary": "0.9",
    "rps_two_workers_vs_one": "1.8",
    "failed_requests": "0",
    "good_client_answered_under_attack": "1.0",
    "memory_growth_mib": "at most 16",
    "memory_answered_wrongly": "0",
}
_BARE = ["fastapi", "uvicorn", "httptools", "uvloop", "orjson", "onnxruntime", "numpy"]
_SECONDS, _ROUNDS, _CLIENTS = 1.5, 5, 4
_INFER = "/v2/models/bench/infer"


@dataclass(kw_only=True)
class _Bench:
    """What the parts measure: a server of one worker and one of two, which serve the endpoint ``bench``."""

    run: Any
    home: Path
    models: list[str]
    one: Any
    two: Any
    memory_minutes: float

    def deploy(self, uri: str) -> None:
        from lepton_airflow.stages.deploy_model import DeployModel

        workdir = Path(tempfile.mkdtemp(dir=self.home))
        stage = DeployModel(endpoint="bench", model=uri, timeout_s=60, max_latency_ms=5000)
        stage.run(replace(self.run, run_key=f"deploy-{workdir.name}", workdir=workdir))

    def model(self, number: int) -> Path:
        found: Path = self.run.fetch(self.models[number]) / "model.onnx"
        return found


def measure(*options: str) -> dict[str, Any]:
    """Measure it all, or what ``--only`` names; twenty minutes, of which ten for the memory."""
    sys.path.insert(0, str(ROOT))
    from lepton_airflow.stages import RunInfo
    from lepton_airflow.testing import LocalEndpoint

    parser = argparse.ArgumentParser("bench: serving")
    parser.add_argument("--only", default=",".join(_PARTS), help=f"some of {', '.join(_PARTS)}")
    parser.add_argument("--memory-minutes", type=float, default=10.0)
    asked = parser.parse_args(options)
    only = asked.only.split(",")
    if unknown := sorted(set(only) - set(_PARTS)):
        parser.error(f"--only: there is no part {', '.join(unknown)}; known: {', '.join(_PARTS)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        run = RunInfo.local(home / "run")
        one, two = [
            stack.enter_context(
                LocalEndpoint("bench", run.store.root, home / f"serve-{n}", options=("--workers", str(n)))
            )
            for n in (1, 2)
        ]
        models = [_train(run, home, seed) for seed in (0, 1)]
        bench = _Bench(
            run=run,
            home=home,
            models=models,
            one=one,
            two=two,
            memory_minutes=asked.memory_minutes,
        )
        for part in (name for name in _PARTS if name in only):
            print(f"-- {part}", flush=True)
            bench.deploy(models[0])
            found |= _PARTS[part](bench)
    return found


def _frame(seed: int) -> Any:
    import numpy as np
    import pandas as pd

    rng, n = np.random.default_rng(seed), 10_000
    frame = pd.DataFrame({f"f{i}": rng.normal(size=n).astype("float32").astype(float) for i in range(20)})
    for i in range(6):
        frame[f"c{i}"] = rng.choice(["AA", "UA", "B6", "DL"], n)
    return frame.assign(target=(frame["f0"] + frame["f1"] * frame["f2"] > 0).astype(int))


def _train(run: Any, home: Path, seed: int, trainer: str = "logistic_regression") -> str:
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lepton_airflow.data.dataset import DatasetInfo
    from lepton_airflow.data.profile import reference_profile
    from lepton_airflow.stages.train_model import TrainModel

    frame = _frame(seed)
    features = [c for c in frame if c != "target"]
    categorical = [c for c in features if c.startswith("c")]
    info = DatasetInfo(
        target="target",
        task="classification",
        features=features,
        categorical=categorical,
        classes=[0, 1],
        split="train",
        split_id=str(seed),
        rows=len(frame),
    )
    with duckdb.connect() as con:
        con.register("frame", frame)
        (home / f"{seed}.json").write_text(json.dumps(reference_profile(con, "frame", info, None)))
    told = {b"lepton": json.dumps(asdict(info)).encode()}
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(told)
    pq.write_table(table, home / f"{seed}.parquet")
    workdir = home / f"train-{seed}"
    workdir.mkdir()
    stage = TrainModel(
        dataset=str(home / f"{seed}.parquet"),
        profile=str(home / f"{seed}.json"),
        trainer=trainer,
    )
    uri: str = stage.run(replace(run, run_key=f"train-{seed}", workdir=workdir)).artifacts["model"].uri
    return uri


@contextmanager
def _server(
    name: str, requirements: Sequence[str], script: str, model: Path, home: Path
) -> Iterator[tuple[int, int]]:
    """The port and the process of another server with a model, in an environment of its own."""
    from lepton_airflow.testing import processes

    port = processes.free_port()
    command = [str(_environment(name, requirements)), str(SERVERS / script), str(model), str(port)]
    with _process(command, port, home) as pid:
        yield port, pid


def _environment(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of an environment with these packages and nothing of ours, made once."""
    home = ROOT / ".cache" / f"bench-{name}"
    complete = home / ".complete"
    wanted = "\n".join(requirements)
    if not complete.exists() or complete.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        uv = [sys.executable, "-m", "uv"]
        _called([*uv, "venv", "--python", sys.executable, str(home)])
        _called([*uv, "pip", "install", "--system-certs", "--python", str(home), *requirements])
        complete.write_text(wanted)
    return home / "bin" / "python"


def _called(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} failed: {done.stderr.strip()[-500:]}")


@contextmanager
def _process(command: list[str], port: int, home: Path) -> Iterator[int]:
    """Start a server in a folder and wait until it listens; its process and what that started end with the block."""
    name = Path(command[1]).stem
    log = home / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=home, stdout=out, stderr=out, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{name} does not listen: {log.read_text(errors='replace')[-500:]}")
                time.sleep(0.1)
            yield process.pid
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def _body(rows: int, *, binary: bool = False) -> tuple[bytes, dict[str, str]]:
    frame = _frame(0).drop(columns="target").iloc[:rows]
    inputs, blobs = [], []
    for name, column in frame.items():
        is_number = str(name).startswith("f")
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": "FP32" if is_number else "BYTES",
            "shape": [rows, 1],
        }
        if binary:
            texts = (text.encode() for text in column) if not is_number else ()
            blob = (
                column.to_numpy().astype("<f4").tobytes()
                if is_number
                else b"".join(len(t).to_bytes(4, "little") + t for t in texts)
            )
            tensor["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            tensor["data"] = column.tolist()
        inputs.append(tensor)
    asked: dict[str, Any] = {"inputs": inputs}
    if not binary:
        return json.dumps(asked).encode(), {}
    head = json.dumps(asked | {"parameters": {"binary_data_output": True}}).encode()
    return b"".join([head, *blobs]), {"Inference-Header-Content-Length": str(len(head))}


def _cpu_s(pid: int) -> float:
    import psutil

    process = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])


def _load(
    port: int, request: tuple[bytes, dict[str, str]], clients: int, pid: int = 0
) -> tuple[float, float]:
    """CPU milliseconds a request of the process, and requests a second."""
    body, headers = request
    counts = [0] * clients
    before = _cpu_s(pid) if pid else 0.0
    started = time.monotonic()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.monotonic() - started < _SECONDS:
            connection.request("POST", _INFER, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(content[:300])
            counts[number] += 1

    _together([lambda n=n: client(n) for n in range(clients)])  # type: ignore[misc]
    took = time.monotonic() - started
    return (1000 * (_cpu_s(pid) - before) / sum(counts) if pid else 0.0), sum(counts) / took


def _together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _cpu(bench: _Bench) -> dict[str, float]:
    from lepton_airflow.testing import processes

    ours = bench.one.port, processes.pid("endpoint-bench", bench.one.home) or 0
    found: dict[str, float] = {}
    with _server("bare", _BARE, "bare.py", bench.model(0), bench.home) as bare:
        for rows in (1, 100, 10_000):
            found |= _against_bare(rows, ours, bare)
    return found


def _against_bare(rows: int, ours: tuple[int, int], bare: tuple[int, int]) -> dict[str, float]:
    json_body, binary = _body(rows), _body(rows, binary=True)
    cpu: dict[str, list[float]] = {"ours": [], "bare": [], "binary": []}
    for _ in range(_ROUNDS):
        for name, (port, pid), body in (
            ("ours", ours, json_body),
            ("bare", bare, json_body),
            ("binary", ours, binary),
        ):
            cpu[name].append(_load(port, body, _CLIENTS, pid)[0])
    middle = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        f"cpu_ms_per_request_{rows}": round(middle["ours"], 3),
        f"cpu_per_request_vs_bare_{rows}": round(middle["ours"] / middle["bare"], 2),
        f"cpu_per_request_binary_vs_bare_{rows}": round(middle["binary"] / middle["bare"], 2),
    }


def _rows(bench: _Bench) -> dict[str, float]:
    """Rows a second against those of ONNX Runtime."""
    import numpy as np
    import onnxruntime

    trees = _train(bench.run, bench.home, 2, "hist_gradient_boosting")
    bench.deploy(trees)
    model = bench.run.fetch(trees) / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options)
    frame = _frame(0)
    feed = {
        i.name: frame[i.name].to_numpy(dtype=np.float32 if "float" in i.type else object).reshape(-1, 1)
        for i in session.get_inputs()
    }
    rates: dict[str, list[float]] = {"ort": [], "json": [], "binary": []}
    bodies = {"json": _body(10_000), "binary": _body(10_000, binary=True)}
    for _ in range(_ROUNDS):
        started, count = time.monotonic(), 0
        while time.monotonic() - started < _SECONDS:
            session.run(None, feed)
            count += 1
        rates["ort"].append(count / (time.monotonic() - started))
        for name, body in bodies.items():
            rates[name].append(_load(bench.one.port, body, 1)[1])
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {f"rows_per_s_vs_bare_ort_{n}": round(middle[n] / middle["ort"], 2) for n in ("json", "binary")}


def _wrk(home: Path, port: int, path: str, body: bytes) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of the time of one [ms]."""
    script = home / "post.lua"
    script.write_text(
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = [==[{body.decode()}]==]\n'
    )
    url = f"http://127.0.0.1:{port}{path}"
    command = [
        "wrk",
        "-t1",
        "-c32",
        f"-d{2 * _SECONDS:g}s",
        "--latency",
        "--timeout",
        "10s",
        "-s",
        str(script),
        url,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in printed or "Socket errors" in printed:
        raise RuntimeError(printed)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", printed)
    slowest = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    assert rate, printed
    assert slowest, printed
    return float(rate[1]), float(slowest[1]) * {"us": 0.001, "ms": 1, "s": 1000}[slowest[2]]


def _workers(bench: _Bench) -> dict[str, float]:
    """Requests a second of two workers against one, of one row and of 100, where the load takes a smaller part of the machine."""
    found = {}
    for rows, name in ((1, "rps_two_workers_vs_one"), (100, "rps_two_workers_vs_one_100")):
        body, _ = _body(rows)
        runs = [
            [_wrk(bench.home, s.port, _INFER, body)[0] for s in (bench.one, bench.two)]
            for _ in range(_ROUNDS)
        ]
        one, two = (statistics.median(of) for of in zip(*runs, strict=True))
        found[name] = round(two / one, 2)
    return found


def lacks() -> str:
    """What is missing here."""
    return "" if shutil.which("wrk") else "wrk is not installed: apt-get install wrk"


def _changes(bench: _Bench) -> dict[str, int]:
    """Requests and failures during 20 changes of the version."""
    body, _ = _body(10)
    stop, failed, answered = threading.Event(), [0], [0]

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", bench.two.port, timeout=30)
        while not stop.is_set():
            try:
                connection.request("POST", _INFER, body)
                answer = connection.getresponse()
                answer.read()
                failed[0] += answer.status != 200
                answered[0] += answer.status == 200
            except (OSError, http.client.HTTPException):
                failed[0] += 1
                connection.close()

    def change() -> None:
        for number in range(20):
            bench.deploy(bench.models[(number + 1) % 2])
        stop.set()

    _together([change, *[client] * _CLIENTS])
    return {"failed_requests": failed[0], "requests_during_20_changes": answered[0]}


# -- attacks ----------------------------------------------------------------------------------------------------------


def _attacks(bench: _Bench) -> dict[str, float]:
    """What a good client gets of a server of its own while another address attacks that."""
    from benchmarks.servers.attacks import ATTACKS, GRPC_ATTACKS, Target, attacked, repeating
    from lepton_airflow.testing import LocalEndpoint, processes

    grpc_port = processes.free_port()
    options = ("--grpc-port", str(grpc_port), "--drain-s", "3")
    with LocalEndpoint("bench", bench.run.store.root, bench.home / "attacked", options=options) as server:
        server.wait_ready()
        target = Target(server.port, "bench", lambda rows, binary: _body(rows, binary=binary), grpc=grpc_port)
        tried = {name: attacked(target, attack) for name, attack in (ATTACKS | GRPC_ATTACKS).items()}
        many = repeating(80, lambda t: t.rows(t.large))
        tried["large_requests_of_both"] = attacked(target, many, rows=10_000, asked=30, wait_s=10)
        pid = processes.pid("endpoint-bench", server.home) or 0
        tried["metrics_in_the_drain"] = attacked(
            target, ATTACKS["metrics"], asked=40, then=lambda: os.kill(pid, signal.SIGTERM)
        )
    found: dict[str, float] = {}
    for name, (share, worst) in tried.items():
        found[f"good_client_answered_under_{name}"] = share
        found[f"good_client_p99_ms_under_{name}"] = worst
    return found | {"good_client_answered_under_attack": min(share for share, _ in tried.values())}


# -- peers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """Another model server: the packages that its environment needs, where it answers, and what it reads and writes."""

    requirements: tuple[str, ...]
    path: str = _INFER
    request: Callable[[dict[str, Any]], Any] = lambda asked: asked  # of the Open Inference Protocol's
    answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda told: {
        output["name"]: output["data"] for output in told["outputs"]
    }


# Pinned, so that a run can be compared with the next one: the newest that could be installed in December 2026. What they need comes with
# them (setuptools, too); ONNX Runtime is the version of this environment, so that answers are equal to the last bit.
_PEERS = {
    "mlserver": _Peer(requirements=("mlserver==1.7.1",)),  # it has no newer one for a year; fastapi < 0.116
    "kserve": _Peer(
        requirements=("kserve==0.21.0", "setuptools")
    ),  # its client of Kubernetes imports setuptools
    "litserve": _Peer(
        requirements=("litserve==0.2.19",),
        path="/predict",
        request=lambda asked: {tensor["name"]: tensor["data"] for tensor in asked["inputs"]},
        answer=lambda told: told,
    ),
    "mlflow": _Peer(
        requirements=("mlflow==3.17.2", "onnx==1.23.2"),  # 3.18.0 needs a mlflow-skinny that is not there
        path="/invocations",
        request=lambda asked: {"inputs": {t["name"]: [[v] for v in t["data"]] for t in asked["inputs"]}},
        answer=lambda told: told["predictions"],
    ),
}


def _peers(bench: _Bench) -> dict[str, Any]:
    """Requests a second of our server over those of others, and everybody's 99th percentile."""
    with ExitStack() as stack:
        return _against_peers(bench, stack)


def _against_peers(bench: _Bench, stack: ExitStack) -> dict[str, Any]:
    found: dict[str, Any] = {}
    asked = {rows: json.loads(_body(rows)[0]) for rows in (1, 100)}
    ours = _Peer(requirements=())
    there: dict[str, tuple[int, _Peer]] = {"ours": (bench.one.port, ours)}
    for name, peer in _PEERS.items():
        requirements = (*peer.requirements, f"onnxruntime=={version('onnxruntime')}")
        try:
            server = _server(name, requirements, f"on_{name}.py", bench.model(0), bench.home)
            port, _ = stack.enter_context(server)
            for request in asked.values():
                _check_same(_asked(port, peer, request), _asked(*there["ours"], request))
        except (OSError, RuntimeError) as error:
            found[f"{name}_is_not_measured"] = " ".join(str(error).replace("|", "/").split())
        else:
            there[name] = port, peer
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _, rows, name in itertools.product(range(_ROUNDS), asked, there):
        port, peer = there[name]
        body = json.dumps(peer.request(asked[rows])).encode()
        runs.setdefault((name, rows), []).append(_wrk(bench.home, port, peer.path, body))
    middle = {key: [statistics.median(n) for n in zip(*each, strict=True)] for key, each in runs.items()}
    for name, rows in itertools.product(_PEERS, asked):
        known = (name, rows) in middle
        found[f"rps_vs_{name}_{rows}"] = (
            round(middle["ours", rows][0] / middle[name, rows][0], 2) if known else None
        )
    for name, rows in itertools.product(["ours", *_PEERS], asked):
        rate, slow = middle.get((name, rows), (None, None))
        found[f"rps_{name}_{rows}"] = rate and round(rate)
        found[f"p99_ms_{name}_{rows}"] = slow and round(slow, 1)
    return found


def _asked(port: int, peer: _Peer, request: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(peer.request(request)).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{peer.path}", content, headers)
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return peer.answer(json.load(reply))


def _check_same(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise RuntimeError unless every output is equal to ours, as float32 to the last bit."""
    import numpy as np

    wanted, found = ({k: np.ravel(v).astype(np.float32) for k, v in each.items()} for each in (ours, theirs))
    if wanted.keys() != found.keys() or any(not np.array_equal(wanted[k], found[k]) for k in wanted):
        raise RuntimeError(f"it answers {str(theirs)[:300]}, we answer {str(ours)[:300]}")


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(bench: _Bench) -> dict[str, Any]:
    """What the processes of the server with two workers hold early and late in minutes of mixed load [MiB]."""
    import psutil

    from lepton_airflow.testing import processes

    supervisor = psutil.Process(processes.pid("endpoint-bench", bench.two.home))
    workers = [worker for forkserver in supervisor.children() for worker in forkserver.children()]
    seconds = 60 * bench.memory_minutes
    # Between two versions. A change gives memory back, so what is held is the median of such a time.
    every = min(30.0, seconds / 10)
    load = _MixedLoad(bench.two.port)
    stop = threading.Event()
    held: list[tuple[float, ...]] = []

    def change() -> None:
        while not stop.wait(every):
            load.counts["change"] += 1
            bench.deploy(bench.models[load.counts["change"] % 2])

    def look() -> None:
        try:
            for moment in (min(120.0, seconds / 5), seconds):
                time.sleep(max(0.0, began + moment - every - time.monotonic()))
                seen = []
                while time.monotonic() < began + moment:
                    seen.append((_held_mib([supervisor]), _held_mib(workers)))
                    time.sleep(0.5)
                held.append(tuple(map(statistics.median, zip(*seen, strict=True))))
        finally:
            stop.set()

    began = time.monotonic()
    _together([look, change, *(partial(load.client, n, stop) for n in range(_CLIENTS))])
    early, late = held
    return {
        "memory_mib_supervisor_early": round(early[0], 1),
        "memory_mib_supervisor_at_end": round(late[0], 1),
        "memory_mib_workers_early": round(early[1], 1),
        "memory_mib_workers_at_end": round(late[1], 1),
        "memory_growth_mib": round(sum(late) - sum(early), 1),
        "memory_minutes": bench.memory_minutes,
        **{f"memory_requests_{kind}": load.counts[kind] for kind in _KINDS},
        "memory_changes": load.counts["change"],
        "memory_answered_wrongly": sum(load.wrong.values()),
    }


def _held_mib(held: list[Any]) -> float:
    """The resident memory of these processes; raises where one has ended."""
    return float(sum(process.memory_info().rss for process in held) / _MIB)


_MIB = 2**20
_KINDS = {"good": 12, "wrong": 4, "look": 1, "aborted": 3}  # how often each
_LARGE_PACKED = gzip.compress(bytes(9 * 2**20))


class _MixedLoad:
    """Clients that ask for anything: rows in every form, what is wrong, what there is to read, and what they do not wait for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.counts: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()  # what was answered with another status than it should
        self._good: list[tuple[bytes, dict[str, str]]] = []
        for rows in (1, 1, 1, 100, 100, 10_000):
            for body, headers in (_body(rows), _body(rows, binary=True)):
                self._good += [
                    (body, headers),
                    (
                        gzip.compress(body, 1),
                        headers | {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"},
                    ),
                    (zlib.compress(body, 1), headers | {"Content-Encoding": "deflate"}),
                ]

    def client(self, number: int, stop: threading.Event) -> None:
        """Ask until it is over, from an address of its own."""
        chance = random.Random(number)
        address = (f"127.0.0.{10 + number}", 0)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=address)
        while not stop.is_set():
            kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
            self.counts[kind] += 1
            if kind == "aborted":
                self._abort(chance, address)
                continue
            method, path, body, headers, expected = getattr(self, f"_{kind}_one")(chance)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                answer.read()
                status = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                connection.close()
            if status != expected:
                self.wrong[f"{kind}: {status}"] += 1
                print(f"{method} {path[:60]} is answered with {status}, expected {expected}", flush=True)

    def _good_one(self, chance: random.Random) -> tuple[Any, ...]:
        return "POST", _INFER, *chance.choice(self._good), "200"

    def _look_one(self, chance: random.Random) -> tuple[Any, ...]:
        paths = (
            "/metrics",
            "/docs",
            "/v2/openapi.json",
            "/v2/models/bench",
            "/v2/models/stats",
            "/v2/health/ready",
        )
        return "GET", chance.choice(paths), None, {}, "200"

    def _wrong_one(self, chance: random.Random) -> tuple[Any, ...]:
        """A request that is refused; texts in it are new each time, so that whatever is kept of them shows."""
        text = f"{chance.random():.17f}" * 50
        body, _ = self._good[0]
        return chance.choice(
            [
                ("POST", _INFER, b'{"inputs":[' + text.encode(), {}, "400"),
                ("POST", _INFER, body.replace(b'"f0"', f'"{text}"'.encode()), {}, "400"),
                ("POST", _INFER, body.replace(b"FP32", b"FP31"), {"X-Text": text}, "400"),
                ("POST", _INFER, text.encode(), {"Content-Encoding": "gzip", "Accept-Encoding": text}, "400"),
                ("POST", _INFER, body, {"Content-Encoding": text}, "415"),
                ("POST", f"/v2/models/{text}/infer", body, {}, "404"),
                ("POST", f"/v2/models/bench/versions/{text}/infer", body, {}, "404"),
                ("POST", _INFER, _LARGE_PACKED, {"Content-Encoding": "gzip"}, "413"),
                ("GET", f"/{text}", None, {}, "404"),
                ("DELETE", _INFER, None, {}, "405"),
            ]
        )

    def _abort(self, chance: random.Random, address: tuple[str, int]) -> None:
        """Send a request, or a part of it, and be gone: with a word, or with none."""
        body, more = chance.choice(self._good)
        lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        content = f"POST {_INFER} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
        part = chance.choice(
            (content, content[: chance.randrange(len(content))], content[: chance.randrange(200)])
        )
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5, address) as each:
            if chance.random() < 0.5:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.sendall(part)


_PARTS: dict[str, Callable[[_Bench], dict[str, Any]]] = {
    "cpu": _cpu,
    "rows": _rows,
    "workers": _workers,
    "changes": _changes,
    "attacks": _attacks,
    "peers": _peers,
    "memory": _memory,
}
