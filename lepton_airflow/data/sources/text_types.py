"""Find the type of a column of text from all of its values, and cast values only where nothing is lost.

DuckDB's own casts round (``12.7`` to the BIGINT 13), drop (the offset of ``14:38+02:00`` as a TIMESTAMP) and guess (``0x1F`` is 31).
Here a value fits a type when the type can hold exactly what is written, or, for FLOAT and DOUBLE, the nearest number to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lepton_airflow.data.duckdb_types import WHOLE
from lepton_airflow.data.sql import literal, quote

if TYPE_CHECKING:
    import duckdb

ISO_DATE = "%Y-%m-%d"
# What a column of text may turn out to hold; JSON says by itself which of its values are numbers.
ALL_KINDS = ("BOOLEAN", "BIGINT", "DOUBLE", "DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE")
TIMES_ONLY = ALL_KINDS[3:]

_FIRST_ROWS = 20_000  # in these, most columns show what they cannot hold
COLUMNS_AT_ONCE = 8  # in one query: with more DuckDB plans longer than it runs, with hundreds it lacks memory
_EXACT_IN_DOUBLE = 2**53  # whole numbers below it are
_SPACES = r"\s*"
_WHOLE = r"[+-]?[0-9]+(\.0*)?"
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_NO_NUMBER = r"[+-]?(nan|inf|infinity)"
_DATE = r"[1-9][0-9]{3}-[0-9]{1,2}-[0-9]{1,2}"
_OFFSET = r" ?(Z|z|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)"
_TRUE_FALSE = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")
_FRACTION_DIGITS = {"TIMESTAMP_S": 0, "TIMESTAMP_MS": 3, "TIMESTAMP_NS": 9}
_TIME_DIRECTIVE = re.compile(r"%[-]?[HIMSpfgnLcXTRrsz]")


def canonical(con: duckdb.DuckDBPyConnection, kind: str) -> str:
    """DuckDB's own name of a type, such as BIGINT for INT8; raises duckdb.Error for what is none."""
    ((name,),) = con.execute(f"SELECT typeof(CAST(NULL AS {kind}))").fetchall()
    return str(name)


@dataclass(frozen=True)
class Notation:
    """How the texts of a source write dates and numbers.

    :ivar date_format: as in strptime.
    :ivar decimal: the decimal point.
    :ivar thousands: what may stand between groups of three digits; empty: nothing.
    """

    date_format: str = ISO_DATE
    decimal: str = "."
    thousands: str = ""

    @property
    def date_kinds(self) -> tuple[str, ...]:
        """The types that may hold dates of the source's own format, the narrowest first; empty where that is ISO."""
        if self.date_format == ISO_DATE:
            return ()
        if not _TIME_DIRECTIVE.search(self._directives):
            return ("DATE",)
        if re.search("%[zZ]", self._directives):
            return ("TIMESTAMP WITH TIME ZONE",)
        return ("TIMESTAMP", "TIMESTAMP_NS") if "%n" in self._directives else ("TIMESTAMP",)

    def dates(self, kind: str) -> bool:
        """Whether values of this type are written in the source's own format of dates."""
        kinds = self.date_kinds
        # A time without an offset is one in UTC; an offset cannot be left out.
        times = bool(kinds) and kinds != ("DATE",) and kind.startswith("TIMESTAMP")
        return bool(kinds) and (kind == "DATE" or (times and ("ZONE" in kind or "ZONE" not in kinds[0])))

    def number(self, value: str) -> str:
        """SQL that writes the number in a text with a decimal point and nothing else between its digits; NULL where it is none."""
        if (self.decimal, self.thousands) == (".", ""):
            return value
        point, between = re.escape(self.decimal), re.escape(self.thousands)
        whole = f"([0-9]+|[1-9][0-9]{{0,2}}({between}[0-9]{{3}})+)" if between else "[0-9]+"
        written = rf"[+-]?({whole}({point}[0-9]*)?|{point}[0-9]+)([eE][+-]?[0-9]+)?"
        bare = f"replace(trim({value}), {literal(self.thousands)}, '')" if between else value
        plain = f"replace({bare}, {literal(self.decimal)}, '.')"
        return (
            f"CASE WHEN {_match(value, written)} THEN {plain} "
            f"WHEN {_match(f'lower({value})', _NO_NUMBER)} THEN {value} END"
        )

    @property
    def counted(self) -> tuple[str, str] | None:
        """Of a format with a day or week of a year, the part before fractions of a second and a zone, and a pattern of these.

        DuckDB takes the 366th day and the 53rd week of a year without one for the next year's.
        """
        if not re.search("%-?[jUVW]", self._directives):
            return None
        head, fraction, zone = re.fullmatch(
            r"(.*?)([.,]?%[fgn])?( *%[zZ])?", self.date_format, re.DOTALL
        ).groups()  # type: ignore[union-attr]
        if re.search("%[zZfgn]", head):
            return None
        return head, (r"[.,]?[0-9]{1,9}" if fraction else "") + (
            r" *([+-][0-9:]+|[A-Za-z_/]+)" if zone else ""
        )

    @property
    def _directives(self) -> str:
        return self.date_format.replace("%%", "")


