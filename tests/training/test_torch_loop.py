"""The torch training loop: equal to the loop one would write by hand, and resumable at any batch."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadConfiguration, BadInput, Preempted
from lepton_airflow.models import fit_torch
from lepton_airflow.store import Store
from lepton_airflow.store.checkpoints import Checkpoints
from lepton_airflow.training.torch_loop import _Table
from lepton_airflow.training.trainer import TrainerRun


def run_of(**about: Any) -> TrainerRun:
    info = DatasetInfo(target="y", task="regression", features=["x"])
    return TrainerRun(
        info=info,
        features=["x"],
        target="y",
        task="regression",
        classes=[],
        **{"seed": 3, "threads": 1} | about,
    )


def rows(n: int = 300, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw)
    return [x, (x[:, :1] * 2 - x[:, 1:2]).sin()]


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(weights(left), weights(right), strict=True):
        assert torch.equal(a, b)


def test_it_is_the_loop_one_would_write_by_hand() -> None:
    x, y = rows(256)
    fitted = fit_torch(network(), nn.MSELoss(), [x, y], run_of(), optimizer=sgd, batch_size=64, epochs=5)
    by_hand = network()
    optimizer = sgd(by_hand.parameters())
    for epoch in range(5):
        seed = int.from_bytes(hashlib.sha256(f"3/{epoch}".encode()).digest()[:8], "big") >> 1
        order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
        for batch in order.split(64):
            optimizer.zero_grad()
            nn.functional.mse_loss(by_hand(x[batch]), y[batch]).backward()
            optimizer.step()
    assert_same(fitted, by_hand)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    def fit(accumulate: int) -> nn.Module:
        return fit_torch(
            network(),
            nn.MSELoss(),
            rows(),
            run_of(),
            optimizer=sgd,
            batch_size=70,
            epochs=3,
            accumulate=accumulate,
        )

    for whole, parts in zip(
        weights(fit(1)), weights(fit(4)), strict=True
    ):  # 70 = 18 + 18 + 18 + 16, and 300 = 4 * 70 + 20
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_a_step() -> None:
    before = network()
    after = fit_torch(
        network(),
        lambda out, y: 1e6 * nn.functional.mse_loss(out, y),
        rows(64),
        run_of(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        batch_size=64,
        epochs=1,
        clip_norm=0.01,
    )
    moved = (
        sum(float(((a - b) ** 2).sum()) for a, b in zip(weights(before), weights(after), strict=True)) ** 0.5
    )
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("resident", [True, False])
def test_a_fit_stopped_at_any_batch_goes_on_as_if_it_had_not_been(tmp_path: Path, resident: bool) -> None:
    """Dropout, momentum, a schedule, early stopping and the order of the rows: all of it comes back."""

    def fit(run: TrainerRun) -> nn.Module:
        return fit_torch(
            network(dropout=0.3),
            nn.MSELoss(),
            rows(),
            run,
            valid=rows(90, seed=9),
            optimizer=sgd,
            schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40),
            batch_size=64,
            epochs=8,
            patience=3,
            accumulate=2,
            resident=resident,
        )

    torch.manual_seed(5)
    undisturbed = run_of()
    whole = fit(undisturbed)
    steps = 5 * int(undisturbed.curves.points[-1]["step"])
    resumed, tries = None, 0
    while resumed is None:
        torch.manual_seed(5 + tries)  # another state of the generators: only the first try's may count
        left = iter(range(3 + tries))
        scratch = tmp_path / f"scratch-{tries}"
        kept = Checkpoints(Store(str(tmp_path / "store")), "checkpoints/k/fit", scratch, 3600.0)
        run = run_of(checkpoints=kept, should_stop=lambda left=left: next(left, None) is None)
        try:
            resumed = fit(run)
        except Preempted:
            shutil.rmtree(scratch)
        tries += 1
        assert tries <= steps
    assert tries > 4
    assert_same(whole, resumed)
    assert run.curves.points == undisturbed.curves.points
    assert len(run.curves.resumed) == tries - 1


def test_nothing_is_read_from_the_device_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value (item, float, bool) is what waits for a GPU."""
    asked: list[str] = []
    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def watched(
            self: torch.Tensor, *args: Any, _name: str = name, _original: Callable[..., Any] = original
        ) -> Any:
            asked.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    def reads(rows_of: int) -> int:
        asked.clear()
        net, data = network(), rows(rows_of)
        fit_torch(net, nn.MSELoss(), data, run_of(), optimizer=sgd, batch_size=8, epochs=2, clip_norm=1.0)
        return len(asked)

    assert reads(80) == reads(800) > 0


@pytest.mark.parametrize("resident", [True, False])
def test_batches_come_in_order_from_wherever_they_start(resident: bool) -> None:
    table = _Table([torch.arange(10), torch.arange(10) * 2], torch.device("cpu"), resident)
    order = torch.tensor([3, 1, 4, 9, 0, 2, 6, 5, 8, 7])
    batches = [[t.tolist() for t in batch] for batch in table.batches(order, 4, start=1)]
    assert batches == [[[0, 2, 6, 5], [0, 4, 12, 10]], [[8, 7], [16, 14]]]
    assert list(table.batches(order, 5, start=2)) == []
    given_up = table.batches(order, 1)
    next(given_up)
    given_up.close()  # the thread that gathers ends with it


