"""What a server tells of itself: an OpenAPI description of the models that it serves, and a page with calls that can be pasted.

The row of an example is made of the profile in the model's package: the median of a number, the most frequent category, and
that only where it is frequent, since a rare text may be a person's.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_airflow import __version__
from lepton_airflow.data.features import KINDS, Feature
from lepton_airflow.serving.model import ServedModel
from lepton_airflow.serving.protocol import configuration, metadata

_FREQUENT = 10  # rows in which a category must occur to be shown
_HOST = re.compile(r"[A-Za-z0-9._-]+(:\d{1,5})?|\[[0-9a-fA-F:.]+\](:\d{1,5})?")
_TEXT, _BOOLEAN = {"type": "string"}, {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}


def example(served: ServedModel) -> dict[str, Any]:
    """A typical row of a model, ``{column: value}``, with None for what is not known."""
    try:
        columns = json.loads(served.profile)["columns"]
    except (ValueError, KeyError, TypeError):  # a package may have none
        columns = {}
    return {f.name: _typical(f, columns) for f in served.card.features}


def _typical(feature: Feature, columns: Any) -> Any:
    try:
        column = columns[feature.name]
        if feature.kind == "number":
            quantiles = column["quantiles"]
            return float(f"{quantiles[len(quantiles) // 2]:.4g}")
        value, count = column["top"][0]
        return value if isinstance(value, str) and count >= _FREQUENT else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def example_request(served: ServedModel) -> dict[str, Any]:
    """A request for that row."""
    return {
        "inputs": [
            {"name": f.name, "datatype": KINDS[f.kind].datatypes[0], "shape": [1, 1], "data": [value]}
            for f, value in zip(served.card.features, example(served).values(), strict=True)
        ]
    }


def base_url(headers: Mapping[str, str], port: int) -> str:
    """The URL by which a client has reached the server, if it is one that can stand in a command."""
    host = headers.get("host", "")
    scheme = "https" if headers.get("x-forwarded-proto", "").lower() == "https" else "http"
    return f"{scheme}://{host}" if _HOST.fullmatch(host) else f"http://127.0.0.1:{port}"


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def openapi(models: Mapping[str, ServedModel], max_rows: int) -> dict[str, Any]:
    """An OpenAPI description of a server.

    :param models: those in service, by endpoint.
    """
    schemas: dict[str, Any] = {
        "Error": _object({"error": {"type": "string", "description": "One sentence."}}),
        "Parameters": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
    }
    paths: dict[str, Any] = {
        "/v2": {
            "get": _get("The server", _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}))
        },
        "/v2/health/live": {"get": _get("Whether the server lives", _object({"live": _BOOLEAN}))},
        "/v2/health/ready": {
            "get": _get("Whether all models are in service", _object({"ready": _BOOLEAN}), 503)
        },
        "/v2/repository/index": {"post": _index()},
        "/v2/models/stats": {"get": _get("What is counted, of all models", _statistics())},
        "/metrics": {"get": _get("Metrics for Prometheus", _TEXT, content_type="text/plain")},
        "/docs": {"get": _get("A page with calls to copy", _TEXT, content_type="text/html")},
        "/v2/openapi.json": {"get": _get("This description", {"type": "object"})},
    }
    if "stats" in models:
        del paths["/v2/models/stats"]  # which then is that model
    for name, served in models.items():
        schemas[f"{name}.request"] = _request(served, max_rows)
        schemas[f"{name}.answer"] = _answer(name, served)
        paths |= _paths(name, served, max_rows)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lepton_airflow",
            "version": __version__,
            "description": "Models by the Open Inference Protocol, version 2. Inputs may come in any order; they and the outputs "
            "may be binary tensors, by the extension binary_tensor_data.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _paths(name: str, served: ServedModel, max_rows: int) -> dict[str, Any]:
    version = served.desired.version
    described = metadata(name, version, served.card.features, served.outputs)
    config = configuration(name, served.card.features, served.outputs, max_rows)
    ready = _object({"name": {"const": name}, "ready": {"const": True}})
    infer = _infer(name, served)
    looks = {
        "": _get(f"What {name} takes and gives", _like(described)),
        "/ready": _get(f"Whether {name} is in service", ready),
        "/config": _get(f"The configuration of {name}, as Triton writes it", _like(config)),
        "/stats": _get(f"What is counted of {name}, as Triton writes it", _statistics()),
    }
    of_version = {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "Any but the one in service gets 404.",
        "schema": {"type": "string", "minLength": 1},
        "example": version,
    }
    found: dict[str, Any] = {}
    for prefix, parameters in (("", []), ("/versions/{version}", [of_version])):
        base = f"/v2/models/{name}{prefix}"
        for suffix, look in looks.items():
            refused = {str(status): _refused(status) for status in (404, 503)}
            responses = look["responses"] | refused
            found[base + suffix] = {"get": {**look, "responses": responses}, "parameters": parameters}
        found[f"{base}/infer"] = {"post": infer, "parameters": parameters}
    return found


def _infer(name: str, served: ServedModel) -> dict[str, Any]:
    refused = {str(status): _refused(status) for status in (400, 404, 408, 413, 415, 422, 431, 503)}
    request = {"schema": _ref(f"{name}.request"), "example": example_request(served)}
    return {
        "summary": f"Ask {name} for predictions",
        "requestBody": {"required": True, "content": {"application/json": request}},
        "responses": {"200": _response("The predictions", _ref(f"{name}.answer"))} | refused,
    }


def _request(served: ServedModel, max_rows: int) -> dict[str, Any]:
    inputs = [_input(feature, max_rows) for feature in served.card.features]
    output = _object(
        {"name": {"enum": list(served.outputs)}, "parameters": _ref("Parameters")}, required=["name"]
    )
    return _object(
        {
            "id": {"type": "string", "maxLength": 1000},
            "parameters": _ref("Parameters"),
            "inputs": {
                "type": "array",
                "prefixItems": inputs,
                "items": False,
                "minItems": len(inputs),
                "maxItems": len(inputs),
            },
            "outputs": _list(output),
        },
        required=["inputs"],
    )


def _input(feature: Feature, max_rows: int) -> dict[str, Any]:
    types = {"number": ["number", "boolean", "null"]}.get(
        feature.kind, ["string", "number", "boolean", "null"]
    )
    value = {"type": types}
    nested = {"type": "array", "prefixItems": [value], "items": False, "minItems": 1, "maxItems": 1}
    rows = {"type": "integer", "minimum": 1, "maximum": max_rows}
    return _object(
        {
            "name": {"const": feature.name},
            "datatype": {"enum": list(KINDS[feature.kind].datatypes)},
            "shape": {
                "type": "array",
                "description": "[N, 1] or [N], with the same N for all inputs",
                "prefixItems": [rows, {"const": 1}],
                "items": False,
                "minItems": 1,
                "maxItems": 2,
            },
            "data": {**_list({"anyOf": [value, nested]}), "maxItems": max_rows},
            "parameters": _ref("Parameters"),
        },
        required=["name", "datatype", "shape", "data"],
    )


def _answer(name: str, served: ServedModel) -> dict[str, Any]:
    outputs = []
    for output in served.outputs.values():
        types = {"BYTES": ["string"], "BOOL": ["boolean"]}.get(output.datatype, ["number", "null"])
        sizes = [{"const": size} if size >= 0 else {"type": "integer", "minimum": 1} for size in output.shape]
        outputs.append(
            _object(
                {
                    "name": {"const": output.name},
                    "datatype": {"const": output.datatype},
                    "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "items": False},
                    "data": _list({"type": types}),
                    "parameters": _ref("Parameters"),
                },
                required=["name", "datatype", "shape"],  # binary data follows the JSON
            )
        )
    return _object(
        {
            "model_name": {"const": name},
            "model_version": {"const": served.desired.version},
            "id": _TEXT,
            "parameters": _ref("Parameters"),
            "outputs": _list({"oneOf": outputs}),
        },
        required=["model_name", "model_version", "outputs"],
    )


def _index() -> dict[str, Any]:
    model = _object(
        {"name": _TEXT, "version": _TEXT, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": _TEXT},
        required=["name", "state", "reason"],
    )
    asked = {"type": "object", "properties": {"ready": {"type": ["boolean", "null"]}}}
    return {
        "summary": "The models of this server",
        "requestBody": {"required": False, "content": {"application/json": {"schema": asked}}},
        "responses": {"200": _response("The models", _list(model))}
        | {str(status): _refused(status) for status in (400, 408, 413, 431, 503)},
    }


def _statistics() -> dict[str, Any]:
    part = _object({"count": _COUNT, "ns": _COUNT})
    model = {
        "name": _TEXT,
        "version": _TEXT,
        "inference_count": _COUNT,
        "execution_count": _COUNT,
        "inference_stats": {"type": "object", "additionalProperties": part},
        "batch_stats": _list({}),
    }
    return _object({"model_stats": _list(_object(model))})


def _get(
    summary: str, schema: dict[str, Any], *statuses: int, content_type: str = "application/json"
) -> dict[str, Any]:
    """A path to read; further statuses come with the same schema."""
    answered = {
        str(status): _response(summary if status == 200 else "It is not", schema, content_type)
        for status in (200, *statuses)
    }
    return {"summary": summary, "responses": answered | {str(s): _refused(s) for s in (408, 413, 431)}}


_REFUSED = {
    400: "The request is wrong",
    404: "There is no such model or version in service",
    408: "The request did not arrive in time",
    413: "The request is too large",
    415: "The body is compressed in a way that is not known",
    422: "The model fails on these rows",
    431: "The head of the request is too large",
    503: "Nothing is in service, or too many requests are in flight",
}


def _refused(status: int) -> dict[str, Any]:
    return _response(_REFUSED[status], _ref("Error"))


def _response(
    description: str, schema: dict[str, Any], content_type: str = "application/json"
) -> dict[str, Any]:
    return {"description": description, "content": {content_type: {"schema": schema}}}


def _object(properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _like(value: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an answer that is always the same."""
    return {"type": "object", "const": dict(value)}


