"""Eviction: what goes, what stays, and what it costs; on a disk and on S3."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.__main__ import main
from lepton_airflow.connections import Connection
from lepton_airflow.contract import Artifact, Receipt, split_pin
from lepton_airflow.errors import BadConfiguration, IntegrityError, StoreError
from lepton_airflow.store import Store, cache, eviction
from lepton_airflow.store.eviction import evict, names_in
from lepton_airflow.store.files import now
from lepton_airflow.store.records import Log
from lepton_airflow.testing import until
from lepton_airflow.testing.local_s3 import LocalS3

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Verdict:
    """A kind of record that eviction has never heard of."""

    sequence: int
    evidence: str


def receipt(number: int, stage: str = "Shout", **artifacts: Artifact) -> Receipt:
    return Receipt(
        stage=stage,
        run_key=f"{number:024x}",
        cache_key=f"{number:040x}" + "0" * 24,
        status="done",
        summary="",
        artifacts=artifacts,
        created=now(),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def age(store: Store, *prefixes: str, seconds: float = 2 * 3600.0) -> None:
    """Make all that lies there that old."""
    then = time.time() - seconds
    for prefix in prefixes or ("artifacts", "receipts", "cache", "checkpoints", "records"):
        top = Path(store.root.removeprefix("file://"), prefix)
        for path in (top, *top.rglob("*")):
            if path.exists():
                os.utime(path, (then, then))


def folder(store: Store, artifact: Artifact) -> Path:
    return Path(store.root.removeprefix("file://"), "artifacts", artifact.sha256[:32])


# -- what stays ----------------------------------------------------------------------------------------------------------


def test_what_nothing_names_goes_after_an_hour(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made = {name: store.put("text", name) for name in ("entry", "receipt", "record", "nobody")}
    cache.record(store, receipt(1, one=made["entry"]))
    store.record(receipt(2, one=made["receipt"]))
    assert Log(store, "verdicts/x", Verdict).append(Verdict(1, made["record"].uri))
    assert evict(store, older_than_s=7 * DAY_S) == (0, 0)
    age(store, "artifacts")
    arguments = ["cache", "evict", "--store", store.root]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "0 entries and 6 bytes removed\n"
    assert {name for name, artifact in made.items() if store.intact(artifact)} == {
        "entry",
        "receipt",
        "record",
    }
    assert main([*arguments, "--older-than-s", "0"]) == 0
    assert capsys.readouterr().out == "1 entries and 5 bytes removed\n"  # the receipt is not an hour old
    assert {name for name, artifact in made.items() if store.intact(artifact)} == {"receipt", "record"}


def test_an_entry_that_is_recorded_again_keeps_what_it_names(store: Store) -> None:
    made = store.put("text", "hello")
    cache.record(store, receipt(1, one=made))
    age(store)
    cache.record(store, receipt(1, one=made))
    assert evict(store, older_than_s=3600) == (0, 0)
    assert store.intact(made)


def test_records_of_an_unknown_kind_keep_their_artifacts_in_a_process_that_knows_no_kind(
    store: Store,
) -> None:
    """Eviction from a cron job: a new interpreter that imports eviction alone."""
    evidence, other = store.put("evidence.json", "{}"), store.put("other", "x")
    assert Log(store, "experiments/colours", Verdict).append(Verdict(1, evidence.uri))
    store.write("records/notes/free.txt", f"see {split_pin(evidence.uri)[0]}".encode())
    age(store)
    code = (
        "import sys\nfrom lepton_airflow.store import Store\nfrom lepton_airflow.store.eviction import evict\n"
        "print(evict(Store(sys.argv[1]), older_than_s=0))\n"
        "print([m for m in sys.modules if m.startswith(('lepton_airflow.registry', 'lepton_airflow.delivery'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.root], check=True, capture_output=True, text=True
    )
    assert done.stdout == "(0, 1)\n[]\n"
    assert store.intact(evidence)
    assert not store.present(other)


def test_a_recent_run_keeps_what_it_made_without_the_cache(store: Store) -> None:
    made = store.put("text", "hello")
    store.record(receipt(1, one=made))
    age(store, seconds=DAY_S)  # the task after it waits for a worker since yesterday
    evict(store, older_than_s=7 * DAY_S)
    assert store.intact(made)
    evict(store, older_than_s=0)
    assert not store.present(made)


def test_a_task_that_just_took_a_result_from_the_cache_keeps_it(store: Store) -> None:
    made = store.put("text", "hello")
    cache.record(store, receipt(1, one=made))
    age(store)
    hit, _ = cache.lookup(store, "Shout", receipt(1).cache_key or "")
    assert hit is not None
    store.record(hit)  # the task after it is about to read the artifact
    assert evict(store, older_than_s=0)[0] == 1
    assert store.intact(made)


def test_a_folder_that_a_writer_just_made_stays(store: Store) -> None:
    made = Path(store.root.removeprefix("file://"), "artifacts", "0" * 32)
    made.mkdir(parents=True)
    evict(store, older_than_s=0)
    assert made.exists()
    age(store)
    evict(store, older_than_s=0)
    assert not made.exists()


def test_what_is_written_again_after_it_was_listed_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the removal, a run makes the same artifacts and leaves a receipt."""
    blob, tree = store.put("text", "hello"), store.root.removeprefix("file://")
    source = Path(tree).parent / "model"
    source.mkdir()
    (source / "a").write_text("a")
    os.utime(source / "a", (1.0, 1.0))  # copied with the file: only the folder tells when it was written
    directory = store.put("model", source)
    store.record(receipt(1, one=blob))
    age(store)
    remove = eviction._remove

    def writes_first(store: Store, keys: list[str], before: float) -> dict[str, int]:
        if keys and keys[0].startswith("artifacts/"):
            store.put("text", "hello")
            store.put("model", source)
        else:
            store.record(receipt(1, one=blob))
        return remove(store, keys, before)

    monkeypatch.setattr(eviction, "_remove", writes_first)
    assert evict(store, older_than_s=0) == (0, 0)
    assert store.intact(blob)
    assert store.intact(directory)
    assert store.receipt(f"{1:024x}") is not None


