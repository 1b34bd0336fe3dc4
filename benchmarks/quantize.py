"""What QuantizeModel decides for models of five kinds, and whether the decision holds when it is checked again.

For each model the candidates are measured as the stage measures them, on rows that the choice may use. Then the chosen form is
checked against fp32, in new rounds and on held-out rows. `shipped_slower_or_worse` counts the models whose chosen form
is slower there (median ratio below 0.97 at some batch size, the stage's own margin) or worse (metric lower by more than
the stage's margin). `speedup_…` is the chosen form's speed over that of fp32 at the largest batch of the check, `size_…` its bytes over
those of fp32. One thread.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GOALS = {"shipped_slower_or_worse": "0"}
SECONDS, ROUNDS, MAX_LOSS = 15.0, 12, 0.005  # of timing per model and check, 0.005 of ROC AUC


@dataclass
class Case:
    """A trained model and its rows: to train and calibrate on, to choose on, and to check the choice on."""

    name: str
    model: bytes
    feed: dict[str, Any]
    y: Any
    train: slice
    choose: slice
    check: slice
    batches: tuple[int, ...] = (1, 256)

    def rows(self, part: slice) -> dict[str, Any]:
        return {name: values[part] for name, values in self.feed.items()}

    def calibration(self) -> Iterator[dict[str, Any]]:
        step = 64
        for start in range(self.train.start, min(self.train.stop, self.train.start + 1024), step):
            yield self.rows(slice(start, min(start + step, self.train.stop)))

    def predict(self, model: bytes, part: slice) -> Any:
        from lepton_airflow.packaging.session import open_session

        (predicted,) = open_session(model).run(["probabilities"], self.rows(part))
        return predicted

    def timing(self, part: slice) -> dict[int, list[dict[str, Any]]]:
        import numpy as np

        present = len(self.y[part])
        rows = self.rows(part)
        return {
            batch: [
                {n: v[np.arange(i * batch, (i + 1) * batch) % present] for n, v in rows.items()}
                for i in range(8)
            ]
            for batch in self.batches
        }


def measure(seconds: float = SECONDS, epochs: int = 6) -> dict[str, float]:
    """Choose and check for each kind of model."""
    from lepton_airflow.packaging.compression.convert import cpu_flags
    from lepton_airflow.sdk.fingerprint import cpu_model

    print(f"{cpu_model()}, {' '.join(cpu_flags())}, 1 thread, {ROUNDS} rounds of fresh sessions")
    numbers: dict[str, float] = {"shipped_slower_or_worse": 0}
    for make in (_linear, _trees, _mlp, _encoder, _cnn):
        start = time.monotonic()
        case = make(epochs)
        bad, speedup, size = _choose_and_check(case, seconds, time.monotonic() - start)
        numbers["shipped_slower_or_worse"] += bad
        numbers[f"speedup_{case.name}"] = round(speedup, 2)
        numbers[f"size_{case.name}"] = round(size, 2)
    return numbers


def _choose_and_check(case: Case, seconds: float, training_s: float) -> tuple[bool, float, float]:
    """Decide as the stage does, print the table, and judge the decision anew."""
    from lepton_airflow.packaging.compression.compare import Work, compare
    from lepton_airflow.packaging.compression.latency import time_side_by_side
    from lepton_airflow.packaging.compression.quality import Judge

    judge = Judge(y=case.y[case.choose], metric="roc_auc", max_loss=MAX_LOSS)
    work = Work(
        output="probabilities",
        calibration=case.calibration,
        predict=lambda model: case.predict(model, case.choose),
        timing=case.timing(case.choose),
    )
    found = compare(case.model, work, judge, seconds=seconds, rounds=ROUNDS)
    print(f"\n{case.name} ({len(case.model) / 1e6:.2f} MB, trained in {training_s:.0f} s): {found.reason}")
    for c in found.candidates:
        times = "  ".join(
            f"batch {t.batch}: {t.p50_us:,.0f} µs (p95 {t.p95_us:,.0f}), "
            f"{t.speedup:.2f} [{t.speedup_low:.2f}, {t.speedup_high:.2f}] times"
            for t in c.latency
        )
        metric = f"{c.quality.value:.4f} [{c.quality.low:.4f}, {c.quality.high:.4f}]" if c.quality else ""
        size = f"{c.bytes / 1e6:.2f} MB" if c.bytes else ""
        print(f"  {c.name:<13}{c.verdict:<9} {size:>9}  {metric}  {times}")
    shipped = found.models[found.chosen]
    share = len(shipped) / len(case.model)
    if found.chosen == "fp32":
        return False, 1.0, share  # the same bytes
    pair = {"fp32": case.model, "shipped": shipped}
    again = time_side_by_side(
        pair, "probabilities", case.timing(case.check), seconds=seconds, rounds=ROUNDS, seed=1
    )["shipped"]
    original, predicted = (case.predict(m, case.check) for m in pair.values())
    fresh = replace(judge, y=case.y[case.check]).compare(original, predicted)
    slower, worse = min(t.speedup for t in again) < 0.97, fresh.difference < -MAX_LOSS
    print(
        f"  checked on {len(case.y[case.check]):,} held-out rows: "
        + ", ".join(f"{t.speedup:.2f} times as fast at batch {t.batch}" for t in again)
        + f", ROC AUC {fresh.difference:+.4f}{', SLOWER' * slower}{', WORSE' * worse}"
    )
    return slower or worse, again[-1].speedup, share


# -- tabular, on real flights ------------------------------------------------------------------------------------------

_NUMBERS = ["month", "day", "hour", "minute", "distance", "flight"]
_TEXTS = ["carrier", "origin", "dest"]


def _linear(_: int) -> Case:
    from sklearn.linear_model import LogisticRegression

    return _tabular("linear", LogisticRegression(max_iter=200))


def _trees(_: int) -> Case:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return _tabular("trees", HistGradientBoostingClassifier(random_state=0))


def _mlp(epochs: int) -> Case:
    from sklearn.neural_network import MLPClassifier

    return _tabular("mlp", MLPClassifier((256, 256), max_iter=epochs, random_state=0))


def _tabular(name: str, last: Any) -> Case:
    """An estimator behind scaling and one-hot encoding: is a flight of January or February 2013 late?"""
    import numpy as np
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    from lepton_airflow.data.features import Feature
    from lepton_airflow.packaging.export.fitted import as_fitted
    from lepton_airflow.packaging.schema import Schema

    sys.path.insert(0, str(ROOT / "demo"))
    from flights import land

    raw = land(ROOT / ".cache" / "flights")
    frame = pd.concat([pd.read_csv(raw / "flights" / f"2013-{m:02}.csv") for m in (1, 2)])
    frame = frame.dropna(subset=["arr_delay"]).sample(24_000, random_state=0).reset_index(drop=True)
    y = (frame["arr_delay"] > 15).astype(int).to_numpy()
    texts = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    columns = ColumnTransformer([("n", StandardScaler(), _NUMBERS), ("t", texts, _TEXTS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few passes will do
        model = make_pipeline(columns, last).fit(frame.iloc[:16_000], y[:16_000])
    features = [Feature(n, "number", n) for n in _NUMBERS] + [Feature(n, "category", n) for n in _TEXTS]
    onnx_model = as_fitted(model, Schema(features, "classification", [0, 1]), name).to_onnx()
    feed = {n: frame[n].to_numpy(np.float32).reshape(-1, 1) for n in _NUMBERS}
    feed |= {n: frame[n].to_numpy(object).reshape(-1, 1) for n in _TEXTS}
    parts = slice(0, 16_000), slice(16_000, 20_000), slice(20_000, 24_000)
    return Case(name, onnx_model.SerializeToString(), feed, y, *parts)


# -- pictures of digits ------------------------------------------------------------------------------------------------


def _encoder(epochs: int) -> Case:
    """A transformer encoder of 6 layers by 384 that reads a digit as a sequence of its 8 rows."""
    import torch
    from torch import nn

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self, width: int = 384) -> None:
            super().__init__()
            self.embed = nn.Linear(8, width)
            self.place = nn.Parameter(torch.randn(1, 8, width) * 0.02)
            layer = nn.TransformerEncoderLayer(
                width, 6, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
            self.head = nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(x.reshape(-1, 8, 8)) + self.place
            return torch.softmax(self.head(self.layers(tokens).mean(1)), -1)

    return _digits("encoder", Encoder, epochs // 2, 3e-4, (1, 32))


def _cnn(epochs: int) -> Case:
    """Three convolutions and a linear layer over a digit of 8 by 8."""
    from torch import nn

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1024, 10), nn.Softmax(-1)),
        )

    return _digits("cnn", network, epochs, 2e-3, (1, 64))


def _digits(
    name: str, network: Callable[[], Any], epochs: int, rate: float, batches: tuple[int, ...]
) -> Case:
    """Train a torch module on scikit-learn's digits and export it."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), rate)
    given, wanted = torch.from_numpy(x[:1000]), torch.from_numpy(y[:1000])
    for _ in range(max(1, epochs)):
        for part in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(torch.log(module(given[part]) + 1e-9), wanted[part]).backward()
            optimizer.step()
    module.eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 64),),
            dynamo=True,
            opset_version=18,
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("rows", min=1)},),
            verbose=False,
        )
    assert program is not None
    parts = slice(0, 1000), slice(1000, 1400), slice(1400, len(y))
    return Case(name, program.model_proto.SerializeToString(), {"pixels": x}, y, *parts, batches)