# -- the page ----------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Models of this server</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ background: #f2f2f2; color: #111; padding: 0.8rem; overflow-x: auto; }}
td, th {{ text-align: left; padding-right: 1.5rem; }}
</style>
</head>
<body>
<h1>Models of this server</h1>
<p>They are asked by the <a href="https://github.com/kserve/open-inference-protocol">Open Inference Protocol</a>, version 2.
<a href="/v2/openapi.json">OpenAPI description</a>, <a href="/metrics">metrics</a>.</p>
{models}
</body>
</html>
"""

_MODEL = """<h2>{name}</h2>
<p>Version {version}. Each example asks for one made-up row; a missing value is <code>null</code>.</p>
<h3>curl</h3>
<pre data-model="{name}" data-language="bash">{curl}</pre>
<h3>Python</h3>
<pre data-model="{name}" data-language="python">{python}</pre>
<table><thead><tr><th>input</th><th>datatypes</th></tr></thead><tbody>
{inputs}
</tbody></table>
<table><thead><tr><th>output</th><th>datatype</th><th>shape</th></tr></thead><tbody>
{outputs}
</tbody></table>
"""


def page(models: Mapping[str, ServedModel | None], url: str) -> str:
    """A page in HTML with an example call of each model; it needs nothing from elsewhere.

    :param models: by endpoint; None: nothing is in service.
    :param url: of the server.
    """
    parts = []
    for name, served in models.items():
        if served is None:
            parts.append(f"<h2>{html.escape(name)}</h2>\n<p>No version is in service yet.</p>\n")
            continue
        infer = f"{url}/v2/models/{name}/infer"
        request = example_request(served)
        inputs = [[f.name, ", ".join(KINDS[f.kind].datatypes)] for f in served.card.features]
        outputs = [[o.name, o.datatype, str(o.shape)] for o in served.outputs.values()]
        parts.append(
            _MODEL.format(
                name=html.escape(name),
                version=html.escape(served.desired.version),
                curl=html.escape(_curl(infer, request)),
                python=html.escape(_python(infer, request)),
                inputs=_rows(inputs),
                outputs=_rows(outputs),
            )
        )
    return _PAGE.format(models="".join(parts))


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _curl(url: str, request: Mapping[str, Any]) -> str:
    inputs = ",\n".join(f"  {json.dumps(tensor, ensure_ascii=False)}" for tensor in request["inputs"])
    body = f'{{"inputs": [\n{inputs}\n]}}'
    return f"curl -sS {shlex.quote(url)} -H 'Content-Type: application/json' --data-raw {shlex.quote(body)}"


def _python(url: str, request: Mapping[str, Any]) -> str:
    inputs = "\n".join(f"    {tensor!r}," for tensor in request["inputs"])
    return f"""import json
import urllib.request

inputs = [
{inputs}
]
request = urllib.request.Request(
    {url!r},
    json.dumps({{"inputs": inputs}}).encode(),
    {{"Content-Type": "application/json"}},
)
with urllib.request.urlopen(request) as answer:
    print(json.load(answer))"""
