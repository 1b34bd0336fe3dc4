"""What a worker keeps of a request that it is done with: nothing."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from lepton_airflow.serving import worker
from lepton_airflow.serving.batches import together
from lepton_airflow.serving.http import Connection, ConnectionLimits, Listener
from lepton_airflow.serving.protocol import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Body:
    """Of a request: megabytes."""


class Model:
    """One that fails on each request, of which its frame holds something."""

    def __init__(self, held: list[weakref.ref[Body]]) -> None:
        self.held = held

    def run(self, _: Any) -> list[Any]:
        body = Body()
        self.held.append(weakref.ref(body))
        try:
            raise ValueError("what the parser says")
        except ValueError:
            raise RequestError(400, "no") from None


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: worker._attempt(lambda: model.run(None)),
        lambda model: together(model, [None])[0],  # type: ignore[list-item]
    ],
)
@pytest.mark.usefixtures("without_collector")
def test_a_refusal_keeps_nothing_of_its_request(refused: Callable[[Model], RequestError]) -> None:
    """Its frames lead to those of its callers and so to itself: the body would wait for the collector, for minutes."""
    held: list[weakref.ref[Body]] = []

    def answer() -> int:
        outcome = refused(Model(held))
        return outcome.status

    assert answer() == 400
    assert [body() for body in held] == [None]


def test_a_connection_that_is_lost_forgets_the_requests_that_waited() -> None:
    async def life() -> None:
        listener = Listener(ConnectionLimits(), lambda _, __: None)
        ours, theirs = socket.socketpair()
        _, connection = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: Connection(listener), theirs
        )
        ours.sendall(2 * b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx")
        await asyncio.sleep(0.1)
        assert connection._ready
        connection.abandon()
        await asyncio.sleep(0.1)
        assert not connection._ready
        ours.close()
        listener.close()

    asyncio.run(life())
