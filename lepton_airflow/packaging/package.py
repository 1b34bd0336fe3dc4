"""The model package: a directory that any ONNX runtime can serve and that says where its model comes from.

``model.onnx``    preprocessing inside: one input per raw feature, named outputs
``model.json``    the :class:`ModelCard`
``profile.json``  the reference profile that drift is measured against, when there is one
``rows.npy``      sorted fingerprints of the rows the model touched, when the data have no time column

Numbers go in as float32 ``[N, 1]`` with NaN for missing, categories as strings ``[N, 1]`` with ``""`` for missing.
Out come ``probabilities`` ``[N, k]`` and ``label`` ``[N]``, or ``prediction`` ``[N, 1]``. No pickle is read anywhere.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.errors import BadInput, ContractError, did_you_mean, require

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    import pandas as pd
    from numpy.typing import NDArray

FORMAT = 1
OUTPUTS = {"classification": ["probabilities", "label"], "regression": ["prediction"]}
BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Feature:
    """One raw column a model reads.

    :ivar input: name of its ONNX input: the column's name where that is a plain identifier, else a safe form of it.
    """

    name: str
    kind: Literal["number", "category"]
    input: str


def features_of(info: DatasetInfo) -> list[Feature]:
    """The features of a dataset in their order, each with the name of its ONNX input."""
    taken = {name for names in OUTPUTS.values() for name in names}
    features = []
    for name in info.features:
        safe = re.sub(r"\W", "_", name, flags=re.ASCII)
        safe = safe if safe and not safe[0].isdigit() else f"_{safe}"
        unique, number = safe, 2
        while unique in taken:
            unique, number = f"{safe}_{number}", number + 1
        taken.add(unique)
        features.append(Feature(name, "category" if name in info.categorical else "number", unique))
    return features


@dataclass(frozen=True)
class Touched:
    """Rows that shaped a model, by the file they were in. ``time_range`` is inclusive at both ends."""

    role: str  # train, valid, tuning or calibration
    sha256: str
    split: str | None
    split_id: str | None
    time_column: str | None
    time_range: list[str] | None
    rows: int

    @classmethod
    def by(cls, role: str, sha256: str, info: DatasetInfo) -> Touched:
        """The entry for a dataset that a step has read."""
        return cls(role, sha256, info.split, info.split_id, info.time_column, info.time_range, info.rows)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What ``model.json`` says. It holds nothing that differs between two equal runs (no times, no run names).

    :ivar classes: the classes in the order of the columns of ``probabilities``; empty for regression.
    :ivar window: ``{"start", "end"}`` of the data window, half open, or None.
    :ivar touched: the datasets that training, early stopping, tuning or calibration read.
    :ivar code: sha256 of the source of the trainer.
    :ivar data: sha256 of each dataset by role.
    :ivar metrics: by rows scored: ``train``, ``valid``, ``out_of_fold``; floats, None where undefined.
    :ivar parity: largest difference between the native and the ONNX predictions, the tolerance, its unit, rows compared.
    :ivar quantization: how QuantizeModel made these weights from those that were trained; None when it did not.
    :ivar nondeterministic: why an equal run may give other weights; None when it gives the same bytes.
    """

    task: str
    target: str
    features: list[Feature]
    outputs: list[str]
    trainer: str
    framework: str
    hyperparameters: dict[str, Any]
    seed: int
    classes: list[Any] = field(default_factory=list)
    window: dict[str, str] | None = None
    touched: list[Touched] = field(default_factory=list)
    cluster_column: str | None = None
    code: str = ""
    data: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    nondeterministic: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The card as JSON text, equal for equal cards."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelCard:
        """Read a card; raises :class:`ContractError` on a newer format or a wrong shape."""
        try:
            record = json.loads(text)
            number = record["format"]
            if number > FORMAT:
                raise ContractError(
                    f"model.json has format {number}, this lepton_airflow knows up to {FORMAT}: upgrade lepton_airflow."
                )
            record["features"] = [Feature(**item) for item in record["features"]]
            record["touched"] = [Touched(**item) for item in record["touched"]]
            return cls(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise ContractError(
                f"model.json is damaged or no model card ({error}); expected the one that TrainModel wrote."
            ) from None


@dataclass(frozen=True)
class ModelPackage:
    """A package on disk, ready to predict; made by :meth:`open`."""

    path: Path
    card: ModelCard

    @classmethod
    def open(cls, path: Path) -> ModelPackage:
        """Read a package's card; the ONNX session starts with the first prediction."""
        for name in ("model.json", "model.onnx"):
            if not (path / name).is_file():
                raise BadInput(
                    f"{path.name} has no {name}: expected a model package, such as train.output['model']."
                )
        return cls(path, ModelCard.from_json((path / "model.json").read_bytes()))

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The ONNX session, on one CPU thread so that equal rows always get equal bits."""
        return open_session((self.path / "model.onnx").read_bytes())

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """Predict rows: (n, k) probabilities in the order of ``card.classes``, or (n,) numbers for regression.

        :param frame: the raw feature columns, in any order; further columns are passed over.
        :raises BadInput: a feature is absent, infinite or not of its kind.
        """
        return predict_onnx(self.session, self.card.features, self.card.task, len(self.card.classes), frame)

    def predict_parquet(self, path: Path, batch_rows: int = BATCH_ROWS) -> NDArray[np.float32]:
        """Predict a Parquet file in its row order, ``batch_rows`` rows in memory at a time."""
        import numpy as np

        names = [f.name for f in self.card.features]
        parts = [self.predict(batch) for batch in _batches(path, names, batch_rows)]
        if not parts:
            shape = (0, len(self.card.classes)) if self.card.task == "classification" else (0,)
            return np.empty(shape, dtype=np.float32)
        return np.concatenate(parts)

    @cached_property
    def rows(self) -> NDArray[np.uint64] | None:
        """Sorted fingerprints of the touched rows, or None when the time range tells them."""
        import numpy as np

        path = self.path / "rows.npy"
        return np.load(path, allow_pickle=False) if path.exists() else None


def write_package(
    directory: Path,
    onnx_model: bytes,
    card: ModelCard,
    *,
    profile: Path | None = None,
    rows: NDArray[np.uint64] | None = None,
) -> None:
    """Write the files of a package into a directory."""
    import numpy as np

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.onnx").write_bytes(onnx_model)
    (directory / "model.json").write_text(card.to_json(), encoding="utf-8")
    if profile is not None:
        shutil.copyfile(profile, directory / "profile.json")
    if rows is not None:
        np.save(directory / "rows.npy", rows, allow_pickle=False)


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """An ONNX session on one CPU thread."""
    require("onnxruntime", "predicting", "train")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warnings are about graph clean-up, nothing a user can act on
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def predict_onnx(
    session: onnxruntime.InferenceSession,
    features: Sequence[Feature],
    task: str,
    classes: int,
    frame: pd.DataFrame,
) -> NDArray[np.float32]:
    """Run a packaged graph over a frame of raw features; shapes as in :meth:`ModelPackage.predict`."""
    import numpy as np

    raw = feature_frame(frame, features)
    shape = (len(raw), classes) if task == "classification" else (len(raw),)
    result = np.empty(shape, dtype=np.float32)
    for start in range(0, len(raw), BATCH_ROWS):
        part = raw.iloc[start : start + BATCH_ROWS]
        (values,) = session.run([OUTPUTS[task][0]], _feed(part, features))
        result[start : start + len(part)] = values.reshape(len(part), *shape[1:])
    return result


def parquet_feeds(
    path: Path, features: Sequence[Feature], rows: int, batch_rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Rows spread evenly over a Parquet file, ``rows`` of them or all, as a session takes them: ``batch_rows`` at most each."""
    import numpy as np
    import pyarrow.parquet as pq

    present, start = pq.read_metadata(path).num_rows, 0
    wanted = np.unique(np.linspace(0, present - 1, min(rows, present)).astype(np.int64))
    for batch in _batches(path, [f.name for f in features], BATCH_ROWS):
        here = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        picked = feature_frame(batch.iloc[here], features)
        for first in range(0, len(picked), batch_rows):
            yield _feed(picked.iloc[first : first + batch_rows], features)


def _feed(frame: pd.DataFrame, features: Sequence[Feature]) -> dict[str, NDArray[Any]]:
    return {f.input: frame[f.name].to_numpy().reshape(-1, 1) for f in features}


def feature_frame(frame: pd.DataFrame, features: Sequence[Feature]) -> pd.DataFrame:
    """The columns a model reads as it reads them: float32 with NaN for missing, or text with ``""`` for missing.

    :raises BadInput: a column is absent, a number is infinite in float32 or is no number.
    """
    import numpy as np
    import pandas as pd

    columns: dict[str, Any] = {}
    for feature in features:
        if feature.name not in frame.columns:
            raise BadInput(
                f"feature {feature.name!r} is not among the columns; {did_you_mean(feature.name, frame.columns)}"
            )
        column = frame[feature.name]
        if isinstance(column, pd.DataFrame):
            raise BadInput(
                f"feature {feature.name!r} is there {column.shape[1]} times; give every column its own name."
            )
        if feature.kind == "category":
            missing = column.isna().to_numpy()
            text = np.array([v if isinstance(v, str) else _as_text(v) for v in column], dtype=object)
            text[missing] = ""
            columns[feature.name] = text
            continue
        try:
            if column.dtype.kind in "mM":
                raise TypeError("a time is no number")
            wide = np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"feature {feature.name!r} should hold numbers, it has dtype {column.dtype} ({error}): "
                "convert it when preparing the data, or list it under categorical."
            ) from None
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        infinite = np.isinf(narrow)
        if infinite.any():
            row = int(np.argmax(infinite))
            raise BadInput(
                f"feature {feature.name!r} is infinite (or beyond float32, 3.4e38) in {int(infinite.sum()):,} of "
                f"{len(narrow):,} rows, first in row {row}: {wide[row]:g}; make it missing (null) or bound it."
            )
        columns[feature.name] = narrow
    return pd.DataFrame(columns, index=frame.index, columns=[f.name for f in features])


