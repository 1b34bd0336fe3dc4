"""What torch modules and users' ONNX models have in common: a row to try them on, and predictions that need a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lepton_airflow.data.features import KINDS
from lepton_airflow.errors import BadInput
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def checked_predictions(values: NDArray[np.float64], schema: Schema, trainer: str) -> NDArray[np.float64]:
    """Bring what a network gave into the form of predictions: (n, k) probabilities, or (n,) numbers.

    :raises BadInput: it is neither.
    """
    import numpy as np

    table = values.reshape(len(values), -1)
    if schema.task == "regression":
        if table.shape[1] != 1:
            raise BadInput(f"trainer {trainer}: the model gives {table.shape[1]} numbers a row, expected 1.")
        return table[:, 0]
    if table.shape[1] == 1 and len(schema.classes) == 2:
        table = np.hstack([1 - table, table])
    if table.shape[1] != len(schema.classes):
        raise BadInput(
            f"trainer {trainer}: the model gives {table.shape[1]} numbers a row, expected {len(schema.classes)} "
            f"probabilities, one per class of {schema.classes[:5]}."
        )
    wrong = (np.abs(table.sum(axis=1) - 1) > 1e-3) | (table.min(axis=1) < -1e-6)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BadInput(
            f"trainer {trainer}: the model's row {row} is {np.round(table[row][:4], 3).tolist()}, which are no "
            "probabilities; end the network with softmax (or sigmoid for one output)."
        )
    return table


def blank_row(schema: Schema) -> pd.DataFrame:
    """One row of raw features that every model takes."""
    import pandas as pd

    return pd.DataFrame({f.name: [KINDS[f.kind].blank] for f in schema.features})
