"""What goes into a packaged model and what comes out: the names, types and shapes of its graph's inputs and outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lepton_airflow.data.dataset import DatasetInfo, positive_class
from lepton_airflow.data.features import Feature, kind_of

# By task, the outputs of a packaged graph; the first is the one that models are judged by.
OUTPUTS = {"classification": ["probabilities", "label"], "regression": ["prediction"]}


@dataclass(frozen=True)
class Schema:
    """Features, task and classes (none for a regression) of a model."""

    features: list[Feature]
    task: str
    classes: list[Any]

    @property
    def names(self) -> list[str]:
        """The feature columns in order."""
        return [f.name for f in self.features]

    @property
    def output(self) -> str:
        """The output that the model is judged by."""
        return OUTPUTS[self.task][0]

    @property
    def output_columns(self) -> int:
        """Columns of that output: one per class, or one."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def positive_class(self) -> Any:
        """The class that precision, recall and thresholds are about; None unless there are two."""
        return positive_class(self.classes)

    def output_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the predictions of so many rows: (n, k) probabilities, or (n,) numbers."""
        return (rows, self.output_columns) if self.task == "classification" else (rows,)


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
        features.append(Feature(name, kind_of(info, name), unique))
    return features
