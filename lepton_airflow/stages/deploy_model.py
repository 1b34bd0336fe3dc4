"""Put a model into service at an endpoint, and wait until its servers say that it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.delivery import endpoints
from lepton_airflow.delivery.endpoints import Status, check_endpoint_name
from lepton_airflow.delivery.waiting import wait_until_served
from lepton_airflow.errors import BadConfiguration, BadInput, require
from lepton_airflow.registry.deployment import GOLDEN_ROWS, Deployment
from lepton_airflow.sdk import backfill
from lepton_airflow.sdk.stage import ArtifactUri, Result, RunInfo, Stage

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.packaging.package import ModelPackage


@dataclass(kw_only=True)
class DeployModel(Stage):
    """Put a model into service at a named endpoint, and wait until its servers report that it is.

    The version asked for becomes a numbered record in the store. The servers of the endpoint follow these records; start
    them yourself, with ``python -m lepton_airflow serve ENDPOINT``. Each server loads the package, verifies its digest,
    answers golden requests whose answers this stage has computed, and measures itself. It answers clients with the
    version only when all is within the limits; otherwise it rejects the version, and the former one stays in service.
    When the version is in service already, the task ends at once. A task that comes late never replaces a champion by an
    older one, nor a package by one of older data.

    Returns the values ``endpoint``, ``deployed`` (whether this task's version is in service), ``version``, ``sha256``
    and ``url`` (those in service after this task, or None), and the artifact ``golden`` (JSON).

    :param endpoint: name of the endpoint: letters, digits, ``.``, ``_`` and ``-``.
    :param name: name of a registered model: its champion, as the ledger has it when this stage runs, is deployed.
    :param model: instead of ``name`` a package, such as ``train.output["model"]``: this one is deployed.
    :param golden: rows for the golden requests, such as ``prepare.output["test"]``; None: rows made from the profile
        that the package holds, and of zeros, ones and missing values where it holds none.
    :param max_difference: of a server's answer from the golden one [probability; for regression a share of the largest
        golden answer].
    :param max_latency_ms: 95th percentile of a one-row request inside the server [milliseconds].
    :param max_memory_mb: a process with this version loaded [MiB].
    :param timeout_s: how long to wait for the servers [seconds].
    :param allow_other_inputs: deploy a model whose inputs, outputs or classes differ from those of the one in service, whose
        clients it refuses or misleads.
    :param on_backfill: in a backfill, ``register_only`` leaves the endpoint as it is, ``skip`` does nothing, ``full``
        deploys.
    :raises BadConfiguration: both or neither of ``name`` and ``model``, a model without a champion, a wrong name, other inputs
        than those of the model in service.
    :raises IntegrityError: a server found bytes that are not those of the digest; not retried.
    :raises BadInput: a server cannot run the package, or answers otherwise than here; not retried.
    :raises LeptonError: no server within ``timeout_s``, or one over its budget; may be retried.
    """

    cacheable: ClassVar[bool] = False
    windowed: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    extra: ClassVar[str] = "evaluate"
    links: ClassVar[tuple[str, ...]] = ("endpoint",)
    outputs: ClassVar[tuple[str, ...]] = ("golden", "endpoint", "deployed", "version", "sha256", "url")

    endpoint: str
    name: str | None = None
    model: ArtifactUri | None = None
    golden: ArtifactUri | None = None
    max_difference: float = 1e-4
    max_latency_ms: float = 100.0
    max_memory_mb: float = 2048.0
    timeout_s: float = 120.0
    allow_other_inputs: bool = False
    on_backfill: Literal["register_only", "skip", "full"] = "register_only"

    def run(self, run: RunInfo) -> Result:
        for library in self.engines:
            require(library, "DeployModel", self.extra)
        check_endpoint_name(self.endpoint)
        if (self.name is None) == (self.model is None):
            raise BadConfiguration(
                f"name={self.name!r} and model={self.model!r}: pass one of them, a registered model whose champion "
                "should be deployed, or a package."
            )
        if not backfill.may_act(run, self.on_backfill, f"endpoint {self.endpoint!r} gets no version"):
            return self._unchanged(run, backfill.reason(self.on_backfill))
        started = time.monotonic()
        asked = Deployment(
            run=run,
            endpoint=self.endpoint,
            name=self.name,
            model=self.model,
            rows=partial(self._rows, run, self.golden) if self.golden is not None else None,
            max_difference=self.max_difference,
            max_latency_ms=self.max_latency_ms,
            max_memory_mb=self.max_memory_mb,
            allow_other_inputs=self.allow_other_inputs,
        ).ask()
        if isinstance(asked, str):
            return self._unchanged(run, asked)
        desired, golden = asked
        status = wait_until_served(run, desired, self.timeout_s)
        deployed = status.serving == desired.sequence
        numbers = status.numbers
        summary = (
            f"version {desired.version} is in service at {status.url}: p95 {numbers['latency_p95_ms']:.2f} ms, "
            f"{numbers['memory_mib']:.0f} MiB, answers within {numbers['difference']:.1g} of the golden ones."
            if deployed
            else f"version {desired.version} was asked for and then version {status.version}, which is in service at "
            f"{status.url}."
        )
        return Result(
            summary=summary,
            artifacts={"golden": golden},
            values=self._values(status, deployed=deployed),
            metrics={**numbers, "ready_s": time.monotonic() - started},
            links={"endpoint": f"{status.url}/v2/models/{self.endpoint}"},
        )

    def _rows(self, run: RunInfo, golden: str, model: ModelPackage) -> pd.DataFrame:
        """The rows of the golden requests, from all over the dataset that was passed."""
        from lepton_airflow.evaluation.rows import check_columns

        path = run.fetch(golden)
        of = f" (champion of {self.name!r})" if self.name else ""
        check_columns(model.card.features, path, f"golden: the model to deploy{of}")
        return _spread(path)

    def _unchanged(self, run: RunInfo, reason: str) -> Result:
        """The result when nothing was asked for; its values are about what is in service."""
        living = [s for s in endpoints.read_statuses(run.store, self.endpoint) if s.alive and s.serving]
        values = self._values(living[0] if living else None, deployed=False)
        return Result(summary=f"endpoint {self.endpoint!r} stays as it is: {reason}", values=values)

    def _values(self, status: Status | None, *, deployed: bool) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "deployed": deployed,
            "version": status and status.version,
            "sha256": status and status.sha256,
            "url": status and status.url,
        }


def _spread(path: Path) -> pd.DataFrame:
    """Rows of a Parquet file at equal distances."""
    import pandas as pd
    import pyarrow.parquet as pq

    parts = []
    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        if not rows:
            raise BadInput(f"golden: {path.name} has no rows; pass a split that has some.")
        wanted = sorted({number * rows // GOLDEN_ROWS for number in range(GOLDEN_ROWS)})
        start = 0
        for batch in file.iter_batches():
            here = [number - start for number in wanted if start <= number < start + len(batch)]
            parts.append(batch.take(here).to_pandas())
            start += len(batch)
    return pd.concat(parts, ignore_index=True)
