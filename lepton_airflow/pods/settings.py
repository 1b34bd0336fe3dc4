"""The settings of a stage's pod: the fields of :class:`lepton_airflow.runners.Pod`, their templates and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from lepton_airflow.errors import BadConfiguration, did_you_mean

# Fields of Kubernetes' security contexts that `security` may override, by where a pod has them.
OF_POD = frozenset({"fsGroup", "fsGroupChangePolicy", "supplementalGroups", "sysctls"})
OF_SPEC = frozenset({"automountServiceAccountToken"})
OF_CONTAINER = frozenset(
    {
        "allowPrivilegeEscalation",
        "capabilities",
        "privileged",
        "procMount",
        "readOnlyRootFilesystem",
        "runAsGroup",
        "runAsNonRoot",
        "runAsUser",
        "seLinuxOptions",
        "seccompProfile",
    }
)


@dataclass(kw_only=True)
class PodSettings:
    """The settings of a pod; the docstring of :class:`lepton_airflow.runners.Pod` describes each."""

    image: str
    namespace: str | None = None
    cpu: str | None = None
    memory: str | None = None
    cpu_limit: str | None = None
    memory_limit: str | None = None
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    affinity: dict[str, Any] = field(default_factory=dict)
    service_account: str | None = None
    priority_class: str | None = None
    runtime_class: str | None = None
    volumes: list[dict[str, Any]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    pull_secrets: list[str] = field(default_factory=list)
    image_pull_policy: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    pod_template: str | dict[str, Any] | None = None
    queue: str | None = None
    security: dict[str, Any] = field(default_factory=dict)
    schedule_timeout_s: float | None = None
    start_timeout_s: float = 600.0
    run_timeout_s: float = 86_400.0
    admission_timeout_s: float = 86_400.0
    preemption_limit: int = 5
    deferrable: bool | None = None
    python: str = "python"
    grace_s: float = 30.0
    keep_pod: Literal["never", "failed", "always"] = "never"
    kubernetes_conn_id: str | None = None
    config_file: str | None = None
    cluster_context: str | None = None
    in_cluster: bool | None = None

    def __post_init__(self) -> None:
        _check(self)

    def rendered(self, render: Callable[[Any], Any]) -> Self:
        """A copy with its templates rendered; raises BadConfiguration for one that cannot be rendered."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in values.items():
            if isinstance(value, (str, list, dict)):
                values[name] = self._rendered(name, value, render)
        return replace(self, **values)

    def _rendered(self, name: str, value: Any, render: Callable[[Any], Any]) -> Any:
        try:
            rendered = _render(value, render)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise BadConfiguration(
                f"Pod({name}={value!r}) cannot be rendered: {error}. Correct the template."
            ) from None
        # Jinja renders None as the text "None", and Airflow's native rendering as None.
        if name not in _TEXTS or rendered not in (None, "None"):
            return rendered
        if getattr(type(self), name, "") is not None:  # the setting's default is not None
            raise BadConfiguration(
                f"Pod({name}={value!r}) renders to None: give what the template names a value."
            )
        return None


def load_template(settings: PodSettings) -> Mapping[str, Any] | None:
    """The pod that ``pod_template`` gives, or that stands in the file it names."""
    template: Any = settings.pod_template
    if isinstance(template, str):
        import yaml

        try:
            template = yaml.safe_load(Path(template).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise BadConfiguration(
                f"Pod(pod_template={settings.pod_template!r}) cannot be read on this worker: {error}."
            ) from None
    if template is not None and not (
        isinstance(template, Mapping) and isinstance(template.get("spec"), Mapping)
    ):
        raise BadConfiguration(
            f"Pod(pod_template=…): expected a pod, {{'spec': {{'containers': […]}}}}, not {type(template).__name__}."
        )
    return template


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def _render(value: Any, render: Callable[[Any], Any]) -> Any:
    """A value with its templates rendered, at any depth.

    Kubernetes wants text where Airflow's native rendering gives a number: such a number is made text again.
    """
    if isinstance(value, dict):
        return {k: _render(v, render) for k, v in value.items()}
    if isinstance(value, list):
        return [_render(v, render) for v in value]
    if not _is_template(value):
        return value
    rendered = render(value)
    is_number = isinstance(rendered, (int, float)) and not isinstance(rendered, bool)
    return str(rendered) if is_number else rendered


# -- checks ------------------------------------------------------------------------------------------------------------

_TEXTS = (
    *("image", "namespace", "cpu", "memory", "cpu_limit", "memory_limit", "gpu_resource", "service_account"),
    *("priority_class", "runtime_class", "image_pull_policy", "queue", "python", "keep_pod"),
    *("kubernetes_conn_id", "config_file", "cluster_context"),
)
_DICTS = ("node_selector", "affinity", "env", "labels", "annotations", "security")
_DICTS_OF_TEXTS = ("env", "labels", "annotations", "node_selector")
_LISTS = ("tolerations", "volumes", "pull_secrets")
_TIMEOUTS = ("start_timeout_s", "run_timeout_s", "admission_timeout_s", "schedule_timeout_s")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "keep_pod": ("never", "failed", "always"),
    "image_pull_policy": (None, "Always", "IfNotPresent", "Never"),
}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
# Without a suffix the number means bytes: fewer than seven digits, less than a megabyte, are a forgotten suffix.
_MEMORY = re.compile(r"\d+(\.\d+)?([kMGTP]|[KMGTP]i)|\d{7,}")
_QUANTITIES = {
    "cpu": (_CPU, '"500m" or "2"'),
    "cpu_limit": (_CPU, '"500m" or "2"'),
    "memory": (_MEMORY, '"512Mi" or "2Gi"'),
    "memory_limit": (_MEMORY, '"512Mi" or "2Gi"'),
}
_TOLERATION = '[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]'
_VOLUME = '{"name": "data", "mount": "/data", "pvc": "claim"}'
_VOLUME_SOURCES = ("pvc", "host_path", "config_map", "secret", "empty_dir")


