"""What a Connection says of AWS, and which settings and texts hold a secret."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_airflow.connections import AwsAccess, Connection, hide_logins, is_secret
from lepton_airflow.data.sources.lakes import Delta, Iceberg
from lepton_airflow.data.sources.spec import Source
from lepton_airflow.stages import RunInfo
from lepton_airflow.store.files import _storage_options

KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "hunter2"}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, AwsAccess()),
        ({"login": "key", "password": "hunter2"}, AwsAccess("key", "hunter2")),
        ({"extra": KEYS}, AwsAccess("key", "hunter2")),
        ({"login": "nearer", "password": "nearest", "extra": KEYS}, AwsAccess("nearer", "nearest")),
        ({"host": "http://minio:9000"}, AwsAccess(endpoint_url="http://minio:9000")),
        (
            {"host": "http://old:9000", "extra": {"endpoint_url": "http://minio:9000", "region_name": "eu-west-1"}},
            AwsAccess(region="eu-west-1", endpoint_url="http://minio:9000"),
        ),
        ({"extra": KEYS | {"aws_session_token": "t"}}, AwsAccess("key", "hunter2", "t")),
        ({"login": "", "extra": {"region_name": None, "aws_access_key_id": 7}}, AwsAccess("7")),
    ],
)  # fmt: skip
def test_aws_is_read_from_where_the_amazon_provider_keeps_it(
    fields: dict[str, Any], wanted: AwsAccess
) -> None:
    found = AwsAccess.of(Connection("lake", "aws", **fields))
    assert found == wanted
    assert "hunter2" not in repr(found)


def test_s3fs_delta_and_iceberg_open_with_the_same_connection(tmp_path: Path) -> None:
    extra = {"aws_session_token": "t", "endpoint_url": "http://minio:9000", "region_name": "eu-west-1"}
    connection = Connection("lake", "aws", login="key", password="hunter2", extra=extra)
    s3fs = _storage_options("s3", connection)
    assert {k: s3fs[k] for k in ("key", "secret", "token", "endpoint_url", "client_kwargs")} == {
        "key": "key",
        "secret": "hunter2",
        "token": "t",
        "endpoint_url": "http://minio:9000",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    assert "key" not in _storage_options("gs", connection)

    lake: Any = SimpleNamespace(connection=connection, run=RunInfo.local(tmp_path))
    assert Delta._options(lake, "s3://lake/orders") == {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_SESSION_TOKEN": "t",
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_ALLOW_HTTP": "true",
    }
    assert Delta._options(lake, "abfss://lake@account/orders") == {}

    lake.source = Source("orders", catalog={"type": "glue", "client.region": "us-east-1"})
    assert Iceberg._properties(lake) == {
        "type": "glue",
        "client.access-key-id": "key",
        "client.secret-access-key": "hunter2",
        "client.session-token": "t",
        "client.region": "us-east-1",  # what the source states comes before what the Connection says
        "s3.endpoint": "http://minio:9000",
    }
    lake.connection = Connection(
        "lake", "generic", login="key", extra={"iceberg": {"token": "of the catalog"}}
    )
    assert Iceberg._properties(lake) == {**lake.source.catalog, "token": "of the catalog"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no match at postgresql://me:hunter2@db/lake", "no match at postgresql://***@db/lake"),
        ("git+https://ghp_token@github.com/us/our.git", "git+https://***@github.com/us/our.git"),
        ("https://a:b@one and ftp://c@two", "https://***@one and ftp://***@two"),
        ("s3://bucket/me@example.org", "s3://bucket/me@example.org"),
        ("abfss://container@account.dfs.core.windows.net", "abfss://container@account.dfs.core.windows.net"),
        ("me@example.org wrote", "me@example.org wrote"),
    ],
)
def test_logins_in_urls_are_hidden(text: str, wanted: str) -> None:
    assert hide_logins(text) == wanted


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("password", "x", True),
        ("s3.secret-access-key", "x", True),
        ("client.access-key-id", "x", True),
        ("adls.connection-string", "x", True),
        ("header.Authorization", "Bearer x", True),
        ("uri", "postgresql://me:x@db", True),
        ("auth", {"type": "basic", "basic": {"username": "me", "password": "x"}}, True),
        ("auth", {"type": "google"}, False),
        ("uri", "postgresql://me@db", False),
        ("oauth2-server-uri", "https://login.example.org", False),
        ("rest.authorization-url", "https://login.example.org", False),
        ("warehouse", "s3://lake", False),
    ],
)
def test_a_setting_that_a_dag_must_not_hold_is_known(name: str, value: Any, wanted: bool) -> None:
    assert is_secret(name, value) is wanted
