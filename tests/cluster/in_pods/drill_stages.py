"""What the drills run in pods; their Pods mount this folder, as a team mounts code that is in no image."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lepton_airflow.stages import Result, RunInfo, Stage


@dataclass(kw_only=True)
class WaitForFile(Stage):
    """Add a line to ``starts`` in a folder, and wait there until a file ``go`` is there.

    :param folder: a folder that pod and test share.
    :param megabytes: memory to take meanwhile [MiB].
    """

    cacheable: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("starts",)

    folder: str
    megabytes: int | str = 0

    def run(self, run: RunInfo) -> Result:
        starts = wait_for_file(self.folder, int(self.megabytes))
        return Result(summary="The file came.", values={"starts": starts})


def wait_for_file(folder: str, megabytes: int) -> int:
    """Do what the stage does; also called by a plain pod. Returns how often it was started."""
    starts, go = Path(folder, "starts"), Path(folder, "go")
    with starts.open("a") as out:
        out.write(f"{os.uname().nodename}\n")
    print(f"start {len(starts.read_text().split())} of the stage", flush=True)
    held = bytearray(b"x") * (megabytes << 20)
    while not go.exists():
        time.sleep(0.05)
    return len(starts.read_text().split()) + 0 * len(held)
