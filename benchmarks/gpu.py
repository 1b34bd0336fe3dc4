"""How much of a GPU `fit_torch` keeps busy: against a loop written by hand, and against the device's own limit.

`small_ratio`, `large_ratio`: rows per second of `fit_torch` over those of a plain PyTorch loop with the same module, rows on
the device, precision, optimizer and order of work; median of paired epochs, the two taking turns. Small: 0.2 million weights
in fp32, batches of 1024. Large: 134 million weights in bf16 autocast, batches of 16384 rows; `large_mfu` is its share of the
device's peak (6 FLOP per weight and row), `large_of_matmul` its share of what one bf16 matrix product of 8192 reaches here.
`streamed_ratio`: the speed with rows from pinned memory over that with rows on the device. `syncs_per_step`: how often a step waits
for the device. `checkpoint_stall_s`: how long training stops for a checkpoint of the large model. `resume_difference`: between the
validation loss of the MLP in a stage that was killed with SIGTERM and resumed, and that of an undisturbed run. `gpu_…`: as in the
receipt of that run.

Runs where `lepton-airflow[torch]` and nvidia-ml-py are installed: `make bench-gpu`, or `python benchmarks/gpu.py`.
`--cpu-smoke` runs all of it on a CPU with tiny sizes, to see that it works: the numbers mean nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GOALS = {
    "small_ratio": ">= 0.98",
    "large_ratio": ">= 0.98",
    "syncs_per_step": "0",
    "resume_difference": "0, up to rounding",
}
# Dense bf16, without sparsity, as the makers' data sheets say [FLOP/s].
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
NO_GPU = 99


@dataclass(frozen=True)
class Case:
    """A network of square layers and its rows."""

    width: int
    layers: int
    outputs: int
    rows: int
    batch: int
    epochs: int
    precision: str

    def net(self) -> Any:
        import torch
        from torch import nn

        torch.manual_seed(0)
        hidden = [m for _ in range(self.layers) for m in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(self.width, self.outputs))

    @functools.cache  # noqa: B019  the few cases live as long as the program
    def data(self) -> list[Any]:
        """The rows, on the CPU."""
        import torch

        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.width, generator=draw)
        return [x, torch.randint(self.outputs, (self.rows,), generator=draw)]

    @property
    def flop(self) -> float:
        """Of one step: a multiplication and an addition per weight and row, forward once and backward twice."""
        return 6.0 * (self.layers * self.width**2 + self.width * self.outputs) * self.batch


SMALL = Case(width=256, layers=3, outputs=2, rows=2**20, batch=1024, epochs=6, precision="fp32")
LARGE = Case(width=4096, layers=8, outputs=1000, rows=2**18, batch=2**14, epochs=8, precision="bf16")


def measure(device: str = "cuda", scale: float = 1.0) -> dict[str, Any]:
    """All numbers; ``scale`` below 1 makes everything smaller."""
    import torch

    small, large = (_scaled(case, scale) for case in (SMALL, LARGE))
    numbers: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    for name, case in (("small", small), ("large", large)):
        ours, by_hand = _paired(case, device)
        numbers[f"{name}_rows_per_s"] = round(case.rows / statistics.median(ours))
        numbers[f"{name}_ratio"] = round(
            statistics.median(b / a for a, b in zip(ours, by_hand, strict=True)), 4
        )
        if name == "large":
            flops = case.flop / case.batch * case.rows / statistics.median(ours)
            numbers["large_tflops"] = round(flops / 1e12, 3)
            peak = next((p for n, p in PEAKS.items() if n in numbers["device"]), None)
            if peak:
                numbers["large_mfu"] = round(flops / peak, 4)
            numbers["large_of_matmul"] = round(flops / _matmul_flops(device, int(8192 * scale) or 64), 4)
            streamed = _epochs(case, device, resident=False)
            numbers["streamed_ratio"] = round(statistics.median(ours) / statistics.median(streamed), 4)
            numbers["checkpoint_stall_s"] = round(_checkpoint_stall(case, device), 3)
    numbers["syncs_per_step"] = _syncs_per_step(small, device)
    return numbers | _killed_and_resumed(
        device, rows=int(400_000 * scale) or 2000, epochs=30 if scale == 1 else 8
    )


def _scaled(case: Case, scale: float) -> Case:
    if scale == 1:
        return case
    width = max(16, int(case.width * scale))
    batch = max(32, int(case.batch * scale))
    return replace(case, width=width, outputs=min(case.outputs, 10), batch=batch, rows=8 * batch, epochs=3)


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


# -- throughput --------------------------------------------------------------------------------------------------------


def _optimizer(parameters: Any) -> Any:
    import torch

    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)


def _paired(case: Case, device: str) -> tuple[list[float], list[float]]:
    """Seconds of epochs of ``fit_torch`` and of the loop by hand, in turns; the first epoch of each turn warms up."""
    ours: list[float] = []
    by_hand: list[float] = []
    for number in range(4):
        for turn in (0, 1) if number % 2 == 0 else (1, 0):
            (by_hand if turn else ours).extend((_epochs_by_hand if turn else _epochs)(case, device))
    return ours, by_hand


def _run(device: str, folder: Path, said: Callable[[str], None]) -> Any:
    from lepton_airflow.data.dataset import DatasetInfo
    from lepton_airflow.store import Store
    from lepton_airflow.store.checkpoints import Checkpoints
    from lepton_airflow.training.trainer import TrainerRun

    return TrainerRun(
        info=DatasetInfo(target="y", task="classification", features=["x"]),
        features=["x"],
        target="y",
        task="classification",
        classes=[0, 1],
        seed=0,
        threads=os.cpu_count() or 1,
        device=device,
        checkpoints=Checkpoints(
            Store(str(folder / "store")), "checkpoints/bench/fit", folder / "scratch", 60.0
        ),
        say=said,
    )


def _epochs(case: Case, device: str, *, resident: bool = True) -> list[float]:
    import torch

    from lepton_airflow.models import fit_torch

    ends: list[float] = []  # an epoch is told when its loss was read: the device has done it then
    with tempfile.TemporaryDirectory() as folder:
        run = _run(device, Path(folder), lambda _text: ends.append(time.perf_counter()))
        fit_torch(
            case.net(),
            torch.nn.CrossEntropyLoss(),
            case.data(),
            run,
            optimizer=_optimizer,
            batch_size=case.batch,
            epochs=case.epochs,
            precision=case.precision,
            resident=resident,
        )
    return [b - a for a, b in itertools.pairwise(ends[-case.epochs :])]


def _epochs_by_hand(case: Case, device: str) -> list[float]:
    """What one writes without us: nothing that is not needed, and no wait within an epoch."""
    import torch

    net = case.net().to(device)
    x, y = (t.to(device) for t in case.data())
    optimizer, loss = _optimizer(net.parameters()), torch.nn.CrossEntropyLoss()
    bf16 = case.precision == "bf16"
    ends = []
    for _ in range(case.epochs):
        order = torch.randperm(len(x), device=device)
        total = torch.zeros((), device=device)
        for first in range(0, len(x), case.batch):
            rows = order[first : first + case.batch]
            with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
                value = loss(net(x[rows]), y[rows])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += value.detach()
        float(total)
        ends.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(ends)]


def _matmul_flops(device: str, size: int) -> float:
    """FLOP/s of the best of some bf16 products of two square matrices."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(5):
            c = a @ b
        float(c[0, 0])
        best = min(best, (time.perf_counter() - started) / 5)
    return 2.0 * size**3 / best


