"""``stages`` and ``describe``: what there is to run; needs neither Airflow nor an engine."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict

from lepton_airflow.cli import Commands
from lepton_airflow.sdk.description import describe
from lepton_airflow.stages import all_stages, get_stage


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    stages = commands.add_parser("stages", help="list the stages, one line each")
    stages.set_defaults(call=_stages)

    show = commands.add_parser("describe", help="show a stage's parameters: types, defaults, units")
    show.add_argument("stage")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(call=_describe)


def _stages(_: argparse.Namespace) -> int:
    found = all_stages()
    width = max(map(len, found), default=0)
    for name, stage in found.items():
        print(f"{name:<{width}}  {(stage.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _describe(args: argparse.Namespace) -> int:
    stage = get_stage(args.stage)
    parameters = describe(stage)
    if args.json:
        print(json.dumps({"stage": args.stage, "parameters": [asdict(p) for p in parameters]}, indent=1))
        return 0
    first = (stage.__doc__ or "").strip().splitlines()[0]
    print(f"{args.stage}: {first}\n")
    for p in parameters:
        print(
            f"  {p.name}: {p.type} = {p.default}"
            if p.default != "required"
            else f"  {p.name}: {p.type}  (required)"
        )
        for line in textwrap.wrap(p.text, 100):
            print(f"      {line}")
    print(f"\nreturns: {', '.join(stage.outputs) or 'no outputs'}")
    print(f"reused from the cache: {'yes' if stage.cacheable else 'never'}")
    if stage.extra:
        print(f"needs: pip install 'lepton-airflow[{stage.extra}]' where it runs")
    return 0
