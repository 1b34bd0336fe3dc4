"""What IngestData may be told to read: files by URI or glob, a table of a lake, or a query of a database.

Nothing is opened here: an entry of ``sources`` is only parsed and checked.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lepton_airflow.connections import is_secret
from lepton_airflow.errors import BadConfiguration, did_you_mean

FILES = ("csv", "tsv", "jsonl", "parquet")
LAKES = ("delta", "iceberg")
_FORMATS = (*FILES, *LAKES)
_SUFFIXES = {
    "csv": "csv", "tsv": "tsv", "tab": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl",
    "parquet": "parquet", "pq": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_SIGNS = ("=", "<", "<=", ">", ">=", "in")
# A JSON or Parquet file says itself what these would say of a CSV file.
_MOST_SKIPPED = 10_000
CSV_ONLY = ("delimiter", "quote", "skip_lines", "null_values", "decimal", "thousands", "encoding")
_LAKE_ONLY = ("catalog", "table", "snapshot_id", "columns", "filters")
# The options of each kind of source. Any other is refused, because it would do nothing: an Iceberg table has snapshots, so
# with ``version`` its current state would be read.
_OPTIONS = {
    "files": ("uri", "format", "connection", "types", "date_format", "union", *CSV_ONLY),
    "delta": ("format", "uri", "version", "columns", "filters", "types", "connection"),
    "iceberg": ("format", "catalog", "table", "snapshot_id", "columns", "filters", "types", "connection"),
    "a database": ("connection", "sql", "version", "types"),
}  # fmt: skip
_NAME = re.compile(r"^[A-Za-z_]\w*$")
_TYPE = re.compile(r"^[A-Za-z][A-Za-z0-9_ ]*(\(\s*\d+\s*(,\s*\d+\s*)?\))?(\[\])*$")


@dataclass(frozen=True)
class Source:
    """One named source of rows: files (``uri``), a table of a lake (``format``), or a database (``connection``, ``sql``).

    :ivar uri: a URI, a glob, or a list of them. The folder of a Delta table.
    :ivar format: ``csv``, ``tsv``, ``jsonl`` or ``parquet``, None: by the suffix; or ``delta`` or ``iceberg``.
    :ivar types: DuckDB types of columns. A row with a value that does not fit is rejected. The types of other CSV columns
        are found from all values of the file. State them in a scheduled run: the values of one month may look different.
    :ivar delimiter: of a CSV file; None: ``,`` for csv, a tab for tsv, or what a first line ``sep=;`` says.
    :ivar quote: the character that quotes in a CSV file; empty: none does.
    :ivar skip_lines: how many lines of a CSV file stand above its header.
    :ivar null_values: texts that mean "no value" in a CSV file, besides the empty one.
    :ivar decimal: the decimal point of numbers in a CSV file.
    :ivar thousands: what may stand between groups of three digits of numbers in a CSV file; empty: nothing.
    :ivar date_format: of dates in texts, as in strptime; by default ISO.
    :ivar encoding: of a CSV file, by Python's name for it.
    :ivar union: whether a file may lack columns that others have; they are read as missing values.
    :ivar connection: id of an Airflow Connection: the database for ``sql``, or what opens the URI or the catalog.
    :ivar sql: one query for the database; ``$window_start`` and ``$window_end`` are bound.
    :ivar version: number of a Delta table's version, None: the current one. Of a database, any name for its present state:
        a run with an equal name may be reused.
    :ivar catalog: pyiceberg's properties of an Iceberg catalog (``type``, ``uri``, ``warehouse``, …), without secrets.
    :ivar table: the Iceberg table, as ``namespace.table``.
    :ivar snapshot_id: of the Iceberg table; None: the current one.
    :ivar columns: the columns of a lake's table to read; empty: all.
    :ivar filters: ``[column, sign, value]``, all of which the rows of a lake's table must meet; files without such rows are
        not read. The values ``$window_start`` and ``$window_end`` stand for the run's window.
    """

    name: str
    uri: str | list[str] = ""
    format: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    quote: str = '"'
    skip_lines: int | str = 0
    null_values: list[str] = field(default_factory=list)
    decimal: str = "."
    thousands: str = ""
    date_format: str = "%Y-%m-%d"
    encoding: str = "utf-8"
    union: bool = False
    connection: str | None = None
    sql: str | None = None
    version: str | int | None = None
    catalog: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None
    snapshot_id: int | str | None = None
    columns: list[str] = field(default_factory=list)
    filters: list[Any] = field(default_factory=list)

    @classmethod
    def parse(cls, name: str, spec: Any) -> Source:
        """Read one entry of ``sources``; raises BadConfiguration with the right form."""
        if not _NAME.match(name):
            raise BadConfiguration(
                f"source name {name!r} is not a table name: expected letters, digits and _."
            )
        if isinstance(spec, (str, list)):
            spec = {"uri": spec}
        if not isinstance(spec, dict):
            raise BadConfiguration(
                f"source {name!r} is {spec!r}: expected a URI, a list of URIs, {{'uri': …, 'types': …}}, "
                "{'format': 'delta', 'uri': …}, {'format': 'iceberg', 'catalog': …, 'table': …} or {'connection': …, 'sql': …}."
            )
        known = [f.name for f in fields(cls) if f.name != "name"]
        for key in spec:
            if key not in known:
                raise BadConfiguration(f"source {name!r} has no option {key!r}; {did_you_mean(key, known)}")
        source = cls(name=name, **spec)
        _check_kind(source)
        _check_options(source, spec)
        _check_types(source)
        _check_csv(source)
        return source

    @property
    def kind(self) -> str:
        """``files``, ``delta``, ``iceberg`` or ``a database``."""
        return str(self.format) if self.is_lake else "a database" if self.sql else "files"

    @property
    def is_lake(self) -> bool:
        """Whether it is a table of a lake."""
        return self.format in LAKES

    @property
    def uris(self) -> list[str]:
        """The URIs and globs of its files."""
        return [self.uri] if isinstance(self.uri, str) else list(self.uri)

    @property
    def lake_version(self) -> int | None:
        """The stated version or snapshot of a lake's table; run parameters bring it as text."""
        option = "version" if self.format == "delta" else "snapshot_id"
        stated = getattr(self, option)
        if stated is None or str(stated).isdecimal():
            return None if stated is None else int(stated)
        raise BadConfiguration(f"source {self.name!r}: {option}={stated!r}: expected a whole number.")

    def place(self, version: int | None) -> str:
        """What a table is called in the log."""
        return f"{self.table or self.uri}, version {version}" if version is not None else str(self.connection)

    def states(self, option: str) -> bool:
        """Whether an option has another value than its default."""
        return getattr(self, option) not in (None, getattr(Source(self.name), option))

    def file_format(self, file: str) -> str:
        """The format of a file by its name; raises BadConfiguration when neither ``format`` nor the suffix tells it."""
        if self.format:
            return self.format
        name = file.lower()
        for suffix in COMPRESSED:
            name = name.removesuffix(suffix)
        found = _SUFFIXES.get(name.rpartition(".")[2])
        if found is None:
            raise BadConfiguration(
                f"source {self.name!r}: the format of {file} is not clear from its name: "
                f"set format to one of {', '.join(FILES)}."
            )
        return found