def _checkpoint_stall(case: Case, device: str) -> float:
    """Seconds for which a step waits while a checkpoint is written: what goes to the store goes beside it."""
    import torch

    from lepton_airflow.models import fit_torch

    with tempfile.TemporaryDirectory() as folder:
        run = _run(device, Path(folder), lambda _text: None)
        stalls: list[float] = []
        offer = run.save_checkpoint

        def timed(step: int, write: Callable[[Path], object]) -> bool:
            run.checkpoints.every_s = 0.0 if step == 2 else 3600.0
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            written = offer(step, write)
            if written:
                stalls.append(time.perf_counter() - started)
            return bool(written)

        run.save_checkpoint = timed
        how: dict[str, Any] = {"batch_size": case.batch, "epochs": 1, "precision": case.precision}
        fit_torch(case.net(), torch.nn.CrossEntropyLoss(), case.data(), run, optimizer=_optimizer, **how)
        run.checkpoints.settle()
    return stalls[0]


def _syncs_per_step(case: Case, device: str) -> float:
    """Waits for the device that a step adds, as torch's own debug mode counts them."""
    import torch

    from lepton_airflow.models import fit_torch

    def waits(steps: int) -> int:
        few = replace(case, rows=steps * case.batch)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                run = _run(device, Path(folder), lambda _text: None)
                how: dict[str, Any] = {"batch_size": case.batch, "epochs": 1, "clip_norm": 1.0}
                fit_torch(
                    few.net(), torch.nn.CrossEntropyLoss(), few.data(), run, optimizer=_optimizer, **how
                )
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)

    return (waits(60) - waits(10)) / 50


