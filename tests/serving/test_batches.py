"""Requests that are computed together: each gets its own rows' answers, and a bad one fails alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lepton_airflow.data.features import Feature
from lepton_airflow.serving.batches import Batches
from lepton_airflow.serving.protocol import Inference, RequestError
from lepton_airflow.testing import LocalEndpoint
from tests.serving.test_server import call, deploy, metrics, outputs, tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lepton_airflow.stages import RunInfo


class Session:
    """A model that doubles, fails on rows of 13, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        self.calls.append(len(feed["x"]))
        if (feed["x"] == 13).any():
            raise RuntimeError("13")
        return [feed["x"] * 2 if name == "twice" else feed["x"].ravel() for name in names]


class Model:
    features = (Feature("x", "number", "x"),)

    def __init__(self) -> None:
        self.session = Session()

    def seconds_of(self, rows: float) -> float:
        return 0.0

    def run(self, inference: Inference) -> list[Any]:
        try:
            return self.session.run(list(inference.outputs), inference.feed)
        except RuntimeError as error:
            raise RequestError(422, str(error)) from None


def asked(*values: float, outputs: tuple[str, ...] = ("twice",)) -> Inference:
    feed = {"x": np.array(values, dtype=np.float32).reshape(-1, 1)}
    return Inference(feed, len(values), dict.fromkeys(outputs, False))


def computed(model: Model, *inferences: Inference, rows: int = 100, wait_s: float = 0.01) -> list[Any]:
    """What comes of requests that are there at once."""

    async def life() -> list[Any]:
        futures = [asyncio.get_running_loop().create_future() for _ in inferences]
        batches = Batches(rows, wait_s, lambda _, compute, done: done(compute()))
        for inference, future in zip(inferences, futures, strict=True):
            batches.add(model, inference, future.set_result)  # type: ignore[arg-type]
        return await asyncio.wait_for(asyncio.gather(*futures), 5)

    return asyncio.run(life())


def test_requests_that_come_together_are_one_call_and_each_gets_its_rows() -> None:
    model = Model()
    one, two, three = computed(model, asked(1), asked(2, 3), asked(4, outputs=("once", "twice")))
    assert model.session.calls == [4]
    assert [values.ravel().tolist() for values in (*one, *two)] == [[2], [4, 6]]
    assert [values.ravel().tolist() for values in three] == [[4], [8]]


def test_a_batch_is_full_at_its_rows_and_never_larger() -> None:
    model = Model()
    computed(model, asked(1, 2), asked(3, 4), asked(5), asked(6, 7, 8, 9, 10), rows=4)
    assert model.session.calls == [4, 1, 5]


def test_a_request_that_the_model_fails_on_fails_alone() -> None:
    good, bad, other = computed(Model(), asked(1), asked(13), asked(2))
    assert (good[0].item(), other[0].item()) == (2, 4)
    assert isinstance(bad, RequestError)
    assert bad.status == 422


@pytest.mark.slow
def test_many_clients_get_the_answers_of_their_own_rows(shelf: Any, run_at: RunInfo, tmp_path: Path) -> None:
    options = ("--poll-s", "0.1", "--batch-rows", "32", "--batch-wait-ms", "5")
    rows, package = shelf.wine.rows, shelf.wine.package
    wanted = package.predict(rows)
    wrong: list[Any] = []

    with LocalEndpoint("batched", shelf.run.store.root, tmp_path, options=options) as server:
        deploy(run_at, "batched", shelf.wine.uri)

        def client(number: int) -> None:
            for at in range(number, len(rows) - 3, 8):
                size = 1 + at % 3
                answer = server.infer({"inputs": tensors(rows[at : at + size], package)})
                found = outputs(answer)["probabilities"]
                if np.abs(found - wanted[at : at + size]).max() > 1e-6:
                    wrong.append(at)

        def bad() -> None:
            for _ in range(20):
                status, _, _ = call(
                    f"{server.url}/v2/models/batched/infer", json.dumps({"inputs": []}).encode()
                )
                if status != 400:
                    wrong.append(status)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)] + [
            threading.Thread(target=bad)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        page = metrics(server)
    assert wrong == []
    assert page['lepton_serve_in_flight{endpoint="batched"}'] == 0
    assert page['lepton_serve_requests_total{endpoint="batched",status="200"}'] == len(range(len(rows) - 3))


@pytest.mark.slow
def test_what_waits_for_a_batch_is_limited_and_what_is_beyond_does_not_wait(
    shelf: Any, run_at: RunInfo, tmp_path: Path
) -> None:
    options = ("--poll-s", "0.1", "--batch-rows", "64", "--batch-wait-ms", "3000", "--max-in-flight", "2")
    with LocalEndpoint("few", shelf.run.store.root, tmp_path, options=options) as server:
        deploy(run_at, "few", shelf.wine.uri)
        body = {"inputs": tensors(shelf.wine.rows[:1], shelf.wine.package)}
        waiting = [threading.Thread(target=server.infer, args=(body,)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
        assert metrics(server)['lepton_serve_in_flight{endpoint="few"}'] == 2
        started = time.monotonic()
        assert server.infer(body)["outputs"]
        assert time.monotonic() - started < 1
        for thread in waiting:
            thread.join()
