"""An operator made from a stage: its signature, its template fields, and how it runs the stage and proves that it ran."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, ClassVar, cast

from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSkipException,
    XComNotFound,
)
from airflow.sdk import Asset, AssetAlias, BaseOperator, BaseOperatorLink

from lepton_airflow import settings
from lepton_airflow.airflow import window as windows
from lepton_airflow.airflow.connections import connection_of
from lepton_airflow.airflow.dag_files import Uploads, on_worker, resolved
from lepton_airflow.airflow.installation import check_deployment
from lepton_airflow.contract import Receipt, Request, RunIdentity, Window
from lepton_airflow.errors import DO_NOT_RETRY, SKIP, BadConfiguration, LeptonError, RunnerError, did_you_mean
from lepton_airflow.runners import Runner, default_runner
from lepton_airflow.sdk.stage import Stage, choices, markers
from lepton_airflow.stages import build, stage_name
from lepton_airflow.store.files import Store

_COMMON: dict[str, Any] = {
    "runner": None,
    "store": None,
    "store_conn_id": None,
    "cache": "use",
    "cache_ttl_s": None,
    "window": None,
}
# Up to this size [bytes] a worker reads an artifact again to compare its digest: seconds from an object store.
_READ_WHOLE_BYTES = 256 << 20
# The arguments that every Airflow operator takes.
_BASE = frozenset(inspect.signature(BaseOperator.__init__).parameters)


class ReceiptLink(BaseOperatorLink):
    """A button in Airflow's UI that leads where the receipt's link of this name leads."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """What the button says."""
        return self._name

    @property
    def xcom_key(self) -> str:
        """Where Airflow keeps the address."""
        return f"_link_{self._name}"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """The address; Airflow asks in the task's own process, when the task ends."""
        receipt: Receipt | None = getattr(operator, "_receipt", None)
        return receipt.links.get(self._name, "") if receipt else ""


