"""What can go wrong, and whether a retry may help.

::

    LeptonError                    1   may be retried
    ├── BadInput                  80   the data, or a value in it, cannot be used; a retry would fail the same way
    ├── BadConfiguration          80   a name, a setting or a combination is wrong
    │   └── MissingExtra          80   a library of an optional extra is not installed
    ├── ContractError             80   this version cannot read a request or a receipt
    ├── IntegrityError            80   bytes do not have the digest that they are pinned to
    ├── StoreError                 1   the artifact store did not answer, is full or is read-only
    ├── RunnerError                1   not the stage failed, but the place where it ran
    │   ├── OutOfMemory            1   the stage used more memory than its limit, or than the machine has
    │   └── PodFailed              1   its pod was refused, lost or killed; 80 where a retry would fail the same way
    ├── Preempted                 75   asked to stop; finished work is kept, and a retry resumes
    └── Skipped                   99   there is nothing to do for this run

Every message is one sentence, or a few: what failed, on which value, what was expected, what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

DONE, FAILED, PREEMPTED, DO_NOT_RETRY, SKIP = 0, 1, 75, 80, 99


class LeptonError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = FAILED


class BadInput(LeptonError):
    """The data, or a value computed from it, cannot be used."""

    exit_code = DO_NOT_RETRY


class BadConfiguration(LeptonError):
    """A parameter, a name or a setting is wrong."""

    exit_code = DO_NOT_RETRY


class MissingExtra(BadConfiguration):
    """A library that an optional extra brings is not installed where the stage runs."""

    def __init__(self, wanted: str, library: str, extra: str) -> None:
        super().__init__(
            f"{wanted} needs {library}, which is not installed here: "
            f"pip install 'lepton-airflow[{extra}]' where this stage runs."
        )


class ContractError(LeptonError):
    """A request or a receipt cannot be read by this version."""

    exit_code = DO_NOT_RETRY


class IntegrityError(LeptonError):
    """Bytes differ from the digest that names them."""

    exit_code = DO_NOT_RETRY


class StoreError(LeptonError):
    """The artifact store could not be read or written."""


class RunnerError(LeptonError):
    """The place where a stage ran has failed it: the stage was killed, for example, or left no receipt."""


class OutOfMemory(RunnerError):
    """The stage used more memory than it was given."""


class PodFailed(RunnerError):
    """A stage's pod did not start, was taken away, or ended badly.

    :param reason: one word, such as ``ImagePull`` or ``Unschedulable``; docs/pods.md lists them.
    :param exit_code: whether a retry may help.
    """

    def __init__(self, sentence: str, reason: str = "", exit_code: int = FAILED) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.exit_code = exit_code


class Preempted(LeptonError):
    """The stage was asked to stop; a retry continues from what it saved."""

    exit_code = PREEMPTED


class Skipped(LeptonError):
    """There is nothing to do for this run."""

    exit_code = SKIP


_BY_EXIT_CODE = {SKIP: Skipped, PREEMPTED: Preempted, DO_NOT_RETRY: BadInput}


def from_record(kind: str, message: str, exit_code: int) -> LeptonError:
    """Rebuild the error that a receipt records, so that the caller sees the kind that the stage raised."""
    known = {cls.__name__: cls for cls in _family(LeptonError)}
    cls = known.get(kind, _BY_EXIT_CODE.get(exit_code, LeptonError))
    error = cls.__new__(cls)  # without __init__, because MissingExtra makes a message of its own there
    Exception.__init__(error, message)
    return error


def _family(cls: type[LeptonError]) -> Iterable[type[LeptonError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


def is_transient(message: str) -> bool:
    """Whether a service's message tells of a state that may be over at the next try: it is away, starting, or too busy."""
    return _TRANSIENT.search(message) is not None


_TRANSIENT = re.compile(
    r"timed? ?out|timeout expired|connection (refused|reset|closed|aborted)|closed the connection|reset by peer"
    r"|no route to host|unreachable|temporary failure|error sending request|too many (requests|clients|connections)"
    r"|slow ?down|starting up|shutting down|terminating connection|database is locked",
    re.IGNORECASE,
)


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: DuckDB draws the query under its own."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: ``did you mean 'x'? Known: …``; ``known: …`` where none is like it."""
    names = sorted(known)
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[close[0]]!r}? Known" if close else "known"
    return f"{hint}: {', '.join(names) or 'none'}."


def brief(value: object) -> str:
    """A value in a sentence: as Python writes it, so that 1 and '1' can be told apart, in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def cut_quoted(text: str) -> str:
    """A library's sentence with a long text in quotes, which may be a value of somebody's, in 40 characters."""
    return re.sub(r"""(['"])(.{40}).+\1""", r"\1\2…\1", text)


def require(library: str, wanted: str, extra: str) -> None:
    """Raise :class:`MissingExtra` unless the distribution ``library`` is installed.

    Reads the installed metadata instead of importing: a folder that is named like a library (``great_expectations/``)
    would import as an empty namespace package.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(library)
    except PackageNotFoundError:
        raise MissingExtra(wanted, library, extra) from None
