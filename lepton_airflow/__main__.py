"""The one door through which a stage runs, on every host: ``python -m lepton_airflow``.

``stages`` and ``describe`` need neither Airflow nor an engine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from lepton_airflow import __version__
from lepton_airflow.connections import connections_from_json
from lepton_airflow.errors import BadConfiguration, ContractError, LeptonError, StoreError, require
from lepton_airflow.sdk.description import describe
from lepton_airflow.stages import all_stages, get_stage
from lepton_airflow.store.files import Store

if TYPE_CHECKING:
    from lepton_airflow.pods.cluster import Cluster
    from lepton_airflow.pods.sweep import Item

_WEEK_S = 7 * 24 * 3600.0
_MONTH_S = 30 * 24 * 3600.0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lepton_airflow", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    run.add_argument("--search-path", default="", help="where user code lies besides: appended to sys.path")
    run.set_defaults(call=_run)

    stages = commands.add_parser("stages", help="list the stages, one line each")
    stages.set_defaults(call=_stages)

    show = commands.add_parser("describe", help="show a stage's parameters: types, defaults, units")
    show.add_argument("stage")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(call=_describe)

    cache = commands.add_parser("cache", help="look at the cache or make room in it").add_subparsers(
        required=True, metavar="ls|evict"
    )
    ls = cache.add_parser("ls", help="list what can be reused, oldest first")
    evict = cache.add_parser("evict", help="drop entries, and the artifacts that nothing needs any more")
    evict.add_argument(
        "--older-than-s",
        type=float,
        default=_WEEK_S,
        help="only entries at least this old [seconds]; default: a week. Runs as old as this must have ended",
    )
    for command, call in ((ls, _cache_ls), (evict, _cache_evict)):
        command.add_argument(
            "--store", default=os.environ.get("AIRFLOW__LEPTON__STORE"), help="the store's URI"
        )
        command.add_argument("--stage", help="only this stage's entries")
        command.set_defaults(call=call)

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
        type=float,
        default=_MONTH_S,
        help="only those last used at least this long ago [seconds]; default: 30 days",
    )
    pruned.set_defaults(call=_envs_prune)
    for command in (listed, made, pruned):
        command.add_argument("--root", type=Path, help="where they lie; default: [lepton] environments")

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
            type=float,
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

    serve = commands.add_parser("serve", help="serve what DeployModel wants at an endpoint, until SIGTERM")
    serve.add_argument("endpoint")
    serve.add_argument(
        "--store",
        default=os.environ.get("AIRFLOW__LEPTON__STORE"),
        help="the store's URI, opened with ambient identity",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    serve.add_argument(
        "--port", type=int, default=8080, help="port to listen on; 0: a free one; default: 8080"
    )
    serve.add_argument("--url", help="where clients reach it, when that is not http://HOST:PORT")
    serve.add_argument("--max-rows", type=int, default=10_000, help="of one request; default: 10000")
    serve.add_argument(
        "--max-bytes", type=int, default=8 * 2**20, help="of one request's body; default: 8 MiB"
    )
    serve.add_argument(
        "--max-in-flight", type=int, default=64, help="requests at a time, further ones get 503; default: 64"
    )
    serve.add_argument("--threads", type=int, default=0, help="that infer side by side; default: one per CPU")
    serve.add_argument(
        "--poll-s", type=float, default=1.0, help="how often to look for a new version [seconds]"
    )
    serve.set_defaults(call=_serve)

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


def _run(args: argparse.Namespace) -> int:
    from lepton_airflow.connections import redactor
    from lepton_airflow.contract import Request
    from lepton_airflow.execution.processes import end_with_parent
    from lepton_airflow.execution.run_stage import in_brief, perform, stop_on_sigterm

    if args.parent_fd is not None:
        end_with_parent(args.parent_fd, args.scratch)
    text: str | bytes = ""
    if args.connections_fd is not None:
        with open(args.connections_fd, encoding="utf-8") as pipe:
            text = pipe.read()
    elif args.connections_file is not None:
        text = _read(args.connections_file, "file of Connections")
    connections = connections_from_json(text)
    sys.path += [folder for folder in args.search_path.split(os.pathsep) if folder and folder not in sys.path]
    hide = redactor(connections)
    if connections:
        sys.stdout, sys.stderr = (
            cast(TextIO, _Redacted(sys.stdout, hide)),
            cast(TextIO, _Redacted(sys.stderr, hide)),
        )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines(hide))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    request = Request.from_json(_read(args.request, "request"))
    try:
        kind = get_stage(request.stage)
    except Exception:  # noqa: BLE001 - whatever importing a user's module raises: perform meets it again and says it
        kind = None
    receipt = perform(request, connections, stop_on_sigterm(kind))
    try:
        temporary = args.receipt.with_name(args.receipt.name + ".tmp")
        temporary.write_text(receipt.to_json(), encoding="utf-8")
        temporary.replace(args.receipt)
        if args.termination_message:
            args.termination_message.write_text(in_brief(receipt), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"the receipt {args.receipt} cannot be written: {error.strerror}.") from None
    level = logging.ERROR if receipt.error else logging.INFO
    logging.getLogger("lepton_airflow").log(
        level, "%s %s: %s", receipt.stage, receipt.status, receipt.summary
    )
    return int(receipt.error["exit_code"]) if receipt.error else 0


def _read(file: Path, what: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ContractError(f"the {what} {file} cannot be read: {error.strerror}.") from None


class _Lines(logging.Formatter):
    """Starts every line with its level, those of a traceback too, and keeps the Connections' secrets out."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(
            f"{record.levelname} {line}" for line in self._hide(super().format(record)).split("\n")
        )


