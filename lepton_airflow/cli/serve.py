"""``serve``: the model server of one or several endpoints."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from lepton_airflow.cli import Commands, seconds, store_of
from lepton_airflow.errors import require


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    serve = commands.add_parser("serve", help="serve what DeployModel wants at endpoints, until SIGTERM")
    serve.add_argument("endpoint", nargs="+", help="names of endpoints; each is a model of this server")
    serve.add_argument(
        "--store",
        default=os.environ.get("AIRFLOW__LEPTON__STORE"),
        help="the store's URI, opened with ambient identity",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    serve.add_argument(
        "--port", type=int, default=8080, help="port to listen on; 0: a free one; default: 8080"
    )
    serve.add_argument(
        "--health-port", type=int, help="a port for health checks and metrics alone, which no request delays"
    )
    serve.add_argument("--grpc-port", type=int, help="a port for gRPC; 0: a free one; default: none")
    serve.add_argument("--url", help="where clients reach it, when that is not http://HOST:PORT")
    serve.add_argument("--workers", type=int, default=1, help="processes that answer requests; default: 1")
    serve.add_argument("--max-rows", type=int, default=10_000, help="of one request; default: 10000")
    serve.add_argument(
        "--max-bytes", type=int, default=8 * 2**20, help="of one request's body; default: 8 MiB"
    )
    serve.add_argument(
        "--max-in-flight",
        type=int,
        default=64,
        help="large requests at a time of each worker, further ones get 503; default: 64",
    )
    serve.add_argument(
        "--max-connections",
        type=int,
        default=1000,
        help="at a time; one address may have half; default: 1000",
    )
    serve.add_argument(
        "--threads",
        type=int,
        default=0,
        help="of each worker, for large requests; default: the CPUs divided by the workers",
    )
    serve.add_argument(
        "--batch-rows",
        type=int,
        default=0,
        help="compute small requests that come together in one call, up to so many rows; default: each by itself",
    )
    serve.add_argument(
        "--batch-wait-ms",
        type=float,
        default=2.0,
        help="how long the first request of a batch waits for others [ms]; default: 2",
    )
    serve.add_argument(
        "--poll-s", type=seconds, default=1.0, help="how often to look for a new version [seconds]"
    )
    serve.add_argument(
        "--drain-s",
        type=seconds,
        default=3.0,
        help="after SIGTERM: how long to go on, not ready, before the port is closed [seconds]; default: 3",
    )
    serve.set_defaults(call=_serve)


def _serve(args: argparse.Namespace) -> int:
    for library in ("httptools", "msgspec", "prometheus-client", "onnxruntime", "numpy"):
        require(library, "serve", "serve")
    for library in ("grpcio", "protobuf") if args.grpc_port is not None else ():
        require(library, "--grpc-port", "grpc")
    from lepton_airflow.serving.http import ConnectionLimits
    from lepton_airflow.serving.supervisor import Settings, serve
    from lepton_airflow.serving.worker import Limits

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    store = store_of(args)
    connections = ConnectionLimits(
        body_bytes=args.max_bytes,
        connections=args.max_connections,
        per_address=max(1, args.max_connections // 2),
    )
    cpus = len(os.sched_getaffinity(0))
    limits = Limits(
        rows=args.max_rows,
        in_flight=args.max_in_flight,
        threads=args.threads or max(1, cpus // max(1, args.workers)),
        batch_rows=args.batch_rows,
        batch_wait_s=args.batch_wait_ms / 1000,
        connections=connections,
    )
    settings = Settings(
        names=tuple(args.endpoint),
        host=args.host,
        port=args.port,
        health_port=args.health_port,
        url=args.url,
        workers=args.workers,
        limits=limits,
        poll_s=args.poll_s,
        drain_s=args.drain_s,
        grpc_port=args.grpc_port,
    )
    serve(store, settings)
    return 0
