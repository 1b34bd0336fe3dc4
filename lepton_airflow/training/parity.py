"""Check that an ONNX model predicts what the native model predicts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lepton_airflow.errors import BadInput, brief

if TYPE_CHECKING:
    import pandas as pd

    from lepton_airflow.packaging.export.fitted import Fitted
    from lepton_airflow.training.rows import Rows

log = logging.getLogger(__name__)

_PARITY_ROWS = 4000  # of train and of valid each, evenly spaced
_PROBE_ROWS = 200  # in which values are made missing or unseen, column by column
_INSTEAD = "Use other estimators, or return an onnx.ModelProto."


def check_parity(
    model: Fitted, onnx_model: bytes, rows: Rows, valid: Rows | None, tolerance: float
) -> dict[str, Any]:
    """Compare native and ONNX predictions; raises BadInput where they differ by more than the tolerance.

    A regression is compared in standard deviations of the training target. Missing values and unseen categories are tried,
    too, if the native model accepts them.

    :return: difference, tolerance, unit, rows, and what was tried, for ``model.json``.
    """
    import numpy as np

    from lepton_airflow.packaging.session import open_session, predict_onnx, runtime_reason

    try:
        session = open_session(onnx_model)
    except BadInput as error:
        raise BadInput(
            f"trainer {model.trainer}: {model.described} was written as ONNX, but {error} {_INSTEAD}"
        ) from error
    schema = rows.schema
    unit = 1.0 if schema.task == "classification" else float(np.std(rows.y)) or 1.0
    worst, compared, tried = 0.0, 0, []
    for probe, frame in _probes(rows, valid):
        try:
            native = model.predict(frame)
        except BadInput:
            if probe in ("train", "valid"):
                raise
            log.info("parity: the native model does not take %s, so that is not compared", probe)
            continue
        if (
            probe in ("train", "valid")
            and not (finite := np.isfinite(native).reshape(len(frame), -1).all(axis=1)).all()
        ):
            raise BadInput(
                f"trainer {model.trainer}: its model predicts NaN or infinity in {int((~finite).sum()):,} of {len(frame):,} "
                f"rows of {probe}, first at {_few_values(frame[schema.names].iloc[int(np.argmin(finite))])}; expected finite "
                "numbers."
            )
        try:
            onnx = predict_onnx(session, schema, frame).astype(np.float64)
        except Exception as error:  # onnxruntime has a dozen kinds, without a base of their own
            raise BadInput(
                f"trainer {model.trainer}: {model.described} was written as ONNX, but ONNX Runtime fails on rows with "
                f"{probe}, which the model itself takes: {runtime_reason(error).rstrip('.')}. {_INSTEAD}"
            ) from error
        equal = (native == onnx) | (np.isnan(native) & np.isnan(onnx))
        difference = np.where(equal, 0.0, np.abs(native - onnx) / unit)
        difference = np.where(np.isnan(difference), np.inf, difference).reshape(len(frame), -1).max(axis=1)
        row = int(np.argmax(difference))
        if difference[row] > tolerance:
            raise BadInput(
                f"ONNX and native predictions differ by {difference[row]:.3g} ({_unit(schema.task)}) on rows with {probe}, "
                f"more than parity_tolerance={tolerance:g}, in {int((difference > tolerance).sum()):,} of {len(frame):,} "
                f"rows; worst: native {np.round(native[row], 5).tolist()}, ONNX {np.round(onnx[row], 5).tolist()} at "
                f"{_few_values(frame[schema.names].iloc[row])}. Use an estimator that converts exactly, or raise the "
                "tolerance if you can live with it."
            )
        worst, compared = max(worst, float(difference[row])), compared + len(frame)
        tried.append(probe)
    return {
        "difference": worst,
        "tolerance": tolerance,
        "unit": _unit(schema.task),
        "rows": compared,
        "tried": tried,
    }


def _probes(rows: Rows, valid: Rows | None) -> list[tuple[str, pd.DataFrame]]:
    import numpy as np

    def spread(frame: pd.DataFrame, count: int) -> pd.DataFrame:
        return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, count).astype(int))].reset_index(drop=True)

    probes = [("train", spread(rows.frame, _PARITY_ROWS))]
    if valid is not None:
        probes.append(("valid", spread(valid.frame, _PARITY_ROWS)))
    for kind, label, value in (
        ("number", "missing numbers", np.nan),
        ("category", "missing categories", ""),
        ("category", "unseen categories", "a value that no row had"),
    ):
        names = [f.name for f in rows.schema.features if f.kind == kind]
        if names:
            frame = spread(rows.frame, _PROBE_ROWS)
            for index, name in enumerate(names):  # each row loses one value; the last rows lose all
                frame.loc[frame.index % (len(names) + 1) == index, name] = value
            frame.loc[frame.index % (len(names) + 1) == len(names), names] = value
            probes.append((label, frame))
    return probes


def _unit(task: str) -> str:
    return "probability" if task == "classification" else "standard deviations of the target"


def _few_values(row: pd.Series[Any]) -> str:
    shown = ", ".join(
        f"{k}={brief(v)}" if isinstance(v, str) else f"{k}={v:.6g}" for k, v in list(row.items())[:4]
    )
    return shown + (", …" if len(row) > 4 else "")
