"""An S3 server on this machine, on loopback, that counts its requests and answers as late as a real one."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from lepton_airflow.connections import Connection
from lepton_airflow.store.files import Store


class LocalS3:
    """An S3 server (moto) in this process: started by ``with``, and gone with all its objects after it.

    :param latency_s: how long each request waits for its answer [seconds].
    :ivar url: where it listens.
    :ivar requests: how many requests came so far, by HTTP method.
    :ivar lose_answers: to how many PUTs from now on the answer is lost, after their work is done.
    :ivar most_at_once: the largest number of requests that were in work at the same time.
    """

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.requests: Counter[str] = Counter()
        self.lose_answers = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            MotoRequestHandler,
            create_backend_app,
        )
        from werkzeug.serving import make_server

        class Handler(MotoRequestHandler):
            def log_request(self, *_: Any) -> None:
                """Log no request."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._counted, threaded=True, request_handler=Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def connection(self) -> Connection:
        """The Connection to it."""
        extra = {"endpoint_url": self.url}
        return Connection("s3", "aws", login="lepton-key", password="lepton-secret", extra=extra)  # noqa: S106

    def store(self, bucket: str) -> Store:
        """A store in a bucket, which is made if need be."""
        store = Store(f"s3://{bucket}/store", self.connection)
        if not store.fs.exists(bucket):
            store.fs.mkdir(bucket)
        return store

    def put(self, store: Store, objects: Mapping[str, bytes], age_s: float = 0.0) -> None:
        """Put objects into a store of this server without a request for each, as if they were that old [seconds]."""
        from moto.s3.models import s3_backends

        bucket, _, folder = store.root.removeprefix("s3://").partition("/")
        backend = s3_backends["123456789012"]["aws"]  # moto's account for whoever names none
        for key, content in objects.items():
            made = backend.put_object(bucket, f"{folder}/{key}", content)
            made.last_modified -= timedelta(seconds=age_s)

    def count(self, call: Callable[[], Any]) -> int:
        """How many requests a call makes."""
        before = self.requests.total()
        call()
        return self.requests.total() - before

    def _counted(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests[environ["REQUEST_METHOD"]] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.latency_s)
            answer: Iterable[bytes] = self._app(environ, start_response)
            if self.lose_answers and environ["REQUEST_METHOD"] == "PUT":
                self.lose_answers -= 1
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionResetError("this answer is lost")
            return answer
        finally:
            with self._lock:
                self._at_once -= 1
