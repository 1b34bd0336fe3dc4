"""The model package: a directory that any ONNX runtime can serve and that says where its model comes from.

``model.onnx``    preprocessing inside: one input per raw feature, named outputs
``model.json``    the :class:`ModelCard`
``profile.json``  the reference profile that drift is measured against, when there is one
``rows.npy``      sorted fingerprints of the rows that the model has touched, when the data have no time column

Numbers go in as float32 ``[N, 1]`` with NaN for missing, categories as strings ``[N, 1]`` with ``""`` for missing (see
:mod:`lepton_airflow.data.features`). Out come ``probabilities`` ``[N, k]`` and ``label`` ``[N]``, or ``prediction`` ``[N, 1]``. No pickle is read anywhere.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import BATCH_ROWS, Feature, read_batches
from lepton_airflow.errors import BadInput, ContractError
from lepton_airflow.packaging.schema import Schema
from lepton_airflow.packaging.session import open_session, predict_onnx
from lepton_airflow.packaging.touched import Touched

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    import pandas as pd
    from numpy.typing import NDArray

FORMAT = 1


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

    @property
    def schema(self) -> Schema:
        """What goes into the model and what comes out."""
        return Schema(self.features, self.task, self.classes)

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
        return predict_onnx(self.session, self.card.schema, frame)

    def predict_parquet(self, path: Path, batch_rows: int = BATCH_ROWS) -> NDArray[np.float32]:
        """Predict a Parquet file in its row order, ``batch_rows`` rows in memory at a time."""
        import numpy as np

        schema = self.card.schema
        parts = [self.predict(batch) for batch in read_batches(path, schema.names, batch_rows)]
        return np.concatenate(parts) if parts else np.empty(schema.output_shape(0), dtype=np.float32)

    @cached_property
    def rows(self) -> NDArray[np.uint64] | None:
        """Sorted fingerprints of the touched rows, or None where time ranges tell which rows these are."""
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