@pytest.mark.parametrize("what", ["file", "tree"])
def test_what_is_put_again_while_it_is_removed_is_there_afterwards(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The put comes between the last look at the artifact, which found it old, and its removal."""
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("hello")
    content = tree if what == "tree" else "hello"
    made = store.put("x", content)
    age(store)
    writer = threading.Thread(target=store.put, args=("x", content))
    listing, x = store.listing, folder(store, made) / "x"

    def found_old(prefix: str) -> Any:
        found = listing(prefix)
        if prefix == f"artifacts/{made.sha256[:32]}":
            writer.start()
            until(lambda: time.time() - x.stat().st_mtime < 3600, "the writer to write")
        return found

    monkeypatch.setattr(store, "listing", found_old)
    _, freed = evict(store, older_than_s=0)
    assert freed == 5  # it was removed all the same
    writer.join(20)
    assert store.intact(made)
    assert store.keys("sweeping") == []


def test_a_folder_that_goes_while_it_is_written_is_written_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "ab":
        (tree / name).write_text(name)
    copy, taken = shutil.copy2, []

    def copy_and_take(source: str, target: str, **options: Any) -> Any:
        done = copy(source, target, **options)
        if not taken:
            taken.append(shutil.rmtree(Path(target).parents[1]))
        return done

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, copy_and_take, False, False))
    assert store.intact(store.put("tree", tree))
    assert taken


def test_puts_beside_evictions_never_fail_and_are_never_lost(store: Store) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []

    def sweep() -> None:
        while not stop.is_set():
            try:
                evict(store, older_than_s=0)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                failed.append(error)

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for _ in range(150):
            made = store.put("x", "hello")
            assert store.intact(made)
            with suppress(FileNotFoundError):  # it may go as soon as it is old
                age(store)
    finally:
        stop.set()
        for sweeper in sweepers:
            sweeper.join()
    assert failed == []


def test_a_mark_that_a_killed_eviction_left_holds_nobody_up_for_long(store: Store) -> None:
    made = store.put("x", "hello")
    mark = f"sweeping/artifacts-{made.sha256[:32]}"
    store.write(mark, b"")
    age(store, "sweeping", seconds=60)
    store.put("x", "hello")
    age(store)
    assert evict(store, older_than_s=0) == (0, 0)  # as far as this one can tell, another is at it
    age(store, "sweeping")
    assert evict(store, older_than_s=0) == (0, 5)
    assert store.keys("sweeping") == []


# -- what runs have left -------------------------------------------------------------------------------------------------


def test_old_receipts_and_given_up_checkpoints_go(store: Store) -> None:
    old, other, young = receipt(1), receipt(2, "Announce"), receipt(3)
    for made in (old, other, young):
        store.record(made)
        store.write(f"checkpoints/{made.run_key}/fit/step.pt", b"12345")

    def left() -> tuple[int, int]:
        return len(store.keys("receipts")), len(store.keys("checkpoints"))

    evict(store, older_than_s=0)
    assert left() == (3, 3)  # none is an hour old
    for made in (old, other):
        age(store, f"receipts/{made.run_key}.json", f"checkpoints/{made.run_key}")
    evict(store, older_than_s=7201)
    assert left() == (3, 3)
    store.write(f"checkpoints/{other.run_key}/fit/step.pt", b"67890")  # its next try goes on
    evict(store, older_than_s=7000, stage="Nothing")
    assert left() == (3, 3)
    _, freed = evict(store, older_than_s=7000, stage="Shout")
    assert freed == len(old.to_json()) + 5
    assert store.receipt(old.run_key) is None
    evict(store, older_than_s=7000)
    assert store.keys("receipts") == [f"receipts/{young.run_key}.json"]
    assert store.keys("checkpoints") == [f"checkpoints/{made.run_key}/fit/step.pt" for made in (other, young)]


def test_of_one_stage_only_its_entries_go(store: Store) -> None:
    for number, stage in enumerate(("Shout", "Whisper"), 1):
        cache.record(store, receipt(number, stage, one=store.put("text", stage)))
    age(store)
    assert evict(store, older_than_s=0, stage="Whisper") == (1, 7)
    assert [key.split("/")[1] for key in store.keys("cache")] == ["Shout"]


@pytest.mark.parametrize("named", [True, False])
def test_what_a_killed_writer_left_half_written_goes_after_an_hour(store: Store, named: bool) -> None:
    kept = store.put("model.bin", "kept")
    log = Log(store, "verdicts/x", Verdict)
    assert log.append(Verdict(1, kept.uri if named else "nothing"))
    store.record(receipt(1))
    cache.record(store, receipt(1))
    root = Path(store.root.removeprefix("file://"))
    for name in ("studies", "leases/register/x", f"checkpoints/{2:024x}/fit"):
        (root / name).mkdir(parents=True)
    half = [
        *(root / "studies" / f".tmp-{'5' * 16}", root / "leases/register/x" / f".tmp-{'6' * 16}"),
        root / f"checkpoints/{2:024x}/fit" / f".tmp-{'7' * 16}",
        *(folder(store, kept) / f".tmp-{'0' * 16}", root / "receipts" / f".tmp-{'1' * 16}"),
        *(
            root / "cache" / "Shout" / f".tmp-{'2' * 16}",
            root / "records/verdicts/x/000" / f".tmp-{'3' * 16}",
        ),
    ]
    for path in half:
        path.write_bytes(b"1234567890")
    tree = folder(store, kept) / f".tmp-{'4' * 16}" / "sub"
    tree.mkdir(parents=True)
    (tree / "half").write_bytes(b"1234567890")
    evict(store, older_than_s=0)
    assert all(path.exists() for path in (*half, tree))  # their writers may be at work
    age(store)
    age(store, "studies", "leases")
    os.utime(tree / "half")  # and this one is
    _, freed = evict(store, older_than_s=7 * DAY_S)
    assert not any(path.exists() for path in half)
    assert (tree / "half").exists()
    assert store.present(kept)  # where somebody writes, everything stays
    assert freed == 70
    age(store)
    evict(store, older_than_s=7 * DAY_S)
    assert not tree.parent.exists()
    assert store.present(kept) is named
    assert log.newest() is not None
    assert store.receipt(f"{1:024x}") is not None


def test_a_model_may_hold_a_file_that_is_called_like_a_temporary_one(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / f".tmp-{'0' * 16}").write_text("a user's own")
    made = store.put("model", source)
    assert Log(store, "verdicts/x", Verdict).append(Verdict(1, made.uri))
    age(store)
    evict(store, older_than_s=0)
    assert store.intact(made)


def test_a_store_from_before_the_first_release_is_not_swept(store: Store) -> None:
    made = store.put("model", "x")
    store.write("registrations/late/key/000001.json", made.uri.encode())
    age(store)
    with pytest.raises(BadConfiguration, match=r"holds records in registrations/"):
        evict(store, older_than_s=0)
    assert store.intact(made)


@pytest.mark.parametrize("damage", [b"", b'{"sequence": 1, "evid', b"\xff\x00", b"[" * 100_000])
def test_a_damaged_record_keeps_all_artifacts(store: Store, damage: bytes) -> None:
    kept, nobodys = store.put("text", "kept"), store.put("text", "nobody's")
    log = Log(store, "verdicts/late", Verdict)
    assert log.append(Verdict(1, kept.uri))
    (record,) = [key for key in store.keys("records") if key.endswith("000001.json")]
    Path(store.root.removeprefix("file://"), record).write_bytes(damage)
    age(store)
    with pytest.raises(IntegrityError, match=r"000001\.json is damaged.*none is removed"):
        evict(store, older_than_s=0)
    assert store.present(kept)
    assert store.present(nobodys)


def test_a_record_that_cannot_be_read_stops_the_sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.put("model", "x")
    assert Log(store, "verdicts/x", Verdict).append(Verdict(1, made.uri))
    age(store)
    read = Store.read

    def away(self: Store, key: str) -> bytes | None:
        if key.startswith("records"):
            raise StoreError("does not answer")
        return read(self, key)

    monkeypatch.setattr(Store, "read", away)
    with pytest.raises(StoreError, match="does not answer"):
        evict(store, older_than_s=0)
    assert store.intact(made)


@pytest.mark.parametrize(
    "text",
    [
        "file:///store/artifacts/{0}/model@sha256:{1}",
        '{{"sha256":"{1}"}}',
        "https://x/artifacts%2f{0}%2fmodel",
        "\\u002f{0}",
        "{0}",
        "run {2} of key {3}: {0}.",
    ],
)
def test_a_folder_is_found_however_it_is_named(text: str) -> None:
    digest = "0123456789abcdef" * 4
    assert digest[:32] in names_in(text.format(digest[:32], digest, "f" * 24, "e" * 40).encode())


# -- what it costs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_s3(bucket: tuple[str, Connection], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose objects all count as an hour old, except for what a test says."""
    monkeypatch.setattr(eviction, "GRACE_S", -10.0)
    return Store(*bucket)


def test_on_s3_it_lists_each_prefix_and_reads_what_is_new(s3: LocalS3, on_s3: Store) -> None:
    store = on_s3
    log = Log(store, "verdicts/x", Verdict)
    for number in range(1, 21):
        assert log.append(Verdict(number, store.put("evidence", f"{number}").uri))
    cache.record(store, receipt(1, one=store.put("cached", "x")))
    kept = store.keys("artifacts")

    def again() -> None:
        assert evict(store, older_than_s=DAY_S) == (0, 0)

    fixed = s3.count(again) - 21  # the listings, and the index read and written
    assert fixed <= 12
    assert s3.count(again) <= fixed  # nothing is new
    cache.record(store, receipt(1, one=store.put("cached", "y")))  # the same key says something else now
    orphan, kept = f"artifacts/{_folder_of(b'x')}/cached", [*kept, f"artifacts/{_folder_of(b'y')}/cached"]
    assert (
        s3.count(lambda: evict(store, older_than_s=DAY_S)) <= fixed + 1 + 4
    )  # one read, one artifact removed
    assert store.keys("artifacts") == sorted(set(kept) - {orphan})


def _folder_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"read": {}}', None])
def test_the_index_may_be_lost_or_damaged(s3: LocalS3, on_s3: Store, damage: bytes | None) -> None:
    store = on_s3
    made = store.put("evidence", "x")
    assert Log(store, "verdicts/x", Verdict).append(Verdict(1, made.uri))
    evict(store, older_than_s=DAY_S)
    index = json.loads(store.read("index/names.json") or b"")
    (entry,) = index["read"].values()
    if damage is None:  # whole, but not what was written
        entry[2] = []
        damage = json.dumps(index).encode()
    store.write("index/names.json", damage)
    evict(store, older_than_s=DAY_S)
    assert store.intact(made)
    assert (
        made.sha256[:32] in next(iter(json.loads(store.read("index/names.json") or b"")["read"].values()))[2]
    )


