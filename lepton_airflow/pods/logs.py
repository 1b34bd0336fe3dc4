"""A container's log as the API server sends it: lines that begin with their time, by which new ones are recognised."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime

# Bytes. A longer line is cut into pieces, so that no output fills the worker's memory.
_LONGEST_LINE = 1 << 16
# The API selects lines by their age. This clock may be behind the node's by as much as this.
_CLOCK_SKEW_S = 30
# The container runtime cuts lines at 16 KiB, and Kubernetes before 1.24 puts the time before every part.
_PART = 1 << 14
# In the time zone of the node.
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d) ")


def since_s(stamp: str) -> int:
    """The ``sinceSeconds`` that selects all lines after a time, and some before it [seconds]."""
    return math.ceil(max(1.0, time.time() - datetime.fromisoformat(stamp).timestamp())) + _CLOCK_SKEW_S


def is_later(stamp: str, than: str) -> bool:
    """Whether one time comes after another, to the nanosecond; every time comes after the empty one."""
    return not than or _comparable(stamp) > _comparable(than)


def lines_of(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """The lines in the bytes of a log, each with its time; a long line in pieces that share its time.

    A line without a time is left out: the kubelet sends it in place of a log, when the container is gone.
    """
    stamp, rest = "", b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            stamp, text = _split_stamp(stamp, line)
            yield from _pieces(stamp, text)
            stamp = ""
        while len(rest) > _LONGEST_LINE:
            stamp, text = _split_stamp(stamp, rest[:_LONGEST_LINE])
            yield from _pieces(stamp, text)
            rest = rest[_LONGEST_LINE:]
    if rest:
        yield from _pieces(*_split_stamp(stamp, rest))


def _split_stamp(stamp: str, line: bytes) -> tuple[str, str]:
    """The time and the text of a line; the time is empty where there is none.

    :param stamp: the time of the line of which this is a further piece; empty for the beginning of a line.
    """
    text = line.decode("utf-8", "replace").rstrip("\r")
    if not stamp and (found := _STAMP.match(text)):
        stamp, text = found[0].rstrip(), text[found.end() :]
    return stamp, _STAMP.sub("", text) if len(line) > _PART else text


def _pieces(stamp: str, text: str) -> Iterator[tuple[str, str]]:
    if not stamp:
        return
    for start in range(0, len(text) or 1, _LONGEST_LINE):
        yield stamp, text[start : start + _LONGEST_LINE]


def _comparable(stamp: str) -> tuple[str, str]:
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return whole, fraction.ljust(9, "0")