# -- the whole stage ---------------------------------------------------------------------------------------------------


def _killed_and_resumed(device: str, rows: int, epochs: int) -> dict[str, Any]:
    """Train the MLP undisturbed, and once more with a SIGTERM after its first checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(Path(folder), rows)
        whole, _ = _train(Path(folder), "whole", device, epochs, stop=False)
        resumed, code = _train(Path(folder), "resumed", device, epochs, stop=True)
    if code != 75:
        raise SystemExit(
            f"gpu: the fit ended with {code} before it could be stopped; give it more rows or epochs."
        )
    key = "valid_log_loss"
    gpu = {name: value for name, value in whole.items() if name.startswith("gpu_")}
    return {"resume_difference": abs(whole[key] - resumed[key]), **gpu}


def _write_rows(folder: Path, rows: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lepton_airflow.data.dataset import DatasetInfo

    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, 20)).astype(np.float32)
    y = (np.sin(x[:, 0] * 2) + x[:, 1] * x[:, 2] + draw.normal(size=rows) > 0).astype(int)
    names = [f"x{i}" for i in range(20)]
    info = DatasetInfo(target="y", task="classification", features=names, classes=[0, 1], split_id="bench")
    for split, part in (("train", slice(0, rows * 9 // 10)), ("valid", slice(rows * 9 // 10, rows))):
        table = pa.table({n: x[part, i] for i, n in enumerate(names)} | {"y": y[part]})
        about = json.dumps(asdict(replace(info, split=split, rows=len(table)))).encode()
        pq.write_table(table.replace_schema_metadata({b"lepton": about}), folder / f"{split}.parquet")


def _train(folder: Path, name: str, device: str, epochs: int, *, stop: bool) -> tuple[dict[str, float], int]:
    """The metrics in the receipt, and the exit code of the first try."""
    from lepton_airflow.contract import Receipt, Request, RunIdentity
    from lepton_airflow.store import Store

    request = Request(
        stage="TrainModel",
        parameters={
            "dataset": str(folder / "train.parquet"),
            "valid": str(folder / "valid.parquet"),
            "trainer": "mlp",
            "hyperparameters": {"epochs": epochs, "patience": epochs, "hidden": 256},
            "device": device,
            "checkpoint_s": 0.5 if device == "cuda" else 0.02,
        },
        store=str(folder / name),
        identity=RunIdentity(run_id=name),
    )
    (folder / "request.json").write_text(request.to_json())
    command = [sys.executable, "-m", "lepton_airflow", "run", "request.json", "receipt.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    codes: list[int] = []
    while not codes or codes[-1] == 75:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        if stop and not codes:
            store = Store(str(folder / name))
            while process.poll() is None and not any(
                k.endswith("/latest") for k in store.keys("checkpoints")
            ):
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        codes.append(process.returncode)
    if codes[-1]:
        raise SystemExit(f"gpu: the fit in a process of its own failed with {codes[-1]}:\n{output}")
    metrics = Receipt.from_json((folder / "receipt.json").read_text()).metrics
    return {key: value for key, value in metrics.items() if value is not None}, codes[0]


def lacks() -> str:
    """Why this cannot be measured here; empty when it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} finds no CUDA device here, and these numbers are of one; --cpu-smoke only tries the script."


def main() -> int:
    """Run it alone; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="tiny sizes on a CPU; the numbers mean nothing"
    )
    smoke = parser.parse_args().cpu_smoke
    if not smoke and (lack := lacks()):
        print(f"gpu: {lack}", file=sys.stderr)
        return NO_GPU
    print(json.dumps(measure("cpu", 0.01) if smoke else measure()))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