def _check(settings: PodSettings) -> None:
    """Refuse what the API server would refuse, or would accept and read differently; the message shows the right form."""
    _check_types(settings)
    _check_texts(settings)
    _check_numbers(settings)
    _check_contents(settings)
    _check_security(settings)


def _expected(settings: PodSettings, name: str, form: str) -> BadConfiguration:
    return BadConfiguration(f"Pod({name}={getattr(settings, name)!r}): expected {form}.")


def _check_types(settings: PodSettings) -> None:
    """Texts, dicts and lists are such, or templates that render to them."""
    for name in _TEXTS:
        if getattr(settings, name) is not None and not isinstance(getattr(settings, name), str):
            example = _QUANTITIES[name][1] if name in _QUANTITIES else ""
            raise _expected(settings, name, f"text, such as {example}" if example else "text")
    for names, kind, form in ((_DICTS, dict, '{"name": …}'), (_LISTS, list, "[…]")):
        for name in names:
            value = getattr(settings, name)
            if not isinstance(value, kind) and not _is_template(value):
                raise _expected(settings, name, f"a {kind.__name__}, {form}")
    if settings.pod_template is not None and not isinstance(settings.pod_template, (str, dict)):
        raise _expected(settings, "pod_template", "the path of a YAML file, or a dict")


def _check_texts(settings: PodSettings) -> None:
    if not settings.image.strip():
        raise _expected(settings, "image", 'an image, such as "registry.example/stage:1.4"')
    namespace = settings.namespace
    if namespace is not None and not _is_template(namespace) and not _NAME.fullmatch(namespace):
        raise _expected(settings, "namespace", 'lower-case letters, digits and "-", at most 63')
    for name, (pattern, form) in _QUANTITIES.items():
        value = getattr(settings, name)
        if value is not None and not _is_template(value) and not pattern.fullmatch(value):
            raise _expected(settings, name, f"a quantity such as {form}")
    for name, choices in _CHOICES.items():
        value = getattr(settings, name)
        if value not in choices and not _is_template(value):
            raise _expected(settings, name, f"one of {', '.join(filter(None, choices))}")


def _check_numbers(settings: PodSettings) -> None:
    if not isinstance(settings.gpus, int) or isinstance(settings.gpus, bool) or settings.gpus < 0:
        raise _expected(settings, "gpus", "a whole number, zero or more")
    for name in _TIMEOUTS:
        value = getattr(settings, name)
        if value is None and name == "schedule_timeout_s":
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise _expected(settings, name, "seconds, more than zero")
    if not isinstance(settings.grace_s, (int, float)) or not 0 <= settings.grace_s < math.inf:
        raise _expected(settings, "grace_s", "seconds, zero or more")
    if not isinstance(settings.preemption_limit, int) or settings.preemption_limit < 0:
        raise _expected(settings, "preemption_limit", "a whole number, zero or more")


def _check_contents(settings: PodSettings) -> None:
    """What stands in the dicts and lists that are no templates."""
    for name in _DICTS_OF_TEXTS:
        values = getattr(settings, name)
        for key, value in values.items() if isinstance(values, dict) else ():
            if not isinstance(key, str) or not isinstance(value, str):
                form = f"{{{str(key)!r}: {str(value)!r}}}"
                raise _expected(settings, name, f"text for {key!r}, not {type(value).__name__}: {form}")
    for volume in settings.volumes if isinstance(settings.volumes, list) else ():
        _check_volume(volume)
    for toleration in settings.tolerations if isinstance(settings.tolerations, list) else ():
        if not isinstance(toleration, dict):
            raise _expected(settings, "tolerations", _TOLERATION)


def _check_volume(volume: Any) -> None:
    if not isinstance(volume, dict):
        raise BadConfiguration(f"Pod(volumes=…): {volume!r} is no dict; expected {_VOLUME}.")
    known = {"name", "mount", "read_only", *_VOLUME_SOURCES}
    for key in volume:
        if key not in known:
            raise BadConfiguration(f"Pod(volumes=…): {key!r} is unknown; {did_you_mean(key, known)}")
    if "name" not in volume or "mount" not in volume or sum(s in volume for s in _VOLUME_SOURCES) != 1:
        raise BadConfiguration(
            f"Pod(volumes=…): {volume!r} needs a name, a mount and one of {', '.join(_VOLUME_SOURCES)}: {_VOLUME}."
        )
    for key in ("name", "mount"):
        if not isinstance(volume[key], str):
            raise BadConfiguration(
                f"Pod(volumes=…): {key}={volume[key]!r} is no text; expected as in {_VOLUME}."
            )
        good = _NAME.fullmatch(volume[key]) if key == "name" else volume[key].startswith("/")
        if not good and not _is_template(volume[key]):
            raise BadConfiguration(f"Pod(volumes=…): {key}={volume[key]!r}; expected as in {_VOLUME}.")


def _check_security(settings: PodSettings) -> None:
    security: Any = settings.security
    if _is_template(security):
        return
    known = OF_CONTAINER | OF_POD | OF_SPEC
    for key in security:
        if key not in known:
            raise BadConfiguration(f"Pod(security=…): {key!r} is unknown; {did_you_mean(key, known)}")
    # A pod_template may have its own runAsNonRoot.
    if security.get("runAsUser") == 0 and security.get("runAsNonRoot", settings.pod_template) is None:
        raise BadConfiguration(
            f"Pod(security={security!r}): pods run as root only where that is said; add 'runAsNonRoot': False."
        )
