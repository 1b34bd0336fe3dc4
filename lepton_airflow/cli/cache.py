"""``cache ls`` and ``cache evict``: what can be reused, and room for more."""

from __future__ import annotations

import argparse
import os
import sys

from lepton_airflow.cli import Commands, seconds, store_of

_WEEK_S = 7 * 24 * 3600.0


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    cache = commands.add_parser("cache", help="look at the cache or make room in it").add_subparsers(
        required=True, metavar="ls|evict"
    )
    ls = cache.add_parser("ls", help="list what can be reused, oldest first")
    make_room = cache.add_parser("evict", help="drop entries, and the artifacts that nothing needs any more")
    make_room.add_argument(
        "--older-than-s",
        type=seconds,
        default=_WEEK_S,
        help="only entries at least this old [seconds]; default: a week. Runs as old as this must have ended",
    )
    for command, call in ((ls, _cache_ls), (make_room, _cache_evict)):
        command.add_argument(
            "--store", default=os.environ.get("AIRFLOW__LEPTON__STORE"), help="the store's URI"
        )
        command.add_argument("--stage", help="only this stage's entries")
        command.set_defaults(call=call)


def _cache_ls(args: argparse.Namespace) -> int:
    from lepton_airflow.store.cache import entries

    found = entries(store_of(args))
    if not found:
        print(f"nothing is cached in {args.store}", file=sys.stderr)
    for entry in found:
        if args.stage in (None, entry.stage):
            size = sum(a.bytes for a in entry.artifacts.values())
            print(
                f"{entry.created}  {entry.stage:<14} {(entry.cache_key or '')[:12]}  {size:>12,} B  {entry.seconds:>8.1f} s"
            )
    return 0


def _cache_evict(args: argparse.Namespace) -> int:
    from lepton_airflow.store.eviction import evict

    dropped, freed = evict(store_of(args), stage=args.stage, older_than_s=args.older_than_s)
    print(f"{dropped} entries and {freed:,} bytes removed")
    return 0
