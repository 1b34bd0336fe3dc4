"""What a server tells of itself: the description holds for requests made from it, and the examples work when they are pasted."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from lepton_airflow.data.features import Feature
from lepton_airflow.serving import describe
from lepton_airflow.serving.protocol import Output
from lepton_airflow.stages.deploy_model import DeployModel
from lepton_airflow.testing import LocalEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = {"rebe": "wine", "zucker": "diabetes"}


@pytest.fixture(scope="module")
def server(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """A server of two models."""
    folder = tmp_path_factory.mktemp("described")
    run = replace(shelf.run, run_key="described", workdir=folder)
    options = ("--poll-s", "0.1", "--max-rows", "200")
    with LocalEndpoint("rebe", shelf.run.store.root, folder, options=options, more=("zucker",)) as server:
        for endpoint, model in MODELS.items():
            uri = getattr(shelf, model).uri
            DeployModel(endpoint=endpoint, model=uri, timeout_s=60, max_latency_ms=5000).run(run)
        yield server


CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


# What is right is not all in the schema: shapes and data have to fit, inputs may come in another order. So nothing is said about
# which of these requests are refused.
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_asked_the_answer_conforms(server: LocalEndpoint, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: set[int] = set()
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS).status_code)

        if mode is GenerationMode.POSITIVE or operation.body:
            ask()
    assert {operation.path for operation in operations} == set(schema.raw_schema["paths"])
    assert statuses == {200, 400, 404}


def test_the_description_tells_of_the_models_own_inputs(server: LocalEndpoint, shelf: Any) -> None:
    told = json.loads(read(server, "/v2/openapi.json"))
    assert told == json.loads(read(server, "/openapi.json"))
    assert told["openapi"] == "3.1.0"
    for endpoint, model in MODELS.items():
        features = getattr(shelf, model).package.card.features
        inputs = told["components"]["schemas"][f"{endpoint}.request"]["properties"]["inputs"]["prefixItems"]
        assert [t["properties"]["name"]["const"] for t in inputs] == [f.name for f in features]
        asked = told["paths"][f"/v2/models/{endpoint}/infer"]["post"]["requestBody"]["content"]
        body = json.dumps(asked["application/json"]["example"]).encode()
        with urllib.request.urlopen(f"{server.url}/v2/models/{endpoint}/infer", body) as answer:
            check(shelf, endpoint, json.load(answer))
    assert len(told["paths"]) == 28


def read(server: LocalEndpoint, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.read().decode()


def check(shelf: Any, endpoint: str, answer: dict[str, Any]) -> None:
    """Compare an answer to the example with the package's own."""
    model = getattr(shelf, MODELS[endpoint])
    row = describe.example(
        SimpleNamespace(card=model.package.card, profile=(model.package.path / "profile.json").read_bytes())
    )
    assert row["shade"] in ("hell", "dark")
    assert all(isinstance(value, float) for name, value in row.items() if name != "shade")
    found = answer["outputs"][0]
    np.testing.assert_array_equal(
        np.reshape(found["data"], found["shape"]).ravel(), model.package.predict(pd.DataFrame([row])).ravel()
    )


class _Examples(HTMLParser):
    """The examples of the page, by model and language; and whatever it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], str] = {}
        self.loads: list[str] = []
        self._inside: tuple[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = (given["data-model"], given["data-language"]) if tag == "pre" else None
        if tag in ("script", "link", "img", "iframe") or "src" in given:
            self.loads.append(tag)

    def handle_endtag(self, _: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[self._inside] = self.found.get(self._inside, "") + data


def examples(page: str) -> _Examples:
    parser = _Examples()
    parser.feed(page)
    return parser


def test_the_examples_work_when_they_are_pasted(server: LocalEndpoint, shelf: Any) -> None:
    page = examples(read(server, "/docs"))
    assert page.loads == []
    assert set(page.found) == {(e, language) for e in MODELS for language in ("bash", "python")}
    for (endpoint, language), text in page.found.items():
        # As a shell and an interpreter get what is pasted: line by line, from their input.
        command = ["bash", "-s"] if language == "bash" else [sys.executable, "-"]
        done = subprocess.run(command, input=text + "\n", check=True, capture_output=True, text=True)
        check(shelf, endpoint, json.loads(done.stdout) if language == "bash" else eval(done.stdout))


def served(names: list[str], profile: Any) -> Any:
    features = [
        Feature(name, "category" if number % 2 else "number", name) for number, name in enumerate(names)
    ]
    return SimpleNamespace(
        card=SimpleNamespace(features=features),
        desired=SimpleNamespace(version="<7>"),
        outputs={"prediction": Output("prediction", "FP32", [-1, 1])},
        profile=json.dumps(profile).encode() if profile is not None else b"",
    )


def test_an_example_shows_no_rare_text_and_needs_no_profile() -> None:
    columns = {"a": {"quantiles": [1, 2.00049, 3]}, "b": {"top": [["Ms Smith", 9]]}}
    assert describe.example(served(["a", "b"], {"columns": columns})) == {"a": 2.0, "b": None}
    columns["b"] = {"top": [["often", 10], ["rare", 1]]}
    assert describe.example(served(["a", "b"], {"columns": columns}))["b"] == "often"
    for profile in (None, {}, [], {"columns": None}, {"columns": {"a": {"quantiles": []}, "b": {"top": []}}}):
        assert describe.example(served(["a", "b"], profile)) == {"a": None, "b": None}


def test_an_endpoint_without_a_version_is_named_on_the_page_alone() -> None:
    assert "No version is in service yet" in describe.page({"leer": None}, "http://x:1")
    assert not any("leer" in path for path in describe.openapi({}, 1)["paths"])


def test_names_of_any_kind_stay_what_they_are() -> None:
    names = ["it's", '"quoted" <b>', "back\\slash $HOME `id`", "new\nline 😀", "{brace}", "@file"]
    page = examples(describe.page({"odd": served(names, None)}, "http://x:1"))
    bash, python = page.found["odd", "bash"], page.found["odd", "python"]
    done = subprocess.run(
        ["bash", "-s"], input=f"curl() {{ printf %s \"${{@: -1}}\"; }}\n{bash}\n", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert [t["name"] for t in json.loads(done.stdout)["inputs"]] == names
    listed: dict[str, Any] = {}
    exec(python.split("request = ")[0], listed)
    assert [t["name"] for t in listed["inputs"]] == names


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ({"host": "models.example:8080"}, "http://models.example:8080"),
        ({"host": "[::1]:80"}, "http://[::1]:80"),
        ({"host": "models.example", "x-forwarded-proto": "https"}, "https://models.example"),
        ({"host": "x'; rm -rf ~ #"}, "http://127.0.0.1:5"),
        ({}, "http://127.0.0.1:5"),
    ],
)
def test_an_example_asks_the_server_that_showed_it(headers: dict[str, str], url: str) -> None:
    assert describe.base_url(headers, 5) == url
