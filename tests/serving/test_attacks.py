"""The attacks of the benchmark for a second each: a client of another address is answered all the while."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.servers.attacks import ATTACKS, GRPC_ATTACKS, MIB, Attack, Target, attacked, repeating
from lepton_airflow.serving.protocol import request_body
from lepton_airflow.testing import LocalEndpoint, processes
from tests.serving.test_server import deploy, metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, LocalEndpoint]]:
    folder = tmp_path_factory.mktemp("attacks")
    row = {
        name: None if value != value else value for name, value in shelf.wine.rows.iloc[0].to_dict().items()
    }
    features = shelf.wine.package.card.features

    def body(rows: int, binary: bool) -> tuple[bytes, dict[str, str]]:
        asked = json.loads(request_body(features, [row] * rows))
        if not binary:
            return json.dumps(asked).encode(), {}
        blobs = []
        for tensor in asked["inputs"]:
            value = tensor.pop("data")[0]
            one = b"\4\0\0\0dark" if tensor["datatype"] == "BYTES" else bytes(8)
            assert value is None or isinstance(value, (str, float, int))
            blobs.append(one * rows)
            tensor["datatype"] = "BYTES" if tensor["datatype"] == "BYTES" else "FP64"
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        head = json.dumps(asked).encode()
        return b"".join([head, *blobs]), {"Inference-Header-Content-Length": str(len(head))}

    port = processes.free_port()
    options = ("--poll-s", "0.1", "--grpc-port", str(port), "--max-in-flight", "6", "--threads", "1")
    with LocalEndpoint("attacked", shelf.run.store.root, folder, options=options) as server:
        deploy(replace(shelf.run, run_key="attacked", workdir=folder), "attacked", shelf.wine.uri)
        yield Target(server.port, "attacked", body, max_bytes=2 * MIB, grpc=port), server


_QUICK = {**ATTACKS, **GRPC_ATTACKS}


@pytest.mark.parametrize("name", _QUICK)
def test_a_client_of_another_address_is_answered(target: tuple[Target, LocalEndpoint], name: str) -> None:
    assert attacked(target[0], _QUICK[name], asked=10, before_s=0.3)[0] == 1.0


def test_large_requests_of_one_address_leave_others_their_share(target: tuple[Target, LocalEndpoint]) -> None:
    """Here six large requests may be in flight, and one address always has sixteen."""
    many: Attack = repeating(16, lambda t: t.rows(t.large))
    share, _ = attacked(target[0], many, asked=15, rows=10_000, before_s=0.5)
    page = metrics(target[1])
    assert page['lepton_serve_requests_total{endpoint="attacked",status="503"}'] > 0  # it was too many
    assert share == 1.0


def test_the_worker_is_whole_after_all_that(target: tuple[Target, LocalEndpoint]) -> None:
    """Tests run in the order in which they stand here."""
    server = target[1]
    pid = processes.pid("endpoint-attacked", server.home)
    page = metrics(server)
    assert page["lepton_serve_worker_restarts_total"] == 0
    assert not any(k.endswith('status="500"}') for k in page)
    assert "Traceback" not in server.log.read_text()
    assert max(p.memory_info().rss for p in psutil.Process(pid).children(recursive=True)) < 2**30
