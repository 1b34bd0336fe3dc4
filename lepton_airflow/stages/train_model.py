"""TrainModel: rows in, a checked ONNX model package out."""

from __future__ import annotations

import io
import json
import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lepton_airflow.contract import digest_of, split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, LeptonError, brief, require
from lepton_airflow.sdk.closure import package_digest
from lepton_airflow.sdk.fingerprint import versions
from lepton_airflow.sdk.stage import ArtifactUri, CodeRef, Result, RunInfo, Stage

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lepton_airflow.packaging.card import ModelCard, Touched
    from lepton_airflow.packaging.export.fitted import Fitted
    from lepton_airflow.training.curves import Curves
    from lepton_airflow.training.rows import Rows
    from lepton_airflow.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainModel(Stage):
    """Fit a model and package it as ONNX with its preprocessing inside.

    Returns the artifact ``model``, a directory (see :mod:`lepton_airflow.packaging.package`); with ``folds`` also
    ``out_of_fold`` (Parquet with a line for each row that was held out: ``row``, counted from 0 in the dataset, ``fold``,
    ``target``, and ``p_0`` … ``p_{k-1}`` or ``prediction``); and ``curves`` (PNG) if the trainer reported losses. The metrics
    are those of the rows trained on (``train_…``), of ``valid`` and out of fold, and how the fits of this try used the GPU, if
    there is one (``gpu_…``: see :mod:`lepton_airflow.training.gpu`).

    A try that was killed is resumed: finished folds are read back, and a trainer with checkpoints goes on from the last
    one. With other data, code, hyperparameters or library versions it starts from the beginning.

    The ONNX model is compared with the native one on some thousand rows of train and valid, on rows with missing values and
    on rows with unseen categories; a difference beyond ``parity_tolerance`` is refused. What scikit-learn computes before a
    threshold is computed in float64 in ONNX too (see :mod:`lepton_airflow.packaging.export.steps`).

    Equal inputs give a package with an equal digest, on the same kind of CPU and with the same library versions. A trainer
    for which this is not so says why in the attribute ``nondeterministic`` of its function, and ``model.json`` repeats it.

    :param dataset: training rows, as PrepareData writes them.
    :param valid: rows for early stopping and for the metrics ``valid_…``; None: no fit stops early.
    :param trainer: a name from ``lepton_airflow.models``, or ``module:function`` (contract: ``lepton_airflow.training``).
    :param hyperparameters: by name; for the others the model's defaults are used.
    :param folds: number of folds for predicting rows with models that have not seen them; None: do not.
    :param fold_by: ``row``: at random, stratified by class, whole clusters together; ``time``: train on the past only.
    :param also_touched: other datasets that influenced the model (tuning, calibration), so that no later comparison uses
        their rows. The training rows need not be named.
    :param refit: ``train+valid``: once the fit on ``dataset`` has settled by ``valid`` when to stop, fit the model again on the
        rows of both with that number of epochs or trees. The metrics ``valid_…`` are those of the model before, and so is
        whatever is chosen on ``valid``; the model has touched the rows of both. None: the model never learns from ``valid``.
    :param profile: reference profile of the training rows, which goes into the package for drift checks.
    :param seed: seeds every source of randomness.
    :param parity_tolerance: largest allowed difference between native and ONNX predictions [probability, or standard
        deviations of the target for regression].
    :param threads: CPU threads; another number may change the last bits of the model [threads].
    :param device: where torch trains: ``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda`` or ``cuda:1``.
    :param checkpoint_s: time between checkpoints, and so the most work that a kill can cost [seconds].
    """

    dataset: ArtifactUri
    valid: ArtifactUri | None = None
    trainer: CodeRef = "hist_gradient_boosting"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    folds: int | None = None
    fold_by: Literal["row", "time"] = "row"
    also_touched: list[ArtifactUri] = field(default_factory=list)
    refit: Literal["train+valid"] | None = None
    profile: ArtifactUri | None = None
    seed: int = 0
    parity_tolerance: float = 1e-4
    threads: int = 1
    device: str = "auto"
    checkpoint_s: float = 60.0

    resumable: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("scikit-learn", "skl2onnx", "onnx", "onnxruntime", "torch", "numpy")
    extra: ClassVar[str] = "train"
    outputs: ClassVar[tuple[str, ...]] = ("model", "out_of_fold", "curves")

    def run(self, run: RunInfo) -> Result:
        """Fit, check, package."""
        for library in ("scikit-learn", "skl2onnx", "onnx", "onnxruntime", "pandas", "pyarrow"):
            require(library, "TrainModel", self.extra)
        from lepton_airflow import models
        from lepton_airflow.packaging.export.fitted import packaged
        from lepton_airflow.packaging.package import write_package
        from lepton_airflow.packaging.touched import touched_rows
        from lepton_airflow.training.curves import draw
        from lepton_airflow.training.gpu import Readings
        from lepton_airflow.training.parity import check_parity
        from lepton_airflow.training.rows import Rows

        self._check_parameters()
        path = run.fetch(self.dataset)
        valid_path = run.fetch(self.valid) if self.valid else None
        rows = Rows.load(path, "train")
        valid = Rows.load(valid_path, "valid", like=rows) if valid_path else None
        if valid is not None and valid_path is not None:
            _check_apart(path, rows, valid_path, valid)
        profile = self._profile(run)
        trainer = models.find(self.trainer, rows.schema.task)
        hyperparameters = trainer.complete(self.hyperparameters)
        touched = self._touched(run, rows, valid)
        fits = _Fits(self, run, trainer, rows, valid, hyperparameters, touched)
        with Readings() as readings:
            out_of_fold = fits.out_of_fold() if self.folds else None
            settled = fits.settled() if self.refit else None
            model = fits.refit(settled) if settled else fits.final()

        onnx_model = packaged(model)
        parity = check_parity(model, onnx_model, rows, valid, self.parity_tolerance)
        log.info(
            "native and ONNX predictions differ by at most %.2g over %d rows",
            parity["difference"],
            parity["rows"],
        )
        metrics = _metrics(model, rows, valid, out_of_fold, settled)
        artifacts = {}
        if out_of_fold is not None:
            out_of_fold.to_parquet(run.workdir / "out_of_fold.parquet", index=False)
            artifacts["out_of_fold"] = run.save("out_of_fold.parquet", run.workdir / "out_of_fold.parquet")
        # Where times do not tell, later stages recognise rows by the fingerprints of their ids or values.
        seen: NDArray[Any] | None = None
        identity: list[str] = []
        if not all(t.time_range for t in touched) or (rows.info.id_columns and rows.info.split_by != "time"):
            paths = [path, *([valid_path] if valid_path else []), *map(run.fetch, self.also_touched)]
            seen, identity = touched_rows(paths, rows.schema.features, rows.target)
        write_package(
            run.workdir / "model",
            onnx_model,
            replace(fits.card(model, metrics, parity, settled), row_identity=identity),
            profile=profile,
            rows=seen,
        )
        artifacts["model"] = run.save("model", run.workdir / "model")
        if fits.curves.points and (picture := draw(fits.curves, run.workdir / "curves.png", trainer.name)):
            artifacts["curves"] = run.save("curves.png", picture)
        fits.forget()
        flat = {f"{part}_{name}": value for part, values in metrics.items() for name, value in values.items()}
        flat |= readings.metrics()
        return Result(
            _summary(self, rows, valid, metrics, parity, artifacts["model"].bytes, settled),
            artifacts,
            metrics=flat,
        )

    def _check_parameters(self) -> None:
        if self.threads < 1:
            raise BadConfiguration(f"threads={self.threads}: expected at least 1.")
        if self.refit and self.valid is None:
            raise BadConfiguration(
                f"refit={self.refit!r} needs valid: pass the rows that settle when to stop, and that the model is fitted on, too, "
                "such as prepare.output['valid']."
            )
        if not self.checkpoint_s >= 0:
            raise BadConfiguration(f"checkpoint_s={self.checkpoint_s}: expected 0 or more seconds.")

    def _profile(self, run: RunInfo) -> Path | None:
        if self.profile is None:
            return None
        path = run.fetch(self.profile)
        try:
            json.loads(path.read_bytes())["columns"]
        except (OSError, ValueError, TypeError, KeyError):
            raise BadInput(
                f"profile {split_pin(self.profile)[0]} is no reference profile: pass prepare.output['profile']."
            ) from None
        return path

    def _touched(self, run: RunInfo, rows: Rows, valid: Rows | None) -> list[Touched]:
        from lepton_airflow.data.dataset import read_info
        from lepton_airflow.packaging.card import Touched

        def sha256(uri: str) -> str:
            return split_pin(uri)[1] or run.store.digest(uri)

        touched = [Touched.by("train", sha256(self.dataset), rows.info)]
        if valid is not None and self.valid:
            touched.append(Touched.by("valid", sha256(self.valid), valid.info))
        for uri in self.also_touched:
            entry = Touched.by("tuning", sha256(uri), read_info(run.fetch(uri)))
            if entry.sha256 not in {t.sha256 for t in touched}:
                touched.append(entry)
        return touched


