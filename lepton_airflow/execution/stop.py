"""Obey SIGTERM wherever it comes: also inside a library that catches every exception.

A signal's handler runs wherever the interpreter happens to be. An exception from there can be taken by an ``except Exception`` of a
library, be replaced by an error of DuckDB ("Query interrupted"), or be ignored in a destructor. So what is raised is no Exception, it is
raised again until it arrives, and :func:`~lepton_airflow.execution.run_stage.run_stage` believes nothing that comes after it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

_AGAIN_S = 0.1


class Stopped(BaseException):
    """SIGTERM came, to a stage that does not ask for it, or has not asked yet."""


class StopOnSigterm:
    """Whether SIGTERM came: a call answers. Until a call, :class:`Stopped` is raised in the main thread, where this must be made.

    So a resumable stage that still imports its libraries, or reads its input, is interrupted as any other; from its first
    question on it has work to save, and is left to ask.

    :param resumable: leave it to the stage once it has asked; any other is interrupted until it ends.
    """

    def __init__(self, *, resumable: bool) -> None:
        self.resumable = resumable
        self._asked = self._answered = self._raised = self._begun = self._over = False
        self._main = threading.get_ident()
        signal.signal(signal.SIGTERM, self._handle)
        # Started now, since a handler can start no thread: the signal may come where the threads' own lock is held.
        threading.Thread(target=self._ask_again, daemon=True).start()

    def __call__(self) -> bool:
        self._answered = True
        return self._asked

    @property
    def disturbed(self) -> bool:
        """Whether the stage may have been interrupted, so that nothing that it says counts."""
        return self._asked and (self._raised or not self.resumable)

    def begin(self) -> None:
        """Interrupt from now on, also for a signal that came before: who calls this catches :class:`Stopped`."""
        self._begun = True
        if self._asked:
            self._raised = True
            raise Stopped

    def end(self) -> None:
        """Interrupt nothing from now on; not even the end of the process, at which Python gives up its handlers."""
        self._over = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, *_: Any) -> None:
        first = not self._asked
        self._asked = True
        interrupts = self._begun and not self._over and not (self.resumable and self._answered)
        if interrupts and (first or not _is_unwinding()):
            self._raised = True
            raise Stopped

    def _ask_again(self) -> None:
        while not self._over:
            time.sleep(_AGAIN_S)
            if self._asked and not self._over:
                signal.pthread_kill(self._main, signal.SIGTERM)


def _is_unwinding() -> bool:
    """Whether the main thread is cleaning up on its way out, which must not be interrupted."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
