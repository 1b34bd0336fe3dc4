from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lepton_airflow.contract import (
    MAX_RECEIPT_BYTES,
    PROTOCOL,
    Artifact,
    Receipt,
    Request,
    RunIdentity,
    Window,
    canonical_json,
    digest_of,
    pin,
    run_key,
    split_pin,
)
from lepton_airflow.errors import ContractError

DIGEST = "0123456789abcdef" * 4
REQUEST = Request(
    stage="TrainModel",
    parameters={"folds": 5, "name": "grün", "none": None},
    store="s3://bucket/räume",
    identity=RunIdentity(dag_id="d", run_id="manual__1", map_index=3),
    window=Window("2013-01-01T00:00:00+00:00", "2013-02-01T00:00:00+00:00"),
    connections=("db", "mlflow"),
)
RECEIPT = Receipt(
    stage="TrainModel",
    run_key=REQUEST.run_key,
    cache_key=None,
    status="done",
    summary="grün",
    artifacts={"model": Artifact(pin("s3://b/model", DIGEST), DIGEST, 12)},
    values={"best": {"depth": 3}},
    metrics={"auc": 0.75, "undefined": None},
)


def test_both_travel_as_json_and_come_back_equal() -> None:
    assert Request.from_json(REQUEST.to_json()) == REQUEST
    assert Receipt.from_json(RECEIPT.to_json().encode()) == RECEIPT
    assert json.loads(RECEIPT.to_json()) == RECEIPT.to_dict()


@pytest.mark.parametrize("text", [REQUEST.to_json(), RECEIPT.to_json()])
def test_newer_protocol_is_refused_by_name(text: str) -> None:
    newer = json.dumps(json.loads(text) | {"protocol": PROTOCOL + 1, "something": "new"})
    kind = Request if "parameters" in newer else Receipt
    with pytest.raises(
        ContractError, match=f"speaks protocol {PROTOCOL + 1}, this .* knows up to {PROTOCOL}: upgrade"
    ):
        kind.from_json(newer)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"protocol": None}, "protocol None, expected a whole number"),
        ({"protocol": True}, "protocol True, expected a whole number"),
        ({"colour": "red"}, "unknown fields colour; known: .*stage"),
        ({"cache": "always"}, "cache='always' is not one of"),
        ({"parameters": ["folds"]}, r"parameters=\['folds'\] has the wrong type, list"),
        ({"stage": 7}, "stage=7 has the wrong type, int"),
        ({"identity": "me"}, "identity='me' has the wrong type, str"),
        ({"connections": "db"}, "connections='db' has the wrong type, str"),
        ({"window": {"start": "2013"}}, "misshapen: .*'end'"),
    ],
)
def test_misshapen_request_is_a_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ContractError, match=sentence):
        Request.from_json(json.dumps(json.loads(REQUEST.to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff\xfe", "[" * 100_000])
def test_no_request_at_all_is_a_sentence(text: str | bytes) -> None:
    with pytest.raises(ContractError, match=r"the request (is|has) "):
        Request.from_json(text)


def test_missing_field_is_named() -> None:
    with pytest.raises(ContractError, match="'store'"):
        Request.from_json('{"protocol": 1, "stage": "TrainModel", "parameters": {}}')


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"bytes", object, "\ud800"])
def test_what_is_no_json_is_refused_where_it_is_written(value: object) -> None:
    with pytest.raises(ContractError, match="request of TrainModel"):
        replace(REQUEST, parameters={"x": value}).to_json()
    with pytest.raises(ContractError, match="receipt of TrainModel"):
        replace(RECEIPT, values={"x": value}).to_json()
    with pytest.raises(ContractError, match="cannot travel as JSON"):
        canonical_json(value)


def test_receipt_names_what_makes_it_too_large() -> None:
    fits = replace(RECEIPT, values={"x": "." * (MAX_RECEIPT_BYTES - len(RECEIPT.to_json()) - 100)})
    assert len(fits.to_json()) < MAX_RECEIPT_BYTES
    with pytest.raises(
        ContractError,
        match=f"the limit is {MAX_RECEIPT_BYTES} .'values' alone has .* save bulk as an artifact",
    ):
        replace(RECEIPT, values={"x": "." * MAX_RECEIPT_BYTES}).to_json()


@pytest.mark.parametrize("values", [{"return_value": 1}, {"model": "twice"}])
def test_each_output_has_a_name_of_its_own(values: dict[str, object]) -> None:
    with pytest.raises(ContractError, match=f"{next(iter(values))} names both"):
        replace(RECEIPT, values=values).to_json()


def test_receipt_with_a_misshapen_artifact_is_refused() -> None:
    text = json.dumps(RECEIPT.to_dict() | {"artifacts": {"model": {"uri": "x"}}})
    with pytest.raises(ContractError, match="an artifact is not"):
        Receipt.from_json(text)


@pytest.mark.parametrize(
    "uri",
    ["s3://b/k", "file:///tmp/a b/ü", "https://user@host/x", "mail@sha256:abc", f"x@sha256:{DIGEST[:-1]}G"],
)
def test_only_a_whole_digest_at_the_end_is_a_pin(uri: str) -> None:
    assert split_pin(uri) == (uri, None)
    assert split_pin(pin(uri, DIGEST)) == (uri, DIGEST)
    assert split_pin(pin(uri, DIGEST) + "/") == (pin(uri, DIGEST) + "/", None)


def test_digest_does_not_depend_on_order_but_on_everything_else() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert (
        len(
            {
                digest_of(v)
                for v in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"a": True}, [1], ["a", 1])
            }
        )
        == 7
    )


def test_run_key_names_the_task_instance_and_not_its_try() -> None:
    identity = REQUEST.identity
    key = REQUEST.run_key
    assert key == replace(REQUEST, identity=replace(identity, try_number=9)).run_key
    others = [{"deployment": "x"}, {"dag_id": "x"}, {"task_id": "x"}, {"run_id": "x"}, {"map_index": 4}]
    assert len({key, *(replace(REQUEST, identity=replace(identity, **o)).run_key for o in others)}) == 6
    assert key == run_key(deployment="local", dag_id="d", task_id="local", run_id="manual__1", map_index=3)