@dataclass(frozen=True)
class _Settled:
    """What the fit on train has settled by ``valid``, and how good its model was there.

    :ivar numbers: such as ``{"max_iter": 57}``, for the refit.
    :ivar valid: the metrics of ``valid``.
    :ivar curves: what this fit reported.
    """

    numbers: dict[str, Any]
    valid: dict[str, float | None]
    curves: dict[str, Any]


@dataclass
class _Fits:
    """The fits of one run of the stage, all with the same data and seed; those that an earlier try finished are read back.

    :ivar curves: of the model of all rows.
    """

    stage: TrainModel
    run: RunInfo
    trainer: Trainer
    rows: Rows
    valid: Rows | None
    hyperparameters: dict[str, Any]
    touched: list[Touched]
    curves: Curves = field(init=False)

    def __post_init__(self) -> None:
        from lepton_airflow.training.curves import Curves

        self.curves = Curves()

    @property
    def data(self) -> dict[str, str]:
        """Digests of the datasets that the fits see."""
        return {t.role: t.sha256 for t in self.touched if t.role in ("train", "valid")}

    @cached_property
    def key(self) -> str:
        """Where the store keeps checkpoints and finished folds; it contains a digest of all that a fit depends on."""
        stage = self.stage
        same_fit = digest_of(
            [
                self.trainer.name,
                self.trainer.code,
                self.hyperparameters,
                stage.seed,
                stage.threads,
                self.data,
                stage.folds,
                stage.fold_by,
                versions(type(stage)),
                package_digest("lepton_airflow.training.fit", "lepton_airflow.training.folds"),
            ]
        )
        return f"checkpoints/{self.run.run_key}/{same_fit[:16]}"

    def forget(self) -> None:
        """Delete all checkpoints and folds of this task instance, also those of other fits that it gave up."""
        self.run.store.delete(f"checkpoints/{self.run.run_key}")

    def final(self) -> Fitted:
        """Fit the model on all rows."""
        return self._fit("final", None, self.curves)

    def settled(self) -> _Settled:
        """Fit on train, and keep what ``valid`` settles; an earlier try's is read back."""
        from lepton_airflow.training.fit import score

        assert self.valid is not None
        key = f"{self.key}/settled.json"
        if (kept := self.run.store.read(key)) is not None:
            try:
                return _Settled(**json.loads(kept))
            except (ValueError, TypeError) as error:
                log.warning("the fit on train is made again, what an earlier try kept is damaged: %s", error)
        told: list[dict[str, Any] | None] = []
        model = self._fit("final", None, self.curves, decided=told.append)
        if told[0] is None:
            raise BadConfiguration(
                f"refit={self.stage.refit!r}: trainer {self.trainer.name} does not say what valid has decided. Call "
                "run.settle(trees=…) in fit and take run.settled['trees'] in the refit, or run.settle() if fit does not use valid."
            )
        metrics = score(self.rows.schema, self.valid.y, model.predict(self.valid.frame))
        text = json.dumps(asdict(_Settled(told[0], metrics, asdict(self.curves))))  # a curve may hold NaN
        self.run.store.write(key, text.encode())
        self.run.store.delete(f"{self.key}/final")
        log.info("settled on train and valid: %s", told[0] or "nothing to stop early")
        return _Settled(**json.loads(text))  # as a later try reads it

    def refit(self, settled: _Settled) -> Fitted:
        """Fit the model on all rows of train and valid, with what was settled before."""
        from lepton_airflow.training.curves import Curves

        assert self.valid is not None
        self.run.check_stop()
        self.curves = Curves(**settled.curves)  # of the fit that valid was a measure for
        return self._fit("refit", None, None, refit=settled.numbers)

    def out_of_fold(self) -> pd.DataFrame:
        """Predict each row of every fold with a model that has not seen it; finished folds are read back."""
        import numpy as np
        import pandas as pd

        from lepton_airflow.training.folds import make_folds

        assert self.stage.folds is not None
        parts = []
        folds = make_folds(self.rows, self.stage.folds, self.stage.fold_by, self.stage.seed)
        for number, (train, held_out) in enumerate(folds):
            predicted = self._predicted(number, train, held_out)
            columns = {
                "row": held_out,
                "fold": np.full(len(held_out), number),
                "target": self.rows.y[held_out],
            }
            if predicted.ndim == 1:
                columns["prediction"] = predicted
            else:
                columns |= {f"p_{k}": predicted[:, k] for k in range(predicted.shape[1])}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts).sort_values("row", ignore_index=True)

    def card(
        self,
        model: Fitted,
        metrics: dict[str, dict[str, float | None]],
        parity: dict[str, Any],
        settled: _Settled | None,
    ) -> ModelCard:
        """Describe the model for its package."""
        from lepton_airflow.packaging.card import ModelCard
        from lepton_airflow.packaging.schema import OUTPUTS

        rows, window = self.rows, self.run.window
        return ModelCard(
            task=rows.schema.task,
            target=rows.target,
            classes=rows.schema.classes,
            features=rows.schema.features,
            outputs=OUTPUTS[rows.schema.task],
            trainer=self.trainer.name,
            framework=model.framework,
            hyperparameters=self.hyperparameters,
            seed=self.stage.seed,
            window={"start": window.start, "end": window.end} if window else None,
            touched=self.touched,
            cluster_column=rows.info.cluster_column,
            code=self.trainer.code,
            data=self.data,
            metrics=metrics,
            refit={"rows": self.stage.refit, "settled": settled.numbers} if settled else None,
            parity=parity,
            nondeterministic=getattr(self.trainer.fit, "nondeterministic", None),
            versions=versions(type(self.stage)),
        )

    def _predicted(self, number: int, train: NDArray[np.intp], held_out: NDArray[np.intp]) -> NDArray[Any]:
        """Predict the held-out rows of a fold."""
        import numpy as np

        key = f"{self.key}/fold-{number}.npy"
        if (kept := self.run.store.read(key)) is not None:
            try:
                return np.load(io.BytesIO(kept), allow_pickle=False)
            except (ValueError, EOFError) as error:
                log.warning("fold %d is fitted again, what an earlier try kept is damaged: %s", number, error)
        self.run.check_stop()
        name = f"fold-{number}"
        predicted = self._fit(name, train, None).predict(self.rows.take(held_out))
        buffer = io.BytesIO()
        np.save(buffer, predicted, allow_pickle=False)
        self.run.store.write(key, buffer.getvalue())
        self.run.store.delete(f"{self.key}/{name}")
        log.info("fold %d of %d predicted (%d rows)", number + 1, self.stage.folds, len(held_out))
        return predicted

    def _fit(
        self,
        name: str,
        subset: NDArray[np.intp] | None,
        curves: Curves | None,
        *,
        refit: Mapping[str, Any] | None = None,
        decided: Callable[[dict[str, Any] | None], None] | None = None,
    ) -> Fitted:
        from lepton_airflow.store.checkpoints import Checkpoints
        from lepton_airflow.training.fit import fit_model

        directory = self.run.workdir / "checkpoints" / name
        try:
            return fit_model(
                self.trainer,
                self.rows if refit is None or self.valid is None else self.rows.joined(self.valid),
                self.hyperparameters,
                valid=self.valid if refit is None else None,
                subset=subset,
                seed=self.stage.seed,
                threads=self.stage.threads,
                device=self.stage.device,
                should_stop=self.run.should_stop,
                checkpoints=Checkpoints(
                    self.run.store, f"{self.key}/{name}", directory, self.stage.checkpoint_s
                ),
                curves=curves,
                say=lambda text: log.info("%s: %s", name, text),
                settled=refit,
                decided=decided,
            )
        except LeptonError as error:
            if error.__cause__ is not None:  # an error of the user's code: show its traceback, without ours
                log.error("%s", "".join(traceback.format_exception(error.__cause__)))  # noqa: TRY400
            raise