def _check_kind(source: Source) -> None:
    """Raise unless the source is exactly one of files, a table of a lake or a database, with what that needs."""
    if source.format not in (None, *_FORMATS):
        raise BadConfiguration(
            f"source {source.name!r}: format={source.format!r}; {did_you_mean(str(source.format), _FORMATS)}"
        )
    if source.is_lake:
        _check_lake(source)
    elif option := next((o for o in _LAKE_ONLY if getattr(source, o)), None):
        raise BadConfiguration(
            f"source {source.name!r} has the option {option!r}, which only tables of a lake take: set format to "
            f"{' or '.join(LAKES)}, or select in the query."
        )
    elif bool(source.uri) == bool(source.sql):
        raise BadConfiguration(
            f"source {source.name!r} needs either a uri or a sql, and has {'both' if source.sql else 'none'}."
        )


def _check_options(source: Source, stated: Mapping[str, Any]) -> None:
    """Raise for an option that a source of this kind would ignore."""
    for option in stated:
        if option not in _OPTIONS[source.kind] and source.states(option):
            raise BadConfiguration(
                f"source {source.name!r} has the option {option!r}, which a source of {source.kind} does not take; it takes "
                f"{', '.join(_OPTIONS[source.kind])}."
            )
    if source.sql and not source.connection:
        raise BadConfiguration(
            f"source {source.name!r} has a sql and no connection: say which Airflow Connection it is for."
        )


def _check_types(source: Source) -> None:
    if not isinstance(source.types, Mapping):
        raise BadConfiguration(
            f"source {source.name!r}: types={source.types!r}: expected a dict such as {{'id': 'BIGINT'}}."
        )
    for column, kind in source.types.items():
        if not _TYPE.match(str(kind)):
            raise BadConfiguration(
                f"source {source.name!r}: types[{column!r}]={kind!r} is not a DuckDB type such as BIGINT."
            )