def test_what_is_overwritten_while_it_is_read_is_read_again(
    on_s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index must not remember the names of one content under the ETag of another."""
    store = on_s3
    first, second = store.put("evidence", "first"), store.put("evidence", "second")
    key = "records/notes/which.txt"
    store.write(key, first.uri.encode())
    read: Callable[[Store, str], Any] = Store.read

    def overwritten(self: Store, asked: str) -> Any:
        if asked == key:
            monkeypatch.setattr(Store, "read", read)
            store.write(key, second.uri.encode())
        return read(self, asked)

    monkeypatch.setattr(Store, "read", overwritten)
    monkeypatch.setattr(eviction, "_remove", lambda *_: {})
    evict(store, older_than_s=DAY_S)
    monkeypatch.undo()
    time.sleep(1.1)  # S3 tells times in whole seconds
    store.write(key, first.uri.encode())
    monkeypatch.setattr(eviction, "GRACE_S", -10.0)
    evict(store, older_than_s=DAY_S)
    assert store.intact(first)


def test_sixteen_things_are_removed_at_a_time(s3: LocalS3, on_s3: Store) -> None:
    store = on_s3
    for number in range(40):
        store.put("text", f"{number}")
    s3.most_at_once, s3.latency_s = 0, 0.02
    try:
        requests = s3.count(lambda: evict(store, older_than_s=DAY_S))
    finally:
        s3.latency_s = 0.0
    assert store.keys("artifacts") == []
    assert requests <= 40 * 4 + 20
    assert 8 <= s3.most_at_once <= 16