def _check_apart(path: Path, rows: Rows, valid_path: Path, valid: Rows) -> None:
    """Raise BadInput when rows for early stopping and for metrics are among the rows to learn from.

    The rules are those for evaluation rows (:func:`lepton_airflow.packaging.touched.overlap`). Splits of one PrepareData run
    share no row, nor do others whose time ranges are apart, both ends included. Else the ids decide, or equal rows.
    """
    import numpy as np

    from lepton_airflow.packaging.touched import id_fingerprints, overlapping, row_fingerprints

    ours, theirs = valid.info, rows.info
    if ours.split_id is not None and ours.split_id == theirs.split_id:
        shared = f"both are the split {ours.split!r} of one preparation" if ours.split == theirs.split else ""
    elif ours.span and theirs.span and not overlapping(ours.span, theirs.span):
        shared = ""
    elif ours.id_columns and ours.id_columns == theirs.id_columns:
        held, learned = (id_fingerprints(p, ours.id_columns) for p in (valid_path, path))
        common = len(np.intersect1d(held, learned, assume_unique=True))
        ids = ", ".join(ours.id_columns)
        shared = f"{common:,} of its {len(held):,} ids ({ids}) are in dataset too" if common else ""
    elif ours.span and theirs.span:
        shared = f"its rows span {' to '.join(ours.span)}, those of dataset {' to '.join(theirs.span)}"
    else:
        held, learned = (row_fingerprints(p, rows.schema.features, rows.target) for p in (valid_path, path))
        common = len(np.intersect1d(held, learned, assume_unique=True))
        shared = f"{common:,} of its {len(held):,} distinct rows are in dataset too" if common else ""
    if shared:
        raise BadInput(
            f"valid shares rows with dataset: {shared}. Pass the valid split of the PrepareData run that made dataset."
        )


