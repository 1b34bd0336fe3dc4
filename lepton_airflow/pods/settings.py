"""What somebody may say about a stage's pod: the fields of :class:`lepton_airflow.runners.Pod`, their templates and checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from lepton_airflow.errors import BadConfiguration, did_you_mean

# Names of Kubernetes' security contexts that `Pod(security=…)` may override, by where they belong.
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
    """The fields of :class:`lepton_airflow.runners.Pod`, which describes them."""

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
        """A copy with its templates rendered; raises BadConfiguration for one that cannot be."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in values.items():
            if isinstance(value, (str, list, dict)):
                try:
                    values[name] = _rendered(value, render)
                except Exception as error:
                    if type(error).__module__.partition(".")[0] != "jinja2":
                        raise
                    raise BadConfiguration(
                        f"Pod({name}={value!r}) cannot be rendered: {error}. Mend the template."
                    ) from None
                if name in _TEXTS and values[name] in (
                    None,
                    "None",
                ):  # Jinja renders None as Python writes it
                    if getattr(type(self), name, "") is not None:
                        raise BadConfiguration(
                            f"Pod({name}={value!r}) renders to None: give what the template names a value."
                        )
                    values[name] = None
        return replace(self, **values)


def load_template(settings: PodSettings) -> Mapping[str, Any] | None:
    """The pod that ``pod_template`` names."""
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


def _rendered(value: Any, render: Callable[[Any], Any]) -> Any:
    """A value with its templates rendered, at any depth; numbers that Airflow's native rendering makes are text again."""
    if isinstance(value, dict):
        return {k: _rendered(v, render) for k, v in value.items()}
    if isinstance(value, list):
        return [_rendered(v, render) for v in value]
    if not _is_template(value):
        return value
    made = render(value)
    return str(made) if isinstance(made, (int, float)) and not isinstance(made, bool) else made


_TEXTS = (
    *("image", "namespace", "cpu", "memory", "cpu_limit", "memory_limit", "gpu_resource", "service_account"),
    *("priority_class", "runtime_class", "image_pull_policy", "queue", "python", "keep_pod"),
    *("kubernetes_conn_id", "config_file", "cluster_context"),
)
_DICTS = ("node_selector", "affinity", "env", "labels", "annotations", "security")
_LISTS = ("tolerations", "volumes", "pull_secrets")
_NUMBERS = ("start_timeout_s", "run_timeout_s", "admission_timeout_s", "schedule_timeout_s")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_MEMORY = re.compile(r"\d+(\.\d+)?([kMGTP]|[KMGTP]i)|\d{7,}")  # less than a MB is a forgotten unit
_SOURCES = ("pvc", "host_path", "config_map", "secret", "empty_dir")


