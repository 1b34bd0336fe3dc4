"""How is a model fitted? The trainer contract, and what a trainer may know about its run.

**The trainer contract.** ``fit(train, valid, hyperparameters, run)`` returns a fitted scikit-learn estimator or Pipeline
over the raw feature columns, a torch module with an example input, or an ``onnx.ModelProto``.

- ``train``, ``valid``: DataFrames with ``run.features`` and the column ``run.target``; ``valid`` may be None. Numbers are
  float64 rounded to float32 (what ONNX will get) with NaN for missing; categories are text with ``""`` for missing. A
  class target holds the numbers 0..k-1 of ``run.classes``.
- ``hyperparameters``: the dict given to the stage.
- ``run``: the :class:`TrainerRun`: seed, threads, checkpoints, progress.

A scikit-learn Pipeline over numbers and categories starts with a ``ColumnTransformer`` that names its columns. A torch
module reads a float32 tensor [rows, columns] and gives *probabilities* [rows, classes] (or [rows, 1] for the
positive class of two), or numbers [rows, 1]; it comes as ``(module, example)``, with an attribute ``example_input``, or as
``(fitted transformer of the raw columns, module)``. A module of trainers may set ``SEARCH_SPACE`` for TuneModel; a
``fit`` that cannot give equal weights for equal inputs says why in ``fit.nondeterministic = "…"``.

With ``TrainModel(refit="train+valid")`` a second fit follows, on the rows of both and without ``valid``. What the first one
decided by ``valid`` it tells with ``run.settle(trees=57)``, and the second one reads it from ``run.settled``; a ``fit`` that
has no use for ``valid`` says so with ``run.settle()``.

To make a long fit resumable, call ``run.latest_checkpoint()`` once before its loop and ``run.save_checkpoint(step, write)``
after each step; :func:`lepton_airflow.models.fit_torch` does so for torch.
"""

import os

from lepton_airflow.training.trainer import TrainerRun

__all__ = ["TrainerRun"]

# By default, idle OpenMP threads spin, which slows everything on a busy CPU: beside other work on two cores, boosting 400
# rows with two threads took 8.4 s, and 0.5 s with this setting. It must be made before a library loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
