"""The Role in docs/kubernetes/role.yaml is enough to run a stage; without one of its rights, the error names that right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lepton_airflow.contract import Receipt
from lepton_airflow.errors import PodFailed
from lepton_airflow.runners import Runner
from lepton_airflow.testing import probe

HERE = Path(__file__).parent
ROLE = yaml.safe_load((HERE.parents[1] / "docs" / "kubernetes" / "role.yaml").read_text())
RIGHTS = [
    (resource, verb) for rule in ROLE["rules"] for resource in rule["resources"] for verb in rule["verbs"]
]

# A run on a worker needs these even if nothing disturbs it.
NEEDED = {
    ("pods", "list"),
    ("pods", "create"),
    ("pods", "delete"),
    ("secrets", "create"),
    ("secrets", "patch"),
}


@pytest.fixture(scope="module")
def outcomes(
    cluster: Any, namespace: str, shared: Path, make_pod: Callable[..., Runner]
) -> dict[tuple[str, str] | None, Receipt | Exception]:
    """How a run of a stage ends with the whole Role (None), and with each right taken out of it."""
    sys.path.append(str(HERE))
    import disturb

    store = shared / "store"

    def run(missing: tuple[str, str] | None) -> Receipt | Exception:
        name = "-".join(missing or ("all",)).replace("/", "-")
        rules = [
            rule | {"verbs": [v for v in rule["verbs"] if (rule["resources"][0], v) != missing]}
            for rule in ROLE["rules"]
        ]
        role = ROLE | {"metadata": {"name": name}, "rules": [rule for rule in rules if rule["verbs"]]}
        cluster.kubectl("create", "-n", namespace, "-f", "-", text=json.dumps(role))
        cluster.kubectl("create", "serviceaccount", name, "-n", namespace)
        cluster.kubectl(
            *("create", "rolebinding", name, "-n", namespace),
            *("--role", name, "--serviceaccount", f"{namespace}:{name}"),
        )
        kubeconfig = shared / f"{name}.kubeconfig"
        kubeconfig.write_text(disturb.kubeconfig_of(namespace, name))
        request = probe("Copy", store, text=name)
        request = replace(request, identity=replace(request.identity, run_id=name), cache="off")
        try:
            return make_pod(config_file=str(kubeconfig), memory="300Mi").run(request, [], {})
        except PodFailed as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        cases: list[tuple[str, str] | None] = [None, *RIGHTS]
        return dict(zip(cases, pool.map(run, cases), strict=True))


Outcomes = dict[tuple[str, str] | None, Receipt | Exception]


def test_the_role_is_enough(outcomes: Outcomes) -> None:
    found = outcomes[None]
    assert isinstance(found, Receipt), found
    assert found.status == "done"


@pytest.mark.parametrize("right", RIGHTS, ids=" ".join)
def test_a_missing_right_is_named_or_not_missed(outcomes: Outcomes, right: tuple[str, str]) -> None:
    found, (resource, verb) = outcomes[right], right
    if right not in NEEDED:
        assert isinstance(found, Receipt), found
        return
    assert isinstance(found, PodFailed)
    assert (found.reason, found.exit_code) == ("Forbidden", 80)
    assert f"grants verb {verb!r} on {resource!r}" in str(found)