@pytest.mark.parametrize("resident", [True, False])
def test_a_single_row_at_the_end_joins_the_batch_before(resident: bool) -> None:
    table = _Table([torch.arange(9)], torch.device("cpu"), resident)
    order = torch.arange(9)
    assert [len(rows) for (rows,) in table.batches(order, 4)] == [4, 5]
    assert [len(rows) for (rows,) in table.batches(order, 4, start=1)] == [5]
    assert [len(rows) for (rows,) in table.batches(order, 1, start=7)] == [1, 1]
    assert [len(rows) for (rows,) in table.batches(order[:1], 4)] == [1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_normalization_learns_from_any_number_of_rows(accumulate: int) -> None:
    for count in (65, 97, 129):
        torch.manual_seed(1)
        run, net = run_of(), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))
        fit_torch(net, nn.MSELoss(), rows(count), run, batch_size=64, epochs=2, accumulate=accumulate)
        assert [p["step"] for p in run.curves.points] == [1, 2]


def test_what_goes_wrong_while_gathering_is_raised_where_the_batch_is_taken() -> None:
    table = _Table([torch.arange(10), torch.arange(5)], torch.device("cpu"), resident=False)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        list(table.batches(torch.arange(10), 4))


def test_the_weights_of_the_best_epoch_are_kept() -> None:
    valid = rows(90, seed=9)
    run = run_of()
    net = fit_torch(
        network(),
        nn.MSELoss(),
        rows(40),
        run,
        valid=valid,
        optimizer=sgd,
        batch_size=8,
        epochs=60,
        patience=4,
    )
    losses = [p["valid_loss"] for p in run.curves.points]
    assert len(losses) < 60
    assert np.argmin(losses) == len(losses) - 5
    assert float(nn.functional.mse_loss(net(valid[0]), valid[1]).detach()) == pytest.approx(
        min(losses), rel=1e-5
    )
    assert not net.training


def test_a_refit_runs_as_many_epochs_as_the_best_one_had_been() -> None:
    train, valid = rows(200), rows(40, seed=1)
    options: dict[str, Any] = {"optimizer": sgd, "batch_size": 32}
    valid[1] = -valid[1]  # learning soon makes the loss on these rows worse
    first = run_of()
    best = fit_torch(network(), nn.MSELoss(), train, first, valid=valid, epochs=9, patience=2, **options)
    assert first.decided is not None
    epochs = first.decided["epochs"]
    assert epochs < 9
    assert_same(best, fit_torch(network(), nn.MSELoss(), train, run_of(), epochs=epochs, **options))
    again = run_of(settled=first.decided)
    assert_same(best, fit_torch(network(), nn.MSELoss(), train, again, epochs=9, patience=2, **options))
    assert again.decided == {"epochs": epochs}


def test_several_inputs_reach_the_module() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.scale * (a + b)

    a, b = torch.randn(200, 1), torch.randn(200, 1)
    net = fit_torch(
        Sum(), nn.MSELoss(), [a, b, 3 * (a + b)], run_of(), optimizer=sgd, batch_size=20, epochs=20
    )
    assert float(net.scale.detach()) == pytest.approx(3, abs=0.01)


def test_bf16_is_used_when_told_and_a_cpu_is_left_in_fp32() -> None:
    seen = []

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(out.dtype)
        return nn.functional.mse_loss(out.float(), y)

    for precision in ("auto", "bf16"):
        fit_torch(network(), loss, rows(8), run_of(), batch_size=8, epochs=1, precision=precision)
    assert seen == [torch.float32, torch.bfloat16]


def test_a_compiled_fit_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as a whole; without the C++ that the default backend builds in a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def fit(**how: Any) -> nn.Module:
        return fit_torch(
            network(), nn.MSELoss(), rows(192), run_of(), optimizer=sgd, batch_size=64, epochs=2, **how
        )

    for plain, compiled in zip(weights(fit()), weights(fit(compile=True)), strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-6)


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BadConfiguration, match="needs a C compiler, and there is no no-such-compiler"):
        fit_torch(network(), nn.MSELoss(), rows(), run_of(), compile=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"epochs": 0}, "epochs=0, expected at least 1"),
        ({"accumulate": 300}, "accumulate=300 parts of batch_size=256 rows"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0, expected above 0"),
        ({"precision": "fp8"}, "precision='fp8', expected one of auto, fp32, bf16"),
        (
            {"train": [torch.zeros(3, 5)]},
            r"train has tensors of \[3\] rows; expected one or more inputs and last the target",
        ),
        ({"train": [torch.zeros(3, 5), torch.zeros(4, 1)]}, r"train has tensors of \[3, 4\] rows"),
        ({"valid": [torch.zeros(0, 5), torch.zeros(0, 1)]}, r"valid has tensors of \[0, 0\] rows"),
        ({"run": run_of(device="cuda:7")}, r"device='cuda:7' cannot be used here: .* Expected auto, cpu"),
        ({"run": run_of(device="gpu")}, "device='gpu' cannot be used here"),
    ],
)
def test_a_wrong_setting_gets_a_sentence(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"net": network(), "loss": nn.MSELoss(), "train": rows(), "run": run_of()}
    with pytest.raises((BadConfiguration, BadInput), match=sentence):
        fit_torch(**arguments | change)


def test_a_fit_that_diverges_says_so() -> None:
    with pytest.raises(BadInput, match=r"train_loss is (nan|inf) in epoch \d+: the training diverged"):
        fit_torch(
            network(),
            nn.MSELoss(),
            rows(),
            run_of(),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e9),
            epochs=20,
        )
