"""``serve``: the model server of an endpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from lepton_airflow.cli import Commands, seconds, store_of
from lepton_airflow.errors import require


def add(commands: Commands) -> None:
    """Add the command to the parser."""
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
        "--poll-s", type=seconds, default=1.0, help="how often to look for a new version [seconds]"
    )
    serve.set_defaults(call=_serve)


def _serve(args: argparse.Namespace) -> int:
    for library in ("fastapi", "uvicorn", "prometheus-client", "onnxruntime", "numpy"):
        require(library, "serve", "serve")
    from lepton_airflow.serving.server import Limits, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    limits = Limits(
        rows=args.max_rows, bytes=args.max_bytes, in_flight=args.max_in_flight, threads=args.threads
    )
    store = store_of(args)
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