PLAIN = Notation()


def cast(value: str, kind: str, notation: Notation = PLAIN) -> str:
    """SQL that casts text to a type (by its canonical name); NULL where DuckDB cannot."""
    if notation.dates(kind):
        return f"TRY_CAST({_read(value, notation)} AS {kind})"
    return f"TRY_CAST({notation.number(value) if _is_number(kind) else value} AS {kind})"


def fits(value: str, kind: str, notation: Notation = PLAIN) -> str:
    """SQL that says of a text, not NULL, whether a type (by its canonical name) can hold what it says."""
    if kind == "VARCHAR":
        return "true"
    if kind.endswith("[]"):
        # Of each element in turn. The text of a list is DuckDB's own, as in '[1, 2]'.
        inner = fits("x", kind[:-2], notation)
        elements = f"TRY_CAST({value} AS VARCHAR[])"
        return (
            f"coalesce(TRY_CAST({value} AS {kind}) IS NOT NULL "
            f"AND len(list_filter({elements}, lambda x: x IS NOT NULL AND NOT ({inner}))) = 0, false)"
        )
    if notation.dates(kind):
        # Cast back it is the same, nothing rounded or left out. A year of two digits read by %Y is one of antiquity, and
        # DuckDB reads "epoch" and "infinity" in any format as the year 1900.
        read, done = _read(value, notation), cast(value, kind, notation)
        there = ""
        if counted := notation.counted:
            head = (
                f"regexp_replace(trim({value}), {literal(f'{counted[1]}$')}, '')"
                if counted[1]
                else f"trim({value})"
            )
            again = f"strftime(try_strptime({head}, {literal(counted[0])}), {literal(counted[0])})"
            there = f"AND {_bare_zeros(again)} = {_bare_zeros(head)}"
        return (
            f"coalesce({done} = {read} AND year({done}) >= 1000 AND regexp_matches({value}, '[0-9]') "
            f"{there}, false)"
        )
    number = notation.number(value) if _is_number(kind) else value
    return f"coalesce({cast(value, kind, notation)} IS NOT NULL AND {_as_written(number, kind)}, false)"


def _read(value: str, notation: Notation) -> str:
    return f"try_strptime(trim({value}), {literal(notation.date_format)})"


def _bare_zeros(text: str) -> str:
    """SQL: a text without the zeros that numbers may begin with."""
    return f"regexp_replace(lower({text}), '\\b0+([0-9])', '\\1', 'g')"


def _as_written(value: str, kind: str) -> str:
    """SQL: whether a text that DuckDB can cast is written in a form of which the cast loses nothing."""
    if kind in WHOLE:
        # Comparing is quicker than matching, and most whole numbers are written as DuckDB would.
        return f"(TRY_CAST({value} AS {kind})::VARCHAR = {value} OR {_match(value, _WHOLE)})"
    if kind in ("DOUBLE", "FLOAT"):
        return (
            f"CASE WHEN isfinite(TRY_CAST({value} AS {kind})) THEN {_match(value, _NUMBER)} "
            f"ELSE {_match(f'lower({value})', _NO_NUMBER)} END"
        )
    if decimal := re.fullmatch(r"DECIMAL\(\d+,(\d+)\)", kind):
        return _match(value, rf"[+-]?[0-9]*(\.[0-9]{{0,{decimal[1]}}}0*)?")
    if kind == "BOOLEAN":
        return f"lower(trim({value})) IN ({', '.join(map(literal, _TRUE_FALSE))})"
    if kind == "DATE":
        return _match(value, rf"{_DATE}([ T]0?0:00(:00(\.0*)?)?)?")
    if kind.startswith("TIMESTAMP"):
        digits = _FRACTION_DIGITS.get(kind, 6)
        offset = f"({_OFFSET})?" if "ZONE" in kind else ""
        return _match(value, rf"{_DATE}([ T]{_clock(digits)}{offset})?")
    if kind.startswith("TIME"):
        return _match(value, _clock(6) + (_OFFSET if "ZONE" in kind else ""))
    return "true"


def _clock(digits: int) -> str:
    # DuckDB reads 24:00 as midnight of the next day.
    return rf"([01]?[0-9]|2[0-3]):[0-9]{{2}}(:[0-9]{{2}}(\.[0-9]{{0,{digits}}}0*)?)?"


def _match(value: str, pattern: str) -> str:
    """SQL: whether a whole text, but for spaces around it, has this form."""
    return f"regexp_full_match({value}, {literal(_SPACES + '(' + pattern + ')' + _SPACES)})"


