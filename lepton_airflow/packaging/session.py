"""How a packaged model is run: the one way to open an ONNX session, and rows in the form that it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_airflow.data.features import BATCH_ROWS, Feature, feature_frame, read_batches
from lepton_airflow.errors import BadInput, first_line
from lepton_airflow.packaging.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    import pandas as pd
    from numpy.typing import NDArray


def open_session(model: bytes, threads: int = 1, *, spin: bool = True) -> onnxruntime.InferenceSession:
    """Open an ONNX model from its bytes alone, on the CPU.

    :param threads: CPU threads of one call; 1 gives equal rows equal bits, and lets calls run side by side.
    :param spin: whether threads wait for their next work by spinning; False where sessions are timed beside one another.
    :raises BadInput: ONNX Runtime does not take the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # warnings are about graph clean-up, nothing a user can act on
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A model may name files that hold its weights. They would be read from the current directory, though no digest covers
    # them. This folder has none.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen kinds, without a base of their own
        if locale := re.search(r"construct locale with name:\s*([\w.@-]+)", str(error)):
            raise BadInput(
                f"the model changes the case of text by the locale {locale[1]}, which is not installed here; install it, on "
                f"Debian by apt-get install locales && localedef -i {locale[1].partition('.')[0]} -f UTF-8 {locale[1]}, or "
                "give the model's StringNormalizer the locale C.UTF-8."
            ) from error
        raise BadInput(f"ONNX Runtime cannot open the model: {runtime_reason(error).rstrip('.')}.") from error


def runtime_reason(error: BaseException) -> str:
    """What ONNX Runtime says in an error, without its number and the path of its source."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ ", "", first_line(error))[:300]


def predict_onnx(
    session: onnxruntime.InferenceSession, schema: Schema, frame: pd.DataFrame
) -> NDArray[np.float32]:
    """Run a packaged graph over raw features: (n, k) probabilities, or (n,) numbers for a regression."""
    import numpy as np

    raw = feature_frame(frame, schema.features)
    result = np.empty(schema.output_shape(len(raw)), dtype=np.float32)
    for start in range(0, len(raw), BATCH_ROWS):
        part = raw.iloc[start : start + BATCH_ROWS]
        (values,) = session.run([schema.output], _feed(part, schema.features))
        if values.size != len(part) * schema.output_columns:
            raise BadInput(
                f"the ONNX model gives {values.size / len(part):g} numbers a row, expected {schema.output_columns}."
            )
        result[start : start + len(part)] = values.reshape(schema.output_shape(len(part)))
    return result


def parquet_feeds(
    path: Path, features: Sequence[Feature], rows: int, batch_rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Rows spread evenly over a Parquet file, as a session takes them.

    :param rows: how many rows; all when there are fewer.
    :param batch_rows: how many of them a batch has at most.
    """
    import numpy as np
    import pyarrow.parquet as pq

    present, start = pq.read_metadata(path).num_rows, 0
    wanted = np.unique(np.linspace(0, present - 1, min(rows, present)).astype(np.int64))
    for batch in read_batches(path, [f.name for f in features]):
        here = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        picked = feature_frame(batch.iloc[here], features)
        for first in range(0, len(picked), batch_rows):
            yield _feed(picked.iloc[first : first + batch_rows], features)


def _feed(frame: pd.DataFrame, features: Sequence[Feature]) -> dict[str, NDArray[Any]]:
    return {f.input: frame[f.name].to_numpy().reshape(-1, 1) for f in features}
