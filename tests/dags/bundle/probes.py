"""A team's own stages beside its DAGs, for drills on a real Airflow."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lepton_airflow.stages import ArtifactUri, ConnectionId, Result, RunInfo, Stage


@dataclass(kw_only=True)
class WaitForFile(Stage):
    """Write its process id into ``folder`` and wait until a file ``go`` is there.

    :param folder: where to write ``pid`` and look for ``go``.
    """

    cacheable: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("starts",)

    folder: str

    def run(self, run: RunInfo) -> Result:
        folder = Path(self.folder)
        starts = folder / "starts"
        with starts.open("a") as out:
            out.write(f"{os.getpid()}\n")
        while not (folder / "go").exists():
            time.sleep(0.05)
        return Result(summary="the file came", values={"starts": len(starts.read_text().split())})


@dataclass(kw_only=True)
class CountLetters(Stage):
    """Count the letters of a text, and keep the count as an artifact.

    :param text: what to count.
    :param earlier: artifacts of other counts to add.
    :param database: a Connection that it looks at.
    """

    outputs: ClassVar[tuple[str, ...]] = ("count", "letters", "window")

    text: str
    earlier: list[ArtifactUri] | None = None
    database: ConnectionId | None = None

    def run(self, run: RunInfo) -> Result:
        total = len(self.text) + sum(int(run.fetch(uri).read_text()) for uri in self.earlier or [])
        if self.database:
            password = run.connection(self.database).password or ""
            print(f"a careless library prints its password {password} here")
            total += len(password)
        window = [run.window.start, run.window.end] if run.window else None
        return Result(
            summary=f"{total} letters",
            artifacts={"count": run.save("count.txt", str(total))},
            values={"letters": total, "window": window},
            metrics={"letters": total},
        )
