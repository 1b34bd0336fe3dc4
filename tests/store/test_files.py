from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lepton_airflow.connections import Connection, connections_from_json
from lepton_airflow.contract import Artifact, split_pin
from lepton_airflow.errors import BadConfiguration, BadInput, ContractError, IntegrityError, StoreError
from lepton_airflow.store import Store
from lepton_airflow.store.files import digest_path
from lepton_airflow.testing.local_s3 import LocalS3

KEY, SECRET = "lepton-key", "lepton-secret"


@pytest.fixture(params=["file", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(str(tmp_path / "störe with space"))
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}")
    return Store(*request.getfixturevalue("bucket"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    (folder / "sub" / "größe 1.bin").write_bytes(bytes(range(256)))
    return folder


# -- artifacts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.parquet", "räume und größe.txt", "a@b", "100%.csv"])
def test_a_file_comes_back_under_any_name(store: Store, tmp_path: Path, name: str) -> None:
    artifact = store.put(name, "hello")
    assert artifact.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert artifact.bytes == 5
    assert artifact.uri.endswith(f"/{name}@sha256:{artifact.sha256}")
    fetched = store.fetch(artifact.uri, tmp_path / "work")
    assert (fetched.name, fetched.read_text()) == (name, "hello")
    assert store.put(name, b"hello") == artifact
    assert store.intact(artifact)
    assert store.present(artifact)


def test_a_directory_comes_back_whole(store: Store, tree: Path, tmp_path: Path) -> None:
    artifact = store.put("model", tree)
    assert (artifact.sha256, artifact.bytes) == digest_path(tree) == (store.digest(artifact.uri), 258)
    fetched = store.fetch(artifact.uri, tmp_path / "work")
    assert (fetched / "sub" / "größe 1.bin").read_bytes() == bytes(range(256))
    assert sorted(p.name for p in fetched.rglob("*")) == ["größe 1.bin", "model.json", "sub"]
    assert store.put("model", tree) == artifact
    assert store.present(artifact)


def test_a_directorys_digest_counts_names_and_contents_and_no_order(tree: Path, tmp_path: Path) -> None:
    first, _ = digest_path(tree)
    (tree / "sub" / "größe 1.bin").rename(tree / "größe 1.bin")
    moved, _ = digest_path(tree)
    (tree / "größe 1.bin").write_bytes(b"")
    changed, _ = digest_path(tree)
    assert len({first, moved, changed}) == 3


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs"])
def test_a_name_is_one_path_segment(store: Store, name: str) -> None:
    with pytest.raises(BadConfiguration, match="is not a name for an artifact"):
        store.put(name, b"x")


def test_one_altered_byte_is_found_and_the_next_run_heals_it(
    store: Store, tree: Path, tmp_path: Path
) -> None:
    for artifact in (store.put("model", tree), store.put("text", b"hello")):
        key = split_pin(artifact.uri)[0].removeprefix(store.root + "/")
        inner = f"{key}/model.json" if artifact.uri.count("model@") else key
        before = store.read(inner) or b""
        store.write(inner, bytes([before[0] ^ 1]) + before[1:])
        assert store.present(artifact)  # of the same size: only the digest tells
        assert not store.intact(artifact)
        with pytest.raises(
            IntegrityError, match=r"pinned to .*: it was altered or is damaged\. Clear the task"
        ):
            store.fetch(artifact.uri, tmp_path / f"work-{artifact.bytes}")
        assert store.put(key.rpartition("/")[2], tree if inner != key else b"hello") == artifact
        assert store.intact(artifact)


def test_a_pinned_artifact_is_read_into_memory_once_and_verified(store: Store, tree: Path) -> None:
    folder, file = store.put("model", tree), store.put("one.json", "{}")
    assert store.load(file.uri) == {"": b"{}"}
    assert store.load(folder.uri) == {"model.json": b"{}", "sub/größe 1.bin": bytes(range(256))}
    path = f"artifacts/{folder.sha256[:32]}/model"
    store.write(f"{path}/model.json", b"{ }")
    with pytest.raises(IntegrityError, match="altered or is damaged"):
        store.load(folder.uri)
    store.write(f"{path}/model.json", b"{}")
    store.write(f"{path}/more", b"x")
    with pytest.raises(IntegrityError, match="altered or is damaged"):
        store.load(folder.uri)
    with pytest.raises(IntegrityError, match="names no digest"):
        store.load(split_pin(file.uri)[0])
    store.delete(f"artifacts/{file.sha256[:32]}")
    with pytest.raises(BadInput, match="does not exist"):
        store.load(file.uri)


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path, tree: Path) -> None:
    store = Store(str(tmp_path / "store"))
    artifact, file = store.put("model", tree), store.put("rows", "1")
    for path in (
        "records/one.json",
        *(split_pin(a.uri)[0].removeprefix(f"{store.root}/") for a in (artifact, file)),
    ):
        place = tmp_path / "store" / path
        if place.is_dir():
            place /= "model.json"
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place)
    for read in (
        lambda: store.read("records/one.json"),
        lambda: store.load(artifact.uri),
        lambda: store.load(file.uri),
        lambda: store.digest(file.uri),
        lambda: store.fetch(file.uri, tmp_path / "work"),
    ):
        with pytest.raises(StoreError, match="regular file"):
            read()


def test_nothing_there_is_a_sentence(store: Store, tmp_path: Path) -> None:
    uri = store.uri("artifacts/none")
    with pytest.raises(BadInput, match="artifacts/none does not exist"):
        store.fetch(uri, tmp_path)
    with pytest.raises(BadInput, match="artifacts/none does not exist"):
        store.digest(uri)
    with pytest.raises(BadInput, match=r"~no-such-user/raw\.csv does not exist"):
        store.digest("~no-such-user/raw.csv")
    assert not store.intact(Artifact(uri, "0" * 64, 1))
    assert not store.present(Artifact(uri, "0" * 64, 1))


def test_plain_paths_and_uris_outside_the_store_can_be_read(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mein file.csv"
    file.write_text("a,b")
    for uri in (str(file), f"file://{file}"):
        assert store.fetch(uri, tmp_path / "work").read_text() == "a,b"
        assert store.digest(uri) == hashlib.sha256(b"a,b").hexdigest()


def test_a_store_nobody_knows_is_a_sentence() -> None:
    with pytest.raises(
        BadConfiguration, match=r"store 'nosuch://x' cannot be opened: .*Expected a path or an fsspec URI"
    ):
        Store("nosuch://x")


# -- records -------------------------------------------------------------------------------------------------------------


def test_records(store: Store) -> None:
    assert store.read("ledger/a.json") is None
    assert store.keys("ledger") == []
    store.write("ledger/b.json", b"1")
    store.write("ledger/a.json", b"1")
    store.write("ledger/a.json", b"2")
    assert store.keys("ledger") == ["ledger/a.json", "ledger/b.json"]
    assert store.read("ledger/a.json") == b"2"
    store.delete("ledger/a.json")
    store.delete("ledger/a.json")
    assert store.keys("ledger") == ["ledger/b.json"]


def test_children_and_listings(store: Store, tmp_path: Path) -> None:
    assert store.children("records/log") == []
    assert store.listing("records/log") == []
    before = time.time()
    for key in ("records/log/001/000001.json", "records/log/note", "records/other"):
        store.write(key, b"12345")
    assert store.children("records/log") == ["001/", "note"]
    files = {e.key: e for e in store.listing("records/log") if not e.key.endswith("/")}
    assert set(files) == {"records/log/001/000001.json", "records/log/note"}
    assert {e.bytes for e in files.values()} == {5}
    assert all(before - 2 < e.modified <= time.time() for e in files.values())
    assert {e.key for e in store.listing("records/log/note")} == {"records/log/note"}
    folders = {e.key for e in store.listing("records/log")} - set(files)
    on_disk = store.protocol == "file"
    assert folders == ({"records/log/", "records/log/001/"} if on_disk else set())
    assert all(bool(e.etag) is (store.protocol == "s3") for e in files.values())


def test_a_file_that_vanishes_while_a_listing_is_made_hides_no_other(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(10):
        store.write(f"records/{number}", b"1")
    (tmp_path / "records" / "5").unlink()
    (tmp_path / "records" / "5").symlink_to(
        tmp_path / "gone"
    )  # as if it went between being seen and being looked at
    assert {e.key for e in store.listing("records")} == {"records/"} | {
        f"records/{n}" for n in range(10) if n != 5
    }


def test_many_files_are_deleted_at_once(store: Store) -> None:
    for number in range(3):
        store.write(f"cache/{number}", b"1")
    store.delete_files([])
    store.delete_files(["cache/0", "cache/2", "cache/gone"])
    assert store.keys("cache") == ["cache/1"]


def test_a_small_record_costs_s3_one_request(s3: LocalS3, bucket: tuple[str, Connection]) -> None:
    store = Store(*bucket)
    store.write("record", b"1")
    assert s3.count(lambda: store.read("record")) == 1
    assert s3.count(lambda: store.read("no record")) == 1


def test_another_process_is_seen_at_once(bucket: tuple[str, Connection]) -> None:
    """A listing must not come from a cache of this process."""
    store = Store(*bucket)
    store.write("ledger/a", b"1")
    assert store.keys("ledger") == ["ledger/a"]
    write = (
        "import sys; from lepton_airflow.store import Store; from lepton_airflow.connections import Connection;"
        "Store(sys.argv[1], Connection('s3', 'aws', login=sys.argv[2], password=sys.argv[3],"
        " extra={'endpoint_url': sys.argv[4]})).write('ledger/b', b'2')"
    )
    subprocess.run(
        [sys.executable, "-c", write, bucket[0], KEY, SECRET, bucket[1].extra["endpoint_url"]], check=True
    )
    assert store.keys("ledger") == ["ledger/a", "ledger/b"]
    assert store.read("ledger/b") == b"2"


def test_a_reader_never_sees_half_a_record_or_artifact(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    texts = [bytes([65 + i]) * 2_000_000 for i in range(2)]
    store.write("record", texts[0])
    code = (
        "import sys; from lepton_airflow.store import Store; store = Store(sys.argv[1])\n"
        "for i in range(40):\n    store.write('record', bytes([65 + i % 2]) * 2_000_000)\n"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", code, store.root]) as writer:
        while writer.poll() is None:
            content = store.read("record")
            assert content in texts
            seen.add(content[:1])
    assert writer.returncode == 0
    assert seen == {b"A", b"B"}
    assert store.keys("") == ["record"]


def test_concurrent_writers_of_one_directory_leave_it_whole(tmp_path: Path, tree: Path) -> None:
    store = Store(str(tmp_path / "store"))
    wrong: list[object] = []

    def put() -> None:
        for _ in range(10):
            try:
                if not store.intact(store.put("model", tree)):
                    wrong.append("not intact")
            except Exception as error:  # noqa: BLE001 - the assertion below shows it
                wrong.append(error)

    threads = [threading.Thread(target=put) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list((tmp_path / "store").rglob(".tmp-*")) == []


# -- exactly one ---------------------------------------------------------------------------------------------------------


def _create(args: tuple[str, Connection | None, int]) -> bool:
    root, connection, number = args
    return Store(root, connection).create_exclusive("ledger/champion/7", f"writer {number}".encode() * 1000)


@pytest.mark.parametrize("place", ["file", "s3"])
def test_create_exclusive_has_one_winner_among_processes(
    request: pytest.FixtureRequest, tmp_path: Path, place: str
) -> None:
    root, connection = request.getfixturevalue("bucket") if place == "s3" else (str(tmp_path / "store"), None)
    with multiprocessing.get_context("spawn").Pool(6) as pool:
        won = pool.map(_create, [(root, connection, n) for n in range(24)], chunksize=1)
    assert won.count(True) == 1
    store = Store(root, connection)
    assert store.read("ledger/champion/7") == f"writer {won.index(True)}".encode() * 1000
    assert store.keys("") == ["ledger/champion/7"]


def test_create_exclusive_is_refused_where_nobody_can_promise_it(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    with pytest.raises(
        BadConfiguration, match=r"memory:// cannot create a key exactly once, .*use a local .* or s3://"
    ):
        store.create_exclusive("ledger/x", b"1")
    assert store.read("ledger/x") is None


# -- stores that fail ----------------------------------------------------------------------------------------------------


def _full(store: Store, call: Any, what: str) -> None:
    with pytest.raises(StoreError, match=f"{what}.*nothing that was there is changed"):
        call()
    assert store.keys("") == ["kept"]
    assert store.read("kept") == b"as it was"


@pytest.fixture
def small_disk(tmp_path: Path, require_root: None) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def require_root() -> None:
    """Mounting a file system is root's; a container may forbid it even to root."""
    if (
        os.geteuid() != 0
        or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("a full and a read-only disk need the right to mount one: run as root")


def test_a_full_store_is_a_sentence_and_loses_nothing(small_disk: Path, tree: Path) -> None:
    store = Store(str(small_disk))
    store.write("kept", b"as it was")
    big = b"x" * 3_000_000
    (tree / "big.bin").write_bytes(big)
    _full(store, lambda: store.write("kept", big), "writing kept failed: No space left")
    _full(store, lambda: store.put("big", big), "No space left")
    _full(store, lambda: store.put("tree", tree), "writing artifacts/.*/tree failed")
    _full(store, lambda: store.create_exclusive("ledger/x", big), "creating ledger/x failed: No space left")
    assert store.create_exclusive("ledger/x", b"small")


def test_a_read_only_store_is_a_sentence_and_loses_nothing(small_disk: Path, tree: Path) -> None:
    store = Store(str(small_disk))
    store.write("kept", b"as it was")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    _full(store, lambda: store.write("kept", b"new"), "writing kept failed: Read-only")
    _full(store, lambda: store.put("tree", tree), "Read-only")
    _full(store, lambda: store.create_exclusive("ledger/x", b""), "Read-only")
    _full(store, lambda: store.delete("kept"), "deleting kept failed: Read-only")


def test_an_s3_store_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "storage_options": {"config_kwargs": {"retries": {"max_attempts": 0}}},
    }
    store = Store("s3://bucket/x", Connection("s3", "aws", login=KEY, password=SECRET, extra=options))
    for call in (lambda: store.read("a"), lambda: store.write("a", b"1"), lambda: store.keys("a")):
        with pytest.raises(StoreError, match=r"store s3://bucket/x: .* failed") as caught:
            call()
        assert SECRET not in str(caught.value)


def test_without_credentials_s3_says_where_to_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    store = Store("s3://bucket/x", Connection("s3", "aws", extra={"endpoint_url": "http://127.0.0.1:9"}))
    with pytest.raises(StoreError, match=r"Name a Connection that has them \(store_conn_id for the store"):
        store.write("a", b"1")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_who_creates_a_key_is_told_so_though_answers_are_lost(
    s3: LocalS3, bucket: tuple[str, Connection], lost: int
) -> None:
    """The client repeats a PUT whose answer did not come, and S3 says that the key is taken."""
    store = Store(*bucket)
    s3.lose_answers = lost
    try:
        assert store.create_exclusive("claims/1", b"same words") is True
    finally:
        s3.lose_answers = 0
    assert (
        Store(*bucket).create_exclusive("claims/1", b"same words") is False
    )  # another writer, the same content


def test_a_missing_bucket_is_a_sentence(s3: LocalS3) -> None:
    store = Store("s3://no-such-bucket/x", s3.connection)
    with pytest.raises(StoreError, match=r"writing a failed: .*bucket does not exist"):
        store.write("a", b"1")


# -- Connections ---------------------------------------------------------------------------------------------------------


def test_what_another_worker_may_have_made_is_missed_with_advice(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with pytest.raises(BadInput, match=r"does not exist; .* need \[lepton\] store to be one that all reach"):
        store.fetch(store.uri("artifacts/0/x"), tmp_path)
    with pytest.raises(BadInput, match=r"Run what makes it again\.$"):
        store.fetch(str(tmp_path / "elsewhere"), tmp_path)


def test_a_connection_of_the_amazon_provider_opens_a_store() -> None:
    extra = {
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "aws_session_token": "short-lived",
        "region_name": "eu-central-1",
    }
    fs = Store("s3://bucket/x", Connection("s3", "aws", extra=extra)).fs
    assert (fs.key, fs.secret, fs.token) == (KEY, SECRET, "short-lived")
    assert fs.client_kwargs == {"region_name": "eu-central-1"}
    assert fs.config_kwargs == {"connect_timeout": 15, "max_pool_connections": 16}


def test_how_s3_is_waited_for_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"config_kwargs": {"connect_timeout": 3, "read_timeout": 7}}
    told = Connection("s3", "aws", extra={"storage_options": options})
    ours = {"connect_timeout": 15, "max_pool_connections": 16}
    assert Store("s3://bucket/x", told).fs.config_kwargs == ours | options["config_kwargs"]
    machine = {"config_kwargs": {"read_timeout": 9, "signature_version": "s3v4"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", machine)
    assert Store("s3://bucket/y").fs.config_kwargs == ours | machine["config_kwargs"]
    assert (
        Store("s3://bucket/y", told).fs.config_kwargs
        == ours | machine["config_kwargs"] | options["config_kwargs"]
    )


def test_connections_show_no_secret() -> None:
    connection = Connection("s3", "aws", login=KEY, password=SECRET, extra={"token": SECRET})
    assert SECRET not in repr(connection)
    assert SECRET not in repr(Store("memory://x", connection))


@pytest.mark.parametrize(
    "text", ["{", '[{"type": "x"}]', '[{"id": "a", "type": "b", "pasword": "hunter22"}]', "[7]"]
)
def test_connections_that_are_none_are_a_sentence_without_secrets(text: str) -> None:
    with pytest.raises(ContractError, match="the Connections are no JSON list") as caught:
        connections_from_json(text)
    assert "hunter22" not in str(caught.value)
    assert connections_from_json("") == {}