def fits_again(value: str, kind: str, of: str) -> str:
    """SQL that says of a typed value, not NULL, whether another type can hold it: cast there and back it is the same.

    :param of: the type that it has.
    """
    done = f"TRY_CAST({value} AS {kind}) IS NOT NULL"
    nearest = kind in ("DOUBLE", "FLOAT") and not _is_whole(of)
    if kind in (of, "VARCHAR") or nearest:
        return done
    # TIMESTAMPTZ to TIMESTAMP is the same moment: DuckDB's time zone is UTC here.
    return f"({done} AND coalesce(TRY_CAST(TRY_CAST({value} AS {kind}) AS {of}) = {value}, false))"


def _is_number(kind: str) -> bool:
    return kind in (*WHOLE, "DOUBLE", "FLOAT") or kind.startswith("DECIMAL")


def _is_whole(kind: str) -> bool:
    return kind in WHOLE or kind in ("HUGEINT", "UHUGEINT")


def infer(
    con: duckdb.DuckDBPyConnection,
    scan: str,
    columns: Sequence[str],
    notation: Notation = PLAIN,
    kinds: Sequence[str] = ALL_KINDS,
) -> dict[str, str]:
    """The narrowest type that holds what every value of each column of text says, whichever file and row it stands in.

    VARCHAR where there is no value, and where one would lose something: a code with leading zeros, a whole number that neither
    BIGINT nor, beside fractions, DOUBLE holds, a time without an offset beside one with an offset. Single letters are no BOOLEAN: a
    column of codes may hold only F in one month.
    """
    if notation.date_kinds:
        # The stated format comes first, since the dates of %Y%m%d are whole numbers, too.
        kinds = [*notation.date_kinds, *(kind for kind in kinds if kind not in TIMES_ONLY)]
    found = dict.fromkeys(columns, "VARCHAR")
    open_kinds = {column: list(kinds) for column in columns}
    ((rows,),) = con.execute(f"SELECT count(*) FROM {scan}").fetchall()
    for table in [f"(FROM {scan} LIMIT {_FIRST_ROWS})", scan] if rows > _FIRST_ROWS else [scan]:
        asked = {c: k for c, k in open_kinds.items() if k}
        values, misfits = _misfits(con, table, asked, notation)
        for column, candidates in asked.items():
            open_kinds[column] = [k for k in candidates if not misfits[column, k]]
    for column, candidates in open_kinds.items():
        if candidates and values.get(column):
            found[column] = candidates[0]
    return found


def _misfits(
    con: duckdb.DuckDBPyConnection, table: str, asked: Mapping[str, Sequence[str]], notation: Notation
) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """How many values each column has, and how many of them rule out each type that it may still have."""
    values: dict[str, int] = {}
    misfits: dict[tuple[str, str], int] = {}
    columns = list(asked)
    for first in range(0, len(columns), COLUMNS_AT_ONCE):
        parts, keys = [], list[tuple[str, str]]()
        for column in columns[first : first + COLUMNS_AT_ONCE]:
            name = quote(column)
            parts.append(f"count({name})")
            keys.append((column, ""))
            for kind in asked[column]:
                may_be = f"coalesce({_may_be(name, kind, notation)}, false)"
                parts.append(f"count(*) FILTER ({name} IS NOT NULL AND NOT {may_be})")
                keys.append((column, kind))
        (row,) = con.execute(f"SELECT {', '.join(parts)} FROM {table}").fetchall()
        for (column, kind), count in zip(keys, row, strict=True):
            if kind:
                misfits[column, kind] = count
            else:
                values[column] = count
    return values, misfits


def _may_be(value: str, kind: str, notation: Notation) -> str:
    """SQL: whether a text may be taken for a value of this type where nobody has stated one; stricter than :func:`fits`."""
    if kind == "BOOLEAN":
        return f"lower({value}) IN ('true', 'false')"
    if notation.dates(kind):
        return fits(value, kind, notation)
    if _is_number(kind):
        value = notation.number(value)
    if kind == "BIGINT":
        # With a point it is a DOUBLE; with leading zeros a code (of ICD-9: 001.9), with a plus perhaps a telephone number.
        return (
            f"(TRY_CAST({value} AS BIGINT)::VARCHAR = {value} "
            f"OR (TRY_CAST({value} AS BIGINT) IS NOT NULL AND {_match(value, '-?(0|[1-9][0-9]*)')}))"
        )
    if kind == "DOUBLE":
        exact = f"abs(TRY_CAST({value} AS DOUBLE)) < {_EXACT_IN_DOUBLE}"
        return (
            f"({fits(value, kind)} AND NOT {_match(value, '[+-]?0[0-9].*|[+].*')} "
            f"AND (NOT {_match(value, '[+-]?[0-9]+')} OR {exact}))"
        )
    if kind == "DATE":
        return f"({fits(value, kind)} AND {_match(value, _DATE)})"  # with 00:00 it is a TIMESTAMP
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"({fits(value, kind)} AND {_match(value, f'.*:.*{_OFFSET}')})"
    return fits(value, kind)
