"""What a stage prints: lines with their level, and without the secrets of its Connections."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, TextIO


class LevelFormatter(logging.Formatter):
    """Starts every line with its level, those of a traceback too, and keeps the Connections' secrets out."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(
            f"{record.levelname} {line}" for line in self._hide(super().format(record)).split("\n")
        )


_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) ")


def level_of(line: str) -> tuple[int, str]:
    """The level of a line that :class:`LevelFormatter` wrote, and its text; a line without a level is INFO."""
    found = _LEVEL.match(line)
    return (getattr(logging, found[1]), line[found.end() :]) if found else (logging.INFO, line)


class RedactedStream:
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