def _metrics(
    model: Fitted,
    rows: Rows,
    valid: Rows | None,
    out_of_fold: pd.DataFrame | None,
    settled: _Settled | None,
) -> dict[str, dict[str, float | None]]:
    """The metrics of the task on the rows of train, on ``valid`` (before a refit on it), and out of fold."""
    from lepton_airflow.training.fit import score

    found = {"train": score(rows.schema, rows.y, model.predict(rows.frame))}
    if settled is not None:
        found["valid"] = settled.valid
    elif valid is not None:
        found["valid"] = score(rows.schema, valid.y, model.predict(valid.frame))
    if out_of_fold is not None:
        predicted = out_of_fold.iloc[:, 3:].to_numpy()
        predicted = predicted if rows.schema.task == "classification" else predicted[:, 0]
        found["out_of_fold"] = score(rows.schema, rows.y[out_of_fold["row"].to_numpy()], predicted)
    return found


def _summary(
    stage: TrainModel,
    rows: Rows,
    valid: Rows | None,
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    size: int,
    settled: _Settled | None,
) -> str:
    from lepton_airflow.statistics.catalogue import JUDGED_BY

    key, positive = JUDGED_BY[rows.schema.task], rows.schema.positive_class
    part = next(p for p in ("out_of_fold", "valid", "train") if p in metrics)
    value = metrics[part][key]
    held_out = 0 if valid is None else len(valid.frame)
    numbers = ", ".join(f"{k}={brief(v)}" for k, v in settled.numbers.items()) if settled else ""
    fitted = len(rows.frame) + (held_out if settled else 0)
    before = f", of the model before the refit{f' ({numbers})' if numbers else ''}" if settled else ""
    return (
        f"Trained {stage.trainer} on {fitted:,} rows{' of train and valid' if settled else ''} and "
        f"{len(rows.schema.features)} features"
        + (f" ({held_out:,} rows held out)" if held_out and not settled else "")
        + f": {part.replace('_', ' ')} {key} "
        + (f"{value:.4g}" if value is not None else "undefined")
        + before
        + (f"; the positive class is {brief(positive)}" if positive is not None else "")
        + f"; ONNX and native differ by at most {parity['difference']:.1g}; package {size / 1e6:.2f} MB."
    )
