"""A multi-layer perceptron in torch, over scaled numbers and one-hot categories.

Fully connected layers with ReLU and dropout (Srivastava et al. 2014), cross entropy or squared error, AdamW (Loshchilov &
Hutter 2019). With ``valid`` the weights of the epoch with its smallest loss are kept. On a CPU deterministic for a seed
and a number of threads, also when it was stopped and resumed; on a GPU equal up to rounding.

hidden           units per layer
layers           hidden layers, at least 1
dropout          share of units left out while training, 0 to below 1
learning_rate    AdamW's step size, above 0
weight_decay     AdamW's decoupled decay, at least 0
batch_size       rows per step [rows]
epochs           passes over the rows at most
patience         epochs without a better loss on ``valid`` before it stops
accumulate       parts in which a batch is computed, for batches that do not fit in memory
clip_norm        largest norm of a step's gradient; 0: no limit
precision        "fp32", "bf16", or "auto": bf16 on a GPU that is faster with it
compile          true: use torch.compile
max_categories   columns per category feature at most; further values count as unknown
min_frequency    rows that a category needs to get its column [rows]
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadConfiguration, require
from lepton_airflow.models import _columns, at_least, fit_torch

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lepton_airflow.training.trainer import TrainerRun

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
    "accumulate": 1,
    "clip_norm": 0.0,
    "precision": "auto",
    "compile": False,
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


def fit(
    train: pd.DataFrame, valid: pd.DataFrame | None, hyperparameters: dict[str, Any], run: TrainerRun
) -> Any:
    """Fit on ``train``; returns (fitted transformer of the raw columns, module)."""
    require("torch", "the model mlp", "torch")
    import numpy as np
    import torch
    from torch import nn

    h = hyperparameters
    counts = ("hidden", "layers", "batch_size", "epochs", "patience", "accumulate")
    at_least(1, {name: h[name] for name in counts})
    at_least(0, {name: h[name] for name in ("weight_decay", "clip_norm")})
    if not 0 <= h["dropout"] < 1 or not h["learning_rate"] > 0:
        raise BadConfiguration(
            f"hyperparameters: dropout={h['dropout']} and learning_rate={h['learning_rate']}, expected a dropout from 0 to "
            "below 1 and a learning_rate above 0."
        )
    torch.manual_seed(run.seed)
    columns = _columns.scaled_and_one_hot(
        train, run, max_categories=h["max_categories"], min_frequency=h["min_frequency"], sparse=False
    )
    classified = run.task == "classification"
    # A target may be in the millions: the network learns it scaled to mean 0 and standard deviation 1.
    y = train[run.target].to_numpy()
    shift, scale = (0.0, 1.0) if classified else (float(y.mean()), float(y.std()) or 1.0)

    def tensors(frame: pd.DataFrame) -> list[torch.Tensor]:
        x = np.ascontiguousarray(columns.transform(frame[run.features]), dtype=np.float32)
        y = frame[run.target].to_numpy()
        target = y.astype(np.int64) if classified else ((y - shift) / scale).astype(np.float32)[:, None]
        return [torch.from_numpy(x), torch.from_numpy(target)]

    rows = tensors(train)
    net = fit_torch(
        _network(rows[0].shape[1], len(run.classes) if classified else 1, h),
        nn.CrossEntropyLoss() if classified else nn.MSELoss(),
        rows,
        run,
        valid=tensors(valid) if valid is not None else None,
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters,
            lr=h["learning_rate"],
            weight_decay=h["weight_decay"],
            fused=all(p.is_cuda for p in parameters),
        ),
        batch_size=h["batch_size"],
        epochs=h["epochs"],
        patience=h["patience"],
        accumulate=min(h["accumulate"], h["batch_size"]),
        clip_norm=h["clip_norm"] or None,
        precision=h["precision"],
        compile=h["compile"],
    )
    tail: nn.Module = nn.Softmax(dim=1) if classified else _affine(scale, shift)
    return columns, nn.Sequential(net, tail)


def _network(inputs: int, outputs: int, h: dict[str, Any]) -> Any:
    from torch import nn

    sizes = [inputs, *[h["hidden"]] * h["layers"]]
    hidden: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        hidden += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(h["dropout"])]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def _affine(scale: float, shift: float) -> Any:
    """A layer that scales predictions back to the units of the target."""
    import torch
    from torch import nn

    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(scale)
        layer.bias.fill_(shift)
    return layer
