"""A multi-layer perceptron in torch, over scaled numbers and one-hot categories.

Fully connected layers with ReLU and dropout (Srivastava et al. 2014), cross entropy or squared error, AdamW (Loshchilov &
Hutter 2019). With ``valid`` the weights of the epoch with its smallest loss are kept. Deterministic for a seed and a
number of threads, also when it was stopped and resumed.

hidden           units per layer
layers           hidden layers, at least 1
dropout          share of units left out while training, 0 to below 1
learning_rate    AdamW's step size, above 0
weight_decay     AdamW's decoupled decay, at least 0
batch_size       rows per step [rows]
epochs           passes over the rows at most
patience         epochs without a better loss on ``valid`` before it stops
max_categories   columns per category feature at most; further values count as unknown
min_frequency    rows that a category needs to get its column [rows]
"""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, require
from lepton_airflow.models import _columns, at_least

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lepton_airflow.training import TrainerRun

TASKS = ("classification", "regression")
DEFAULTS: dict[str, Any] = {
    "hidden": 64,
    "layers": 2,
    "dropout": 0.1,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "batch_size": 256,
    "epochs": 30,
    "patience": 5,
    "max_categories": 100,
    "min_frequency": 10,
}
SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "hidden": {"low": 16, "high": 128, "log": True},
    "layers": {"low": 1, "high": 3},
    "dropout": {"low": 0.0, "high": 0.5},
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-1, "log": True},
}
_CHECKPOINT_S = 10.0  # what a kill may cost; writing takes milliseconds


def fit(
    train: pd.DataFrame, valid: pd.DataFrame | None, hyperparameters: dict[str, Any], run: TrainerRun
) -> Any:
    """Fit on ``train``, resuming from ``run.checkpoint``; returns (fitted transformer of the raw columns, module)."""
    require("torch", "the model mlp", "torch")
    import torch
    from torch import nn

    h = hyperparameters
    at_least(1, {name: h[name] for name in ("hidden", "layers", "batch_size", "epochs", "patience")})
    at_least(0, {"weight_decay": h["weight_decay"]})
    if not 0 <= h["dropout"] < 1 or not h["learning_rate"] > 0:
        raise BadConfiguration(
            f"hyperparameters: dropout={h['dropout']} and learning_rate={h['learning_rate']}, expected a dropout from 0 to "
            "below 1 and a learning_rate above 0."
        )
    torch.manual_seed(run.seed)
    torch.set_num_threads(run.threads)
    columns = _columns.scaled_and_one_hot(
        train, run, max_categories=h["max_categories"], min_frequency=h["min_frequency"], sparse=False
    )
    x, y = _tensors(columns, train, run)
    classified = run.task == "classification"
    # a target in its own units could be millions; the network learns it with mean 0 and deviation 1
    shift, scale = (0.0, 1.0) if classified else (float(y.mean()), float(y.std(correction=0)) or 1.0)
    net = _network(x.shape[1], len(run.classes) if classified else 1, h)
    loss = nn.CrossEntropyLoss() if classified else nn.MSELoss()

    def batch_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(net(inputs), targets if classified else ((targets - shift) / scale).unsqueeze(1))

    held_out = _tensors(columns, valid, run) if valid is not None else None
    _train(net, batch_loss, x, y, held_out, h, run)
    tail: nn.Module = nn.Softmax(dim=1) if classified else _affine(scale, shift)
    return columns, nn.Sequential(net, tail)


def _train(
    net: Any, batch_loss: Any, x: Any, y: Any, held_out: Any, h: dict[str, Any], run: TrainerRun
) -> None:
    """Run the epochs left to run; ``net`` ends with the best weights."""
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), lr=h["learning_rate"], weight_decay=h["weight_decay"])
    path = run.checkpoint / "mlp.pt"
    state: dict[str, Any] = {"epoch": 0, "best": float("inf"), "since_best": 0, "weights": None}
    if path.exists():
        state = _load(path, net, optimizer)
    written = time.monotonic()
    while state["epoch"] < h["epochs"] and state["since_best"] < h["patience"]:
        net.train()
        total = 0.0
        for rows in torch.randperm(len(x)).split(h["batch_size"]):
            optimizer.zero_grad()
            value = batch_loss(x[rows], y[rows])
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(rows)
        state["epoch"] += 1
        report = {"train_loss": total / len(x)}
        net.eval()
        if held_out is not None:
            with torch.inference_mode():
                report["valid_loss"] = float(batch_loss(*held_out))
            better = report["valid_loss"] < state["best"]
            state["since_best"] = 0 if better else state["since_best"] + 1
            if better:
                state["best"], state["weights"] = report["valid_loss"], copy.deepcopy(net.state_dict())
        if run.should_stop() or time.monotonic() - written > _CHECKPOINT_S:
            _save(path, net, optimizer, state)
            written = time.monotonic()
        run.report(state["epoch"], **report)
    if state["weights"] is not None:
        net.load_state_dict(state["weights"])
    net.eval()


def _save(path: Path, net: Any, optimizer: Any, state: dict[str, Any]) -> None:
    import torch

    everything = state | {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(everything, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _load(path: Path, net: Any, optimizer: Any) -> dict[str, Any]:
    import torch

    saved: dict[str, Any] = torch.load(
        path, weights_only=True
    )  # tensors and numbers only: no pickled code is run
    net.load_state_dict(saved.pop("net"))
    optimizer.load_state_dict(saved.pop("optimizer"))
    torch.set_rng_state(saved.pop("random"))
    return saved


def _tensors(columns: Any, frame: pd.DataFrame, run: TrainerRun) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    x = torch.from_numpy(np.ascontiguousarray(columns.transform(frame[run.features]), dtype=np.float32))
    kind = np.int64 if run.task == "classification" else np.float32
    return x, torch.from_numpy(frame[run.target].to_numpy(dtype=kind))


def _network(inputs: int, outputs: int, h: dict[str, Any]) -> Any:
    from torch import nn

    sizes = [inputs, *[h["hidden"]] * h["layers"]]
    hidden: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        hidden += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(h["dropout"])]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def _affine(scale: float, shift: float) -> Any:
    """A layer that gives the target back its units."""
    import torch
    from torch import nn

    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(scale)
        layer.bias.fill_(shift)
    return layer