def _as_text(value: Any) -> str:
    """A category as text: a whole number that is a float because another row lacks one is 7, not 7.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _batches(path: Path, columns: Sequence[str], batch_rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        for column in columns:
            if column not in present:
                raise BadInput(f"column {column!r} is not in {path.name}; {did_you_mean(column, present)}")
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns)):
            yield batch.to_pandas()


# -- which rows a model has seen ---------------------------------------------------------------------------------------


def row_fingerprints(path: Path, features: Iterable[Feature], target: str) -> NDArray[np.uint64]:
    """One 64-bit hash per distinct row of features and target, sorted; equal rows in two files get equal hashes."""
    import numpy as np
    import pandas as pd

    features = list(features)
    parts = []
    for batch in _batches(path, [*(f.name for f in features), target], BATCH_ROWS):
        rows = feature_frame(batch, features)
        rows.columns = pd.RangeIndex(len(features))
        numeric = pd.api.types.is_numeric_dtype(
            batch[target]
        )  # an integer column with a null arrives as float
        rows["target"] = batch[target].astype(np.float64) if numeric else batch[target].astype(str)
        parts.append(np.unique(pd.util.hash_pandas_object(rows, index=False, categorize=False).to_numpy()))
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def overlap(package: ModelPackage, dataset_path: Path, info: DatasetInfo) -> str | None:
    """Say which rows of a dataset the model has touched, in one sentence; None when it has touched none.

    Two splits of one PrepareData run share no row. Otherwise time ranges decide, both ends included; without a time
    column on either side, equal rows (features and target) do. When nothing can tell, that is said, and counts as overlap.
    """
    import numpy as np

    card = package.card
    unseen_by_time = []
    for touched in card.touched:
        if info.split_id is not None and touched.split_id == info.split_id:
            if touched.split == info.split:
                return f"the model's {touched.role} rows are the same split ({info.split!r} of {info.split_id[:12]})."
            unseen_by_time.append(True)
            continue
        if touched.time_range is None or info.time_range is None:
            unseen_by_time.append(False)
            continue
        mine, theirs = time_span(info.time_range), time_span(touched.time_range)
        if mine[0] <= theirs[1] and theirs[0] <= mine[1]:
            return (
                f"the model's {touched.role} rows span {' to '.join(touched.time_range)} ({touched.time_column}), "
                f"which overlaps {' to '.join(info.time_range)}."
            )
        unseen_by_time.append(True)
    if all(unseen_by_time):
        return None
    if package.rows is None:
        return (
            "whether the model has touched these rows cannot be told: "
            f"the model knows its rows by {'time' if any(t.time_range for t in card.touched) else 'nothing'}, "
            f"the dataset {'has' if info.time_range else 'lacks'} a time range; prepare both with the same time_column."
        )
    found = row_fingerprints(dataset_path, card.features, card.target)
    common = np.intersect1d(found, package.rows, assume_unique=True)
    if not len(common):
        return None
    return (
        f"{len(common):,} of {len(found):,} distinct rows equal rows that the model has touched (features and "
        f"target {card.target!r}; the data have no time column)."
    )


def time_span(time_range: Sequence[str]) -> tuple[datetime, datetime]:
    """First and last instant of an inclusive range; a date as its end means that whole day, no offset means UTC."""
    try:
        start, end = (datetime.fromisoformat(text) for text in time_range)
    except (ValueError, TypeError):
        raise BadInput(
            f"time_range {list(time_range)!r}: expected two ISO 8601 times; prepare the data again."
        ) from None
    if len(time_range[1]) <= len("2013-01-31"):
        end += timedelta(days=1) - timedelta.resolution
    return _utc(start), _utc(end)


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
