"""Train torch modules: a module, a loss and tensors go in, the trained module comes out.

No step waits for the device: losses are summed there and read once an epoch, and batches are gathered there or arrive while
it computes. A killed fit resumes at the exact batch, with the order of the rows, the sums and the random state that it had;
on a CPU its weights are equal to those of an undisturbed fit to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, BadInput, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lepton_airflow.training.trainer import TrainerRun

PRECISIONS = ("auto", "fp32", "bf16")
_REPORT_S = 30.0  # between two reports within a long epoch
_AHEAD = 3  # batches on their way to the device
_RESIDENT_SHARE = 0.4  # of the device's free memory; weights, gradients and activations need the rest
# Autocast adds a kernel for each cast. It pays where a step computes for longer than these take to launch: 10 GFLOP are
# 0.15 ms of fp32 on an H100, some tens of kernel launches.
_BF16_PAYS_FLOP = 1e10


def fit_torch(
    net: Any,
    loss: Callable[..., Tensor],
    train: Sequence[Tensor],
    run: TrainerRun,
    *,
    valid: Sequence[Tensor] | None = None,
    optimizer: Callable[[Iterable[Any]], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    batch_size: int = 256,
    epochs: int = 10,
    patience: int | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    precision: str = "auto",
    compile: bool = False,  # noqa: A002  torch's own name for it
    resident: bool | None = None,
) -> Any:
    """Train ``net`` on ``run.device``, resuming where a killed try stopped; returns it on the CPU, ready to predict.

    Make ``net`` in your ``fit``, where everything is seeded. With ``valid``, its weights are those of the epoch with the
    smallest loss on these rows. Every epoch is reported with ``train_loss`` and ``valid_loss``. In a refit, it runs as many
    epochs as the best one had been.

    :param loss: ``loss(net(*inputs), target)`` is the mean loss of a batch, a scalar tensor.
    :param train: the inputs, usually one tensor, and last the target; all with the same number of rows.
    :param valid: the same for other rows.
    :param optimizer: makes the optimizer for the parameters; by default AdamW with its default settings.
    :param schedule: makes a learning rate schedule for the optimizer; it steps with every batch.
    :param batch_size: rows per step of the optimizer; the last batch has one more if a single row would be left [rows].
    :param epochs: passes over the rows at most.
    :param patience: epochs without a better loss on ``valid`` before it stops; None: it never stops early.
    :param accumulate: parts in which a batch is computed, for batches whose activations do not fit in memory.
    :param clip_norm: largest norm of a step's gradient; None: no limit.
    :param precision: ``fp32``; ``bf16`` for autocast to bfloat16; ``auto``: bf16 on a GPU that computes in it, for steps of
        10 GFLOP and more.
    :param compile: use torch.compile, which takes a minute to begin with and needs a C compiler.
    :param resident: keep all rows on the device; None: if they take less than 40% of its free memory. Otherwise a thread
        gathers batches into pinned memory, and they are copied while the device computes.
    :raises BadInput: the loss is not finite any more.
    """
    require("torch", "fit_torch", "torch")
    import torch

    if run.settled is not None:
        epochs = run.settled.get("epochs", epochs)
    _check(train, valid, batch_size, epochs, patience, accumulate, clip_norm, precision)
    torch.set_num_threads(run.threads)
    device = _device(run.device)
    net.to(device)
    parameters = [p for p in net.parameters() if p.requires_grad]
    made = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, fused=device.type == "cuda")
    tables = [train, valid] if valid is not None else [train]
    if resident is None:
        resident = _fits([t for table in tables for t in table], device)

    def value_of(*batch: Tensor) -> Tensor:
        return loss(net(*batch[:-1]), batch[-1])

    if compile:
        _need_compiler()
        value_of = torch.compile(value_of)
    bf16 = precision == "bf16" or (
        precision == "auto" and _bf16_pays(parameters, batch_size // accumulate, device)
    )
    loop = _Loop(
        run=run,
        net=net,
        value_of=value_of,
        optimizer=made,
        schedule=schedule(made) if schedule is not None else None,
        parameters=parameters,
        device=device,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience if valid is not None else None,
        part_rows=math.ceil(batch_size / accumulate),
        clip_norm=clip_norm,
        autocast=(lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else contextlib.nullcontext,
        train=_Table(train, device, resident),
        valid=_Table(valid, device, resident) if valid is not None else None,
    )
    run.say(
        f"training {sum(p.numel() for p in parameters):,} parameters on {_name(device)} in {'bf16' if bf16 else 'fp32'}, "
        f"{loop.train.rows:,} rows {'on the device' if resident else 'streamed to it'}"
    )
    loop.run_epochs()
    run.settle(epochs=loop.best_epoch if valid is not None else epochs)
    return net.eval().cpu()


def _check(
    train: Sequence[Tensor],
    valid: Sequence[Tensor] | None,
    batch_size: int,
    epochs: int,
    patience: int | None,
    accumulate: int,
    clip_norm: float | None,
    precision: str,
) -> None:
    for name, table in (("train", train), ("valid", valid)):
        lengths = [len(tensor) for tensor in table or ()]
        if table is not None and (len(lengths) < 2 or len(set(lengths)) > 1 or not lengths[0]):
            raise BadInput(
                f"fit_torch: {name} has tensors of {lengths} rows; expected one or more inputs and last the target, all with "
                "the same number of rows, at least one."
            )
    for name, value in (
        ("batch_size", batch_size),
        ("epochs", epochs),
        ("patience", patience),
        ("accumulate", accumulate),
    ):
        if value is not None and value < 1:
            raise BadConfiguration(f"fit_torch: {name}={value}, expected at least 1.")
    if accumulate > batch_size:
        raise BadConfiguration(
            f"fit_torch: accumulate={accumulate} parts of batch_size={batch_size} rows, expected at most one a row."
        )
    if clip_norm is not None and not clip_norm > 0:
        raise BadConfiguration(f"fit_torch: clip_norm={clip_norm}, expected above 0, or None for no limit.")
    if precision not in PRECISIONS:
        raise BadConfiguration(
            f"fit_torch: precision={precision!r}, expected one of {', '.join(PRECISIONS)}."
        )


def _device(name: str) -> torch.device:
    """The device of that name; ``auto`` is cuda where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadConfiguration(
            f"device={name!r} cannot be used here: {str(error).splitlines()[0]} Expected auto, cpu, or a device that torch "
            f"{torch.__version__} finds on the machine where the stage runs."
        ) from None
    return device


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _fits(tensors: Sequence[Tensor], device: torch.device) -> bool:
    import torch

    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.numel() * t.element_size() for t in tensors) <= _RESIDENT_SHARE * free