class StageOperator(BaseOperator):
    """Run one stage; the base of all named operators and of those for your own stages.

    ``class ScoreOperator(StageOperator, stage=Score)`` makes an operator of the stage ``Score``.
    """

    stage: ClassVar[type[Stage]]
    runner: Runner | None
    store: str | None
    store_conn_id: str | None
    cache: str
    cache_ttl_s: float | None
    window: Mapping[str, Any] | None
    _active: Runner | None = None
    template_ext: Sequence[str] = (".sql",)
    ui_color = "#e8f0fb"

    def __init_subclass__(cls, stage: type[Stage] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stage is None:
            return
        names = [f.name for f in fields(stage)]
        clash = sorted(set(names) & {*_COMMON, *_BASE})
        if clash:
            raise BadConfiguration(
                f"{stage.__name__}: field {clash[0]!r} is an argument of every operator; rename it."
            )
        cls.stage = stage
        cls.template_fields = (*names, "store", "cache", "window")
        cls.operator_extra_links = tuple(ReceiptLink(name) for name in stage.links)
        cls.template_fields_renderers = {n: "sql" for n in names if n in ("query", "features")}
        cls.__doc__ = f"{inspect.getdoc(stage)}\n\n{_returns(stage)}"

        def __init__(self: StageOperator, **kwargs: Any) -> None:  # noqa: N807 - it becomes the class's own
            own = {name: kwargs.pop(name) for name in names if name in kwargs}
            common = {name: kwargs.pop(name, default) for name, default in _COMMON.items()}
            _check_names(cls, kwargs)
            _check_choices(stage, own | {"cache": common["cache"]})
            if isinstance(common["runner"], str):
                raise BadConfiguration(
                    f"{cls.__name__}: runner={common['runner']!r} is text; pass the object, "
                    "such as lepton_airflow.runners.Subprocess()."
                )
            super(cls, self).__init__(**kwargs)
            for f in fields(stage):
                default = f.default_factory() if f.default_factory is not MISSING else f.default
                setattr(self, f.name, own.get(f.name, default))
            for name, value in common.items():
                setattr(self, name, value)

        __init__.__signature__ = _signature(stage)  # type: ignore[attr-defined]
        __init__.__doc__ = f"Make the task; arguments are those of {stage.__name__}, see the class."
        cls.__init__ = __init__  # type: ignore[assignment, method-assign]

    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Run the stage where ``runner`` says, and turn green only on the receipt found in the store."""
        limit = self.execution_timeout
        return self._perform(context, {"deadline": time.time() + limit.total_seconds()} if limit else {})

    def resume(
        self,
        context: Mapping[str, Any],
        event: Mapping[str, Any] | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go on after a deferral, as :meth:`execute` does: the runner finds out again what has happened meanwhile.

        :param event: what the trigger says.
        :param kept: what the runner kept when it deferred.
        """
        told = {name: event[name] for name in ("read", "refused", "tail") if name in event} if event else {}
        return self._perform(context, {**(kept or {}), **told})

    def _perform(self, context: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        """Run the stage, prove that it ran, and push its outputs.

        :param kept: what the runner kept when it deferred, and the task's deadline.
        """
        try:
            request, receipt = self._run(context, kept)
        except LeptonError as error:
            if error.exit_code == SKIP:
                raise AirflowSkipException(str(error)) from None
            if error.exit_code == DO_NOT_RETRY:
                raise AirflowFailException(str(error)) from None
            raise
        self._receipt = receipt
        self.log.info("%s: %s", receipt.status, receipt.summary)
        for name, artifact in receipt.artifacts.items():
            context["ti"].xcom_push(key=name, value=artifact.uri)
        for name, value in receipt.values.items():
            context["ti"].xcom_push(key=name, value=value)
        context["ti"].xcom_push(key="metrics", value=receipt.metrics)
        if self.stage.emits and receipt.values.get(self.stage.emits) is True:
            self._emit(request, receipt, context)
        return receipt.to_dict()

    def _run(self, context: Mapping[str, Any], kept: Mapping[str, Any]) -> tuple[Request, Receipt]:
        """Hand the request to the runner; returns it and a receipt that the store holds with all its artifacts."""
        runner = (self.runner or default_runner()).rendered(
            lambda value: self.render_template(value, cast("Any", context))
        )
        request = self._request(context)
        connections = [connection_of(conn_id) for conn_id in request.connections]
        opened = {c.id: c for c in connections}
        store = Store(request.store, opened.get(request.store_connection or ""))
        check_deployment(store, request.identity.deployment)
        self._active = runner
        try:
            receipt = runner.run(request, connections, {**context, "lepton": kept})
        finally:
            self._active = None
        self._prove(request, receipt, store, whole=not runner.local)
        return request, receipt

    def _emit(self, request: Request, receipt: Receipt, context: Mapping[str, Any]) -> None:
        """Tell the DAGs scheduled on this task's asset aliases what happened, and over which window.

        Airflow keeps the events of a task that succeeds, so a task that fails after this has sent none.
        """
        extra: dict[str, Any] = {"reason": receipt.summary, "receipt": receipt.run_key}
        if request.window:
            extra["window"] = {"start": request.window.start, "end": request.window.end}
        for alias in self.outlets:
            if isinstance(alias, AssetAlias):
                context["outlet_events"][alias].add(Asset(alias.name), extra=extra)

    def render_template(self, content: Any, *args: Any, **kwargs: Any) -> Any:
        """Render a field; an output that a stage declares and did not make, such as ``valid`` without such rows, is None."""
        try:
            return super().render_template(content, *args, **kwargs)
        except XComNotFound:
            source = getattr(content, "operator", None)
            if isinstance(source, StageOperator) and getattr(content, "key", None) in source.stage.outputs:
                return None
            raise

    def on_kill(self) -> None:
        """Stop the stage when Airflow stops the task."""
        if self._active is not None:
            self._active.cancel()

    def _request(self, context: Mapping[str, Any]) -> Request:
        """What this task instance asks for."""
        store = str(self.store or settings.default_store())
        store_connection = self.store_conn_id or (None if self.store else settings.setting("store_conn_id"))
        stage = stage_name(self.stage)
        parameters = self._parameters(context, store, store_connection)
        needed = build(stage, parameters).connection_ids()
        window, window_note = self._window(context)
        refresh = (context.get("params") or {}).get("refresh_cache") is True
        return Request(
            stage=stage,
            parameters=parameters,
            store=store,
            store_connection=store_connection,
            connections=tuple(dict.fromkeys([*([store_connection] if store_connection else []), *needed])),
            window=window,
            window_note=window_note,
            cache="refresh" if refresh and self.cache == "use" else str(self.cache),
            cache_ttl_s=self.cache_ttl_s if self.cache_ttl_s is not None else settings.default_ttl_s(),
            identity=_identity(context),
        )

    def _parameters(
        self, context: Mapping[str, Any], store: str, store_connection: str | None
    ) -> dict[str, Any]:
        """The stage's parameters; paths beside the DAG file as the place where the stage runs can read them."""
        folder = str(getattr(context.get("dag"), "folder", "") or "")
        local = (self.runner or default_runner()).local
        place = on_worker if local else Uploads(store, store_connection)
        return {f.name: resolved(getattr(self, f.name), folder, place) for f in fields(self.stage)}

    def _window(self, context: Mapping[str, Any]) -> tuple[Window | None, str]:
        """The window that the task was given, else the run's; and why there is none."""
        span: Any = self.window
        if not span:
            return windows.resolve(context)
        if not isinstance(span, Mapping) or set(span) != {"start", "end"}:
            raise BadConfiguration(f"window={span!r}: expected {{'start': …, 'end': …}}.")
        return windows.checked(span["start"], span["end"], "window"), ""

    def _prove(self, request: Request, receipt: Receipt, store: Store, *, whole: bool) -> None:
        """Raise unless the store holds this receipt and every artifact it names.

        :param whole: read the artifacts and compare their digests, for what was written elsewhere. Without it, and for
            what is larger than :data:`_READ_WHOLE_BYTES`, the size has to do: whoever reads it verifies the digest.
        """
        kept = store.receipt(request.run_key)
        if kept is None or _evidence(kept) != _evidence(receipt):
            raise RunnerError(
                f"{request.stage}: the store does not hold the receipt of this run ({request.run_key}): another run "
                "of the same task may have replaced it, or runner and worker see different stores. Clear the task."
            )
        for name, artifact in kept.artifacts.items():
            there = store.intact if whole and artifact.bytes <= _READ_WHOLE_BYTES else store.present
            if not there(artifact):
                raise RunnerError(
                    f"{request.stage}: artifact {name!r} is not in the store as the receipt says. Clear the task."
                )


def _identity(context: Mapping[str, Any]) -> RunIdentity:
    ti, run_type = context["ti"], context["dag_run"].run_type
    return RunIdentity(
        deployment=settings.setting("deployment", "airflow") or "airflow",
        dag_id=ti.dag_id,
        task_id=ti.task_id,
        run_id=ti.run_id,
        map_index=ti.map_index if ti.map_index is not None else -1,
        try_number=ti.try_number,
        run_type=str(getattr(run_type, "value", run_type)),
    )


def _evidence(receipt: Receipt) -> tuple[Any, ...]:
    return receipt.run_key, receipt.cache_key, receipt.artifacts, receipt.values


def _check_names(operator: type[BaseOperator], kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name not in _BASE and not name.startswith("_"):
            own = [p for p in inspect.signature(operator).parameters if p != "kwargs"]
            raise TypeError(f"{operator.__name__} has no argument {name!r}; {did_you_mean(name, own)}")


def _check_choices(stage: type[Stage], values: Mapping[str, Any]) -> None:
    allowed = choices(stage) | {"cache": ("use", "refresh", "off")}
    for name in values.keys() & allowed.keys():
        value = values[name]
        if isinstance(value, str) and "{{" not in value and "{%" not in value and value not in allowed[name]:
            raise BadConfiguration(
                f"{stage.__name__}: {name}={value!r}; {did_you_mean(value, map(str, allowed[name]))}"
            )


def _signature(stage: type[Stage]) -> inspect.Signature:
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(
            f.name,
            keyword,
            annotation=f.type,
            default=f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else inspect.Parameter.empty,
        )
        for f in fields(stage)
    ]
    common = [inspect.Parameter(name, keyword, default=default) for name, default in _COMMON.items()]
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *sorted(own, key=lambda p: p.default is not inspect.Parameter.empty),
        *common,
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
    return inspect.Signature(parameters)


def _returns(stage: type[Stage]) -> str:
    marked = ", ".join(f"``{name}``" for name in stage.outputs)
    artifacts = ", ".join(f"``{n}``" for n, marker in markers(stage).items() if marker == "artifact")
    lines = [
        "Every argument above is templated. See :mod:`lepton_airflow.operators` for the arguments all stages share."
    ]
    if artifacts:
        lines.append(f"Artifacts ({artifacts}) are URIs, best pinned ones: the output of an earlier stage.")
    if marked:
        lines.append(
            f"Pushes one XCom each: {marked}; ``metrics``, a flat dict; ``return_value``, the receipt."
        )
    return "\n".join(lines)
