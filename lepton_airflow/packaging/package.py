"""The model package: a directory that any ONNX runtime can serve and that says where its model comes from.

``model.onnx``    preprocessing inside: one input per raw feature, named outputs
``model.json``    the :class:`~lepton_airflow.packaging.card.ModelCard`
``profile.json``  the reference profile that drift is measured against, when there is one
``rows.npy``      sorted fingerprints of the rows that the model has touched, by id or by value, where time does not tell

Numbers go in as float32 ``[N, 1]`` with NaN for missing, categories as strings ``[N, 1]`` with ``""`` for missing (see
:mod:`lepton_airflow.data.features`). Out come ``probabilities`` ``[N, k]`` and ``label`` ``[N]``, or ``prediction`` ``[N, 1]``. No pickle is read anywhere.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_airflow.data.features import BATCH_ROWS, read_batches
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.card import ModelCard
from lepton_airflow.packaging.session import open_session, predict_onnx

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    import pandas as pd
    from numpy.typing import NDArray


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