def _bf16_pays(parameters: Sequence[Any], rows: int, device: torch.device) -> bool:
    """Whether a step is long enough for autocast; it takes at least 2 FLOP forward and 4 backward per weight and row."""
    import torch

    weights = sum(p.numel() for p in parameters if p.dim() > 1)
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and 6 * weights * rows >= _BF16_PAYS_FLOP
    )


def _need_compiler() -> None:
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["cc", "gcc", "clang"])):
        raise BadConfiguration(
            f"compile: torch.compile needs a C compiler, and there is no {named or 'cc, gcc or clang'} where the stage runs; "
            "install one there (gcc and g++), or leave compile off."
        )


# -- rows --------------------------------------------------------------------------------------------------------------


def _count(rows: int, size: int) -> int:
    """How many parts of a size rows make. A single row at the end joins the part before it, since batch normalization
    cannot learn from one row."""
    return rows // size if rows > size and rows % size == 1 else math.ceil(rows / size)


def _spans(rows: int, size: int, start: int = 0) -> Iterator[slice]:
    """The parts that :func:`_count` counts, from part ``start`` on."""
    count = _count(rows, size)
    return (slice(n * size, rows if n + 1 == count else (n + 1) * size) for n in range(start, count))


class _Table:
    """Rows as tensors, whose batches get onto the device without making it wait."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, resident: bool) -> None:
        self.rows, self.device, self.resident = len(tensors[0]), device, resident
        self.tensors = [t.to(device) for t in tensors] if resident else [t.cpu() for t in tensors]

    def batches(self, order: Tensor, size: int, start: int = 0) -> Generator[list[Tensor]]:
        """The rows in an order, in batches of a size, from batch ``start`` on."""
        if self.resident:
            for span in _spans(len(order), size, start):
                rows = order[span]
                yield [tensor.index_select(0, rows) for tensor in self.tensors]
        else:
            yield from self._streamed(order.cpu(), size, start)

    def _streamed(self, order: Tensor, size: int, start: int) -> Generator[list[Tensor]]:
        import torch

        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None
        ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        over = threading.Event()

        def put(item: Any) -> None:
            while not over.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return

        def gather() -> None:
            try:
                for span in _spans(len(order), size, start):
                    if over.is_set():
                        return
                    rows = order[span]
                    # torch reuses a pinned buffer only when the copy from it is done.
                    here = [
                        torch.index_select(
                            t,
                            0,
                            rows,
                            out=torch.empty((len(rows), *t.shape[1:]), dtype=t.dtype, pin_memory=cuda),
                        )
                        for t in self.tensors
                    ]
                    with torch.cuda.stream(stream):
                        there = [t.to(self.device, non_blocking=True) for t in here]
                    put((there, stream.record_event() if stream is not None else None))
                put(None)
            except BaseException as error:  # noqa: BLE001  raised again where the batches are taken
                put(error)

        thread = threading.Thread(target=gather, name="batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                batch, copied = item
                if copied is not None:
                    computing = torch.cuda.current_stream(self.device)
                    computing.wait_event(copied)
                    for tensor in batch:
                        tensor.record_stream(computing)
                yield batch
        finally:
            over.set()
            thread.join()


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass
class _Loop:
    """One fit, and how far it is.

    :ivar epoch: whole epochs that are done.
    :ivar batch: batches of the present epoch that are done.
    :ivar best_epoch: number of the epoch with the smallest loss on ``valid``, from 1 on.
    :ivar weights: those of the best epoch.
    """

    run: TrainerRun
    net: Any
    value_of: Callable[..., Tensor]
    optimizer: Any
    schedule: Any
    parameters: list[Any]
    device: torch.device
    batch_size: int
    epochs: int
    patience: int | None
    part_rows: int
    clip_norm: float | None
    autocast: Callable[[], Any]
    train: _Table
    valid: _Table | None
    epoch: int = 0
    batch: int = 0
    best: float = math.inf
    best_epoch: int = 0
    since_best: int = 0
    weights: dict[str, Tensor] | None = field(default=None, repr=False)

    @cached_property
    def batches(self) -> int:
        """Batches of an epoch."""
        return _count(self.train.rows, self.batch_size)

    @cached_property
    def total(self) -> Tensor:
        """Sum of the epoch's losses so far, on the device."""
        import torch

        return torch.zeros((), dtype=torch.float64, device=self.device)

    def run_epochs(self) -> None:
        """Run the remaining epochs, and give the net the best weights."""
        found = self.run.latest_checkpoint()
        if found is not None:
            self.restore(found.path / "state.pt")
        while self.epoch < self.epochs and (self.patience is None or self.since_best < self.patience):
            self.train_epoch()
            self.end_epoch()
            self.offer_checkpoint()
        if self.weights is not None:
            self.net.load_state_dict(self.weights)

    def train_epoch(self) -> None:
        """Train on the remaining batches of this epoch."""
        import torch

        self.net.train()
        order = torch.randperm(self.train.rows, generator=self._order(), device=self.device)
        told = time.monotonic()
        with contextlib.closing(self.train.batches(order, self.batch_size, self.batch)) as batches:
            for batch in batches:
                self.step(batch)
                self.batch += 1
                if self.batch == self.batches:
                    break
                if time.monotonic() - told >= _REPORT_S:
                    told = time.monotonic()
                    mean = float(self.total) / (self.batch * self.batch_size)
                    part = self.epoch + self.batch / self.batches
                    self.run.report(part, of=self.epochs, unit="epoch", train_loss=mean)
                self.offer_checkpoint()

    def _order(self) -> torch.Generator:
        """The generator for the order of the rows; seed and epoch alone decide it, so a resumed epoch keeps its order."""
        import torch

        digest = hashlib.sha256(f"{self.run.seed}/{self.epoch}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def step(self, batch: list[Tensor]) -> None:
        """One step of the optimizer."""
        import torch

        rows = len(batch[0])
        for span in _spans(rows, self.part_rows):
            part = batch if rows <= self.part_rows else [t[span] for t in batch]
            with self.autocast():
                value = self.value_of(*part)
            (value if part is batch else value * (len(part[0]) / rows)).backward()
            self.total.add_(value.detach(), alpha=len(part[0]))
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end_epoch(self) -> None:
        """Compute the loss on the held-out rows, keep the weights if it is the best, and report the epoch."""
        report = {"train_loss": float(self.total) / self.train.rows}
        if self.valid is not None:
            report["valid_loss"] = self.valid_loss(self.valid)
        for name, value in report.items():
            if not math.isfinite(value):
                raise BadInput(
                    f"{name} is {value} in epoch {self.epoch + 1}: the training diverged, or the rows hold no numbers. Lower "
                    "the learning rate, set clip_norm, or fill missing values."
                )
        if self.valid is not None:
            better = report["valid_loss"] < self.best
            self.since_best = 0 if better else self.since_best + 1
            if better:
                self.best, self.best_epoch = report["valid_loss"], self.epoch + 1
                self.weights = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.epoch, self.batch = self.epoch + 1, 0
        self.total.zero_()
        self.run.report(self.epoch, of=self.epochs, unit="epoch", **report)

    def valid_loss(self, valid: _Table) -> float:
        """The mean loss on held-out rows."""
        import torch

        total = torch.zeros_like(self.total)
        self.net.eval()
        order = torch.arange(valid.rows, device=self.device)
        with (
            torch.inference_mode(),
            contextlib.closing(valid.batches(order, 4 * self.part_rows)) as batches,
        ):
            for batch in batches:
                with self.autocast():
                    value = self.value_of(*batch)
                total.add_(value, alpha=len(batch[0]))
                if self.run.should_stop():
                    # All batches of the epoch are trained on: the next try begins with this loss.
                    self.offer_checkpoint()
        return float(total) / valid.rows

    def offer_checkpoint(self) -> None:
        """Let a checkpoint be written if one is due."""
        self.run.save_checkpoint(self.epoch * self.batches + self.batch, self.write)

    def write(self, folder: Path) -> None:
        """Write all that the rest of the fit depends on."""
        import torch

        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "total": self.total,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "since_best": self.since_best,
            "weights": self.weights,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "random": _random_state(self.device),
        }
        torch.save(state, folder / "state.pt")

    def restore(self, path: Path) -> None:
        """Restore the state that :meth:`write` wrote."""
        import torch

        # weights_only: it loads tensors and numbers, and runs no pickled code.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.best, self.since_best = state["best"], state["since_best"]
        self.best_epoch = state["best_epoch"]
        self.total.copy_(state["total"])
        self.net.load_state_dict(state["net"])
        if state["weights"] is not None:
            self.weights = {k: v.to(self.device) for k, v in state["weights"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        _set_random_state(state["random"], self.device)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a module may draw from, in numbers and tensors."""
    import random

    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()  # noqa: NPY002  a module may draw from the global generator
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, [int(k) for k in keys], *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    import random

    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
