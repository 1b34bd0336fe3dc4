from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.errors import BadConfiguration
from lepton_airflow.pods.settings import load_template
from lepton_airflow.runners import Pod


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image": " "}, "image, such as"),
        ({"image": 3}, r"Pod\(image=3\): expected text"),
        ({"cpu": "two"}, r"Pod\(cpu='two'\): expected a quantity such as \"500m\" or \"2\""),
        ({"cpu": 2}, r'Pod\(cpu=2\): expected text, such as "500m" or "2"'),
        ({"memory": "512m"}, r'expected a quantity such as "512Mi" or "2Gi"'),
        ({"memory": "2048"}, "expected a quantity"),
        ({"memory": "2 GB"}, "expected a quantity"),
        ({"gpus": "1"}, r"Pod\(gpus='1'\): expected a whole number"),
        ({"gpus": -1}, "zero or more"),
        ({"namespace": "My_Team"}, "lower-case letters"),
        ({"env": {"THREADS": 2}}, r"Pod\(env=.*expected text for 'THREADS', not int: \{'THREADS': '2'\}"),
        ({"node_selector": ["gpu"]}, "expected a dict"),
        ({"tolerations": ["gpu"]}, '"operator": "Exists"'),
        ({"pull_secrets": "registry"}, "expected a list"),
        ({"volumes": [{"name": "d", "mount": "/d"}]}, "one of pvc, host_path"),
        ({"volumes": [{"name": "d", "mount": "/d", "pcv": "x"}]}, "'pcv' is unknown; did you mean 'pvc'"),
        ({"volumes": [{"name": "d", "mount": "d", "pvc": "x"}]}, "mount='d'; expected as in"),
        ({"security": {"runAsuser": 0}}, "'runAsuser' is unknown; did you mean 'runAsUser'"),
        ({"security": {"runAsUser": 0}}, "add 'runAsNonRoot': False"),
        ({"keep_pod": "sometimes"}, "one of never, failed, always"),
        ({"image_pull_policy": "always"}, "one of Always"),
        ({"run_timeout_s": 0}, "seconds, more than zero"),
        ({"run_timeout_s": float("inf")}, "seconds, more than zero"),
        ({"start_timeout_s": None}, "seconds, more than zero"),
        ({"grace_s": "30"}, "seconds, zero or more"),
        ({"volumes": [{"name": 3, "mount": "/d", "pvc": "x"}]}, "name=3 is no text"),
        ({"preemption_limit": -1}, "whole number"),
        ({"pod_template": 7}, "path of a YAML file"),
    ],
)
def test_a_bad_value_is_refused_at_construction(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadConfiguration, match=says):
        Pod(**{"image": "stage:1", **settings})


def test_templates_are_taken_and_rendered_into_a_copy() -> None:
    pod = Pod(image="stage:{{ v }}", memory="{{ m }}", labels={"run": "{{ r }}"}, volumes="{{ vs }}", gpus=1)
    known = {"stage:{{ v }}": "stage:3", "{{ m }}": "3Gi", "{{ vs }}": []}
    seen = pod.rendered(lambda value: known.get(value, value) if isinstance(value, str) else value)
    assert (seen.image, seen.memory, seen.volumes, seen.gpus) == ("stage:3", "3Gi", [], 1)
    assert pod.image == "stage:{{ v }}"
    with pytest.raises(BadConfiguration, match="memory='lots'"):
        pod.rendered(lambda value: "lots" if value == "{{ m }}" else value)
    for nothing in ("None", None):  # the latter where Airflow renders to native objects
        with pytest.raises(BadConfiguration, match=r"Pod\(image='{{ i }}'\) renders to None"):
            Pod(image="{{ i }}").rendered(lambda value: nothing if value == "{{ i }}" else value)  # noqa: B023
        pod = Pod(image="stage:1", service_account="{{ a }}")
        assert pod.rendered(lambda value: nothing if value == "{{ a }}" else value).service_account is None  # noqa: B023


def test_what_looks_like_a_number_stays_text_where_airflow_renders_to_native_objects() -> None:
    pod = Pod(image="stage:1", cpu="{{ c }}", env={"THREADS": "1", "BATCH": "{{ b }}"})
    seen = pod.rendered(lambda value: 2)
    assert (seen.cpu, seen.env) == ("2", {"THREADS": "1", "BATCH": "2"})


def test_a_template_that_is_no_pod_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text("- no\n- pod\n")
    for template, says in ((str(tmp_path / "pod.yaml"), "expected a pod"), ("/none.yaml", "cannot be read")):
        with pytest.raises(BadConfiguration, match=says):
            load_template(Pod(image="stage:1", pod_template=template))