def _check(s: PodSettings) -> None:
    """Refuse what the API server would refuse, or would take and mean otherwise, with the right form."""

    def refuse(name: str, expected: str) -> NoReturn:
        raise BadConfiguration(f"Pod({name}={getattr(s, name)!r}): expected {expected}.")

    for name in _TEXTS:
        if getattr(s, name) is not None and not isinstance(getattr(s, name), str):
            forms = {
                "cpu": '"500m" or "2"',
                "cpu_limit": '"500m" or "2"',
                "memory": '"2Gi"',
                "memory_limit": '"2Gi"',
            }
            refuse(name, f"text, such as {forms[name]}" if name in forms else "text")
    for names, kind, form in ((_DICTS, dict, '{"name": …}'), (_LISTS, list, "[…]")):
        for name in names:
            if not isinstance(getattr(s, name), kind) and not _is_template(getattr(s, name)):
                refuse(name, f"a {kind.__name__}, {form}")
    if not s.image.strip():
        refuse("image", 'an image, such as "registry.example/stage:1.4"')
    if s.namespace is not None and not _is_template(s.namespace) and not _NAME.fullmatch(s.namespace):
        refuse("namespace", 'lower-case letters, digits and "-", at most 63')
    for name, pattern, form in (
        ("cpu", _CPU, '"500m" or "2"'),
        ("cpu_limit", _CPU, '"500m" or "2"'),
        ("memory", _MEMORY, '"512Mi" or "2Gi"'),
        ("memory_limit", _MEMORY, '"512Mi" or "2Gi"'),
    ):
        value = getattr(s, name)
        if value is not None and not _is_template(value) and not pattern.fullmatch(value):
            refuse(name, f"a quantity such as {form}")
    if not isinstance(s.gpus, int) or isinstance(s.gpus, bool) or s.gpus < 0:
        refuse("gpus", "a whole number, zero or more")
    for name in _NUMBERS:
        value = getattr(s, name)
        if value is None and name == "schedule_timeout_s":
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            refuse(name, "seconds, more than zero")
    if not isinstance(s.grace_s, (int, float)) or not 0 <= s.grace_s < math.inf:
        refuse("grace_s", "seconds, zero or more")
    if not isinstance(s.preemption_limit, int) or s.preemption_limit < 0:
        refuse("preemption_limit", "a whole number, zero or more")
    for name, allowed in (
        ("keep_pod", ("never", "failed", "always")),
        ("image_pull_policy", (None, "Always", "IfNotPresent", "Never")),
    ):
        if getattr(s, name) not in allowed and not _is_template(getattr(s, name)):
            refuse(name, f"one of {', '.join(a for a in allowed if a)}")
    for name in ("env", "labels", "annotations", "node_selector"):
        for key, value in getattr(s, name).items() if isinstance(getattr(s, name), dict) else ():
            if not isinstance(key, str) or not isinstance(value, str):
                refuse(
                    name, f"text for {key!r}, not {type(value).__name__}: {{{str(key)!r}: {str(value)!r}}}"
                )
    for volume in s.volumes if isinstance(s.volumes, list) else ():
        _check_volume(volume)
    for toleration in s.tolerations if isinstance(s.tolerations, list) else ():
        if not isinstance(toleration, dict):
            refuse("tolerations", '[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]')
    if s.pod_template is not None and not isinstance(s.pod_template, (str, dict)):
        refuse("pod_template", "the path of a YAML file, or a dict")
    if isinstance(s.security, dict) and s.security:
        for key in s.security:
            if key not in OF_CONTAINER | OF_POD | OF_SPEC:
                raise BadConfiguration(
                    f"Pod(security=…): {key!r} is unknown; {did_you_mean(key, OF_CONTAINER | OF_POD | OF_SPEC)}"
                )
        if s.security.get("runAsUser") == 0 and s.security.get("runAsNonRoot", s.pod_template) is None:
            raise BadConfiguration(
                f"Pod(security={s.security!r}): pods run as root only where that is said; add 'runAsNonRoot': False."
            )


def _check_volume(volume: Any) -> None:
    form = '{"name": "data", "mount": "/data", "pvc": "claim"}'
    if not isinstance(volume, dict):
        raise BadConfiguration(f"Pod(volumes=…): {volume!r} is no dict; expected {form}.")
    known = {"name", "mount", "read_only", *_SOURCES}
    for key in volume:
        if key not in known:
            raise BadConfiguration(f"Pod(volumes=…): {key!r} is unknown; {did_you_mean(key, known)}")
    if "name" not in volume or "mount" not in volume or sum(s in volume for s in _SOURCES) != 1:
        raise BadConfiguration(
            f"Pod(volumes=…): {volume!r} needs a name, a mount and one of {', '.join(_SOURCES)}: {form}."
        )
    for key in ("name", "mount"):
        if not isinstance(volume[key], str):
            raise BadConfiguration(
                f"Pod(volumes=…): {key}={volume[key]!r} is no text; expected as in {form}."
            )
        good = _NAME.fullmatch(volume[key]) if key == "name" else volume[key].startswith("/")
        if not good and not _is_template(volume[key]):
            raise BadConfiguration(f"Pod(volumes=…): {key}={volume[key]!r}; expected as in {form}.")
