"""What ``model.json`` says of a model: what it takes and gives, how it was made, and which rows it has touched."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lepton_airflow.data.dataset import DatasetInfo
from lepton_airflow.data.features import Feature
from lepton_airflow.errors import ContractError
from lepton_airflow.packaging.schema import Schema

FORMAT = 1


@dataclass(frozen=True)
class Touched:
    """A dataset whose rows shaped a model.

    :ivar role: ``train``, ``valid``, ``tuning`` or ``calibration``.
    :ivar time_range: smallest value of ``time_column``, and the largest or the last time that a label looks at, both inclusive.
    """

    role: str
    sha256: str
    split: str | None
    split_id: str | None
    time_column: str | None
    time_range: list[str] | None
    rows: int

    @classmethod
    def by(cls, role: str, sha256: str, info: DatasetInfo) -> Touched:
        """The entry for a dataset that a step has read."""
        return cls(role, sha256, info.split, info.split_id, info.time_column, info.span, info.rows)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What ``model.json`` says. It holds nothing that differs between two equal runs (no times, no run names).

    :ivar classes: the classes in the order of the columns of ``probabilities``; empty for regression. Of two, the second is
        the positive one, which ``model.json`` also names as ``positive_class``.
    :ivar window: ``{"start", "end"}`` of the data window, half open, or None.
    :ivar touched: the datasets that training, early stopping, tuning or calibration read.
    :ivar row_identity: the id columns by which ``rows.npy`` knows the touched rows; empty: by their values.
    :ivar code: sha256 of the source of the trainer.
    :ivar data: sha256 of each dataset by role.
    :ivar refit: of a model that was fitted again on the rows of train and valid: ``rows``, and what was ``settled`` by valid
        before; the metrics of valid and out of fold are then those of the models before. Else None.
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
    row_identity: list[str] = field(default_factory=list)
    cluster_column: str | None = None
    code: str = ""
    data: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    refit: dict[str, Any] | None = None
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
        record = asdict(self) | {"positive_class": self.schema.positive_class}
        return json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

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
            record.pop("positive_class", None)  # said by the order of the classes, too
            return cls(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise ContractError(
                f"model.json is damaged or no model card ({error}); expected the one that TrainModel wrote."
            ) from None