class _Redacted:
    """A text stream that keeps the Connections' secrets out, line by line.

    A careless library prints what it connects with. The worker redacts what it reads, but a pod's log has other readers.
    """

    def __init__(self, stream: TextIO, hide: Callable[[str], str]) -> None:
        self._stream, self._hide = stream, hide
        self._begun = ""  # of a line whose end is still to come
        self._lock = threading.RLock()  # a handler of SIGTERM may interrupt a write, and write

    def write(self, text: str) -> int:
        with self._lock:
            lines, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                self._stream.write(self._hide(lines + newline))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._lock:
            self._stream.write(self._hide(self._begun))
            self._begun = ""
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stages(_: argparse.Namespace) -> int:
    found = all_stages()
    width = max(map(len, found), default=0)
    for name, stage in found.items():
        print(f"{name:<{width}}  {(stage.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _describe(args: argparse.Namespace) -> int:
    stage = get_stage(args.stage)
    parameters = describe(stage)
    if args.json:
        print(json.dumps({"stage": args.stage, "parameters": [asdict(p) for p in parameters]}, indent=1))
        return 0
    first = (stage.__doc__ or "").strip().splitlines()[0]
    print(f"{args.stage}: {first}\n")
    for p in parameters:
        print(
            f"  {p.name}: {p.type} = {p.default}"
            if p.default != "required"
            else f"  {p.name}: {p.type}  (required)"
        )
        for line in textwrap.wrap(p.text, 100):
            print(f"      {line}")
    print(f"\nreturns: {', '.join(stage.outputs) or 'no outputs'}")
    print(f"reused from the cache: {'yes' if stage.cacheable else 'never'}")
    if stage.extra:
        print(f"needs: pip install 'lepton-airflow[{stage.extra}]' where it runs")
    return 0


def _serve(args: argparse.Namespace) -> int:
    for library in ("fastapi", "uvicorn", "prometheus-client", "onnxruntime", "numpy"):
        require(library, "serve", "serve")
    from lepton_airflow.serving.server import Limits, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    limits = Limits(
        rows=args.max_rows, bytes=args.max_bytes, in_flight=args.max_in_flight, threads=args.threads
    )
    store = _store(args)
    serve(
        args.endpoint,
        store,
        host=args.host,
        port=args.port,
        url=args.url,
        limits=limits,
        poll_s=args.poll_s,
    )
    return 0


def _store(args: argparse.Namespace) -> Store:
    if not args.store:
        raise ContractError("which store? Pass --store URI, or set AIRFLOW__LEPTON__STORE.")
    return Store(args.store)


def _cache_ls(args: argparse.Namespace) -> int:
    found = _store(args).cache_entries()
    if not found:
        print(f"nothing is cached in {args.store}", file=sys.stderr)
    for _, entry in found:
        if args.stage in (None, entry.stage):
            size = sum(a.bytes for a in entry.artifacts.values())
            print(
                f"{entry.created}  {entry.stage:<14} {(entry.cache_key or '')[:12]}  {size:>12,} B  {entry.seconds:>8.1f} s"
            )
    return 0


def _cache_evict(args: argparse.Namespace) -> int:
    entries, freed = _store(args).cache_evict(stage=args.stage, older_than_s=args.older_than_s)
    print(f"{entries} entries and {freed:,} bytes removed")
    return 0


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


def _pods(args: argparse.Namespace) -> tuple[Cluster, list[Item]]:
    """The cluster that the arguments, or else the installation's runner, name, and what lies in it."""
    if find_spec("airflow") is None:
        raise BadConfiguration(
            "pods: Airflow and its Kubernetes provider are not installed here: run it where a worker or scheduler runs."
        )
    from lepton_airflow import settings
    from lepton_airflow.pods.cluster import Cluster
    from lepton_airflow.pods.sweep import inventory
    from lepton_airflow.runners import Pod, default_runner

    runner = default_runner()
    pod = runner if isinstance(runner, Pod) else Pod(image="none")  # it is only asked for its cluster
    names = ("namespace", "kubernetes_conn_id", "config_file", "cluster_context", "in_cluster")
    cluster = Cluster(
        replace(pod, **{n: v for n in names if (v := getattr(args, n)) is not None}), in_airflow=False
    )
    deployment = settings.setting("deployment", "airflow") or "airflow"
    return cluster, inventory(cluster, deployment, older_than_s=args.older_than_s, now=time.time())


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


if __name__ == "__main__":
    sys.exit(main())