def _check_csv(source: Source) -> None:
    """Raise for characters that would mean two things, and for an encoding that there is not."""
    what = f"source {source.name!r}"
    if not str(source.skip_lines).isdecimal() or int(source.skip_lines) > _MOST_SKIPPED:
        raise BadConfiguration(
            f"{what}: skip_lines={source.skip_lines!r}: expected a whole number of at most {_MOST_SKIPPED:,}."
        )
    for option in ("delimiter", "quote", "decimal", "thousands"):
        value = getattr(source, option)
        longest = 4 if option == "delimiter" else 1
        least = 0 if option in ("quote", "thousands") else 1
        if value is None and option == "delimiter":
            continue
        if not isinstance(value, str) or not least <= len(value) <= longest or set(value) & set("\r\n\0"):
            raise BadConfiguration(
                f"{what}: {option}={value!r}: expected {'one character' if longest == 1 else 'up to four characters'}"
                f"{'' if least else ', or none'}."
            )
        if option in ("decimal", "thousands") and re.search(r"[\w+-]", value):
            raise BadConfiguration(f"{what}: {option}={value!r} may be a part of a number itself.")
    if source.quote and (not source.quote.isascii() or source.quote in " +-." or source.quote.isalnum()):
        raise BadConfiguration(f"{what}: quote={source.quote!r}: expected a character such as ' or \".")
    if source.quote and source.quote in (source.delimiter or ","):
        raise BadConfiguration(
            f"{what}: quote={source.quote!r} and delimiter={source.delimiter!r} are the same."
        )
    if source.decimal == source.thousands:
        raise BadConfiguration(f"{what}: decimal and thousands are both {source.decimal!r}.")
    try:
        b"x".decode(source.encoding, "backslashreplace")
        codecs.getincrementaldecoder(source.encoding)
    except (LookupError, TypeError, ValueError):
        raise BadConfiguration(
            f"{what}: encoding={source.encoding!r} is none that Python knows: expected utf-8, cp1252, utf-16, ..."
        ) from None


def _check_lake(source: Source) -> None:
    """Raise, with the right form, where the options of a lake's table do not fit together."""
    what = f"source {source.name!r}"
    if source.format == "delta":
        if not isinstance(source.uri, str) or not source.uri or source.sql or source.table or source.catalog:
            raise BadConfiguration(
                f"{what} needs the one uri of a Delta table: {{'format': 'delta', 'uri': …, 'version': …}}."
            )
    elif (
        not source.table
        or "." not in source.table
        or not (source.catalog or source.connection)
        or source.uri
        or source.sql
    ):
        raise BadConfiguration(
            f"{what} needs a table, as namespace.table, and its catalog: {{'format': 'iceberg', 'catalog': {{'type': 'rest', 'uri': …}}, "
            "'table': 'db.orders', 'snapshot_id': …}."
        )
    for key, value in source.catalog.items():
        if is_secret(key, value):
            raise BadConfiguration(
                f"{what}: catalog[{key!r}] is a secret, which a DAG must not hold: put it into the extra of an Airflow "
                f'Connection, as {{"iceberg": {{"{key}": …}}}}, and name that as connection.'
            )
    if not isinstance(source.columns, (list, tuple)):
        raise BadConfiguration(f"{what}: columns={source.columns!r}: expected a list of names.")
    if not isinstance(source.filters, (list, tuple)):
        raise BadConfiguration(
            f"{what}: filters={source.filters!r}: expected a list of [column, sign, value]."
        )
    for item in source.filters:
        _check_filter(what, item)


def _check_filter(what: str, item: Any) -> None:
    if (
        not isinstance(item, (list, tuple))
        or len(item) != 3
        or not isinstance(item[0], str)
        or item[1] not in _SIGNS
    ):
        raise BadConfiguration(
            f"{what}: filters has {item!r}: expected [column, sign, value] with a sign of {' '.join(_SIGNS)}."
        )
    _, sign, value = item
    if (sign == "in") != isinstance(value, (list, tuple)):
        raise BadConfiguration(
            f"{what}: filters has {item!r}: a list of values goes with 'in', and only with it."
        )
    if value in (None, [], ()) or (sign == "in" and None in value):
        raise BadConfiguration(
            f"{what}: filters has {item!r}: no row compares with nothing: select missing values in the query."
        )
