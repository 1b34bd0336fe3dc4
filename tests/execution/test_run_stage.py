from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_airflow.__main__ import main
from lepton_airflow.connections import Connection, redactor
from lepton_airflow.contract import PROTOCOL, Receipt, Request
from lepton_airflow.execution.run_stage import in_brief, run_stage
from lepton_airflow.sdk.values import plain_json
from lepton_airflow.stages import all_stages
from lepton_airflow.store import Store
from lepton_airflow.testing import probe

# What is absent where only the entry point and the standard library are, besides fsspec.
ABSENT = [
    "airflow",
    "great_expectations",
    "numpy",
    "pandas",
    "duckdb",
    "pyarrow",
    "sklearn",
    "scipy",
    "torch",
    "onnx",
    "onnxruntime",
    "skl2onnx",
    "optuna",
    "mlflow",
    "matplotlib",
    "sqlalchemy",
    "alembic",
    "adbc_driver_postgresql",
    "s3fs",
    "botocore",
    "kubernetes",
    "psutil",
]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({absent!r})); from lepton_airflow.__main__ import main; sys.exit(main({argv!r}))"


def _entry_point(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lepton_airflow", *argv]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def call(tmp_path: Path) -> Any:
    """Runs a request through the entry point; returns the process and the receipt, if there is one."""

    def run(
        request: Request | str, **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], Receipt | None]:
        given, left = tmp_path / "request.json", tmp_path / "receipt.json"
        given.write_text(request if isinstance(request, str) else request.to_json(), encoding="utf-8")
        done = _entry_point("run", str(given), str(left), **environment)
        return done, Receipt.from_json(left.read_bytes()) if left.exists() else None

    return run


@pytest.mark.parametrize(
    ("how", "code", "status"),
    [
        ("Skipped", 99, "skipped"),
        ("BadInput", 80, "refused"),
        ("Preempted", 75, "preempted"),
        ("LeptonError", 1, "failed"),
        ("exit", 1, "failed"),
        ("no result", 80, "refused"),
    ],
)
def test_exit_codes_and_a_receipt_also_on_failure(
    call: Any, tmp_path: Path, how: str, code: int, status: str
) -> None:
    request = probe("Fail", tmp_path / "store", how=how)
    done, receipt = call(request)
    assert done.returncode == code, done.stdout + done.stderr
    assert receipt is not None
    assert (receipt.status, receipt.error["exit_code"]) == (status, code)
    assert receipt == Store(str(tmp_path / "store")).receipt(request.run_key)
    assert f"ERROR {request.stage} {status}: {receipt.summary}" in done.stdout
    assert done.stderr == ""


def test_success(call: Any, tmp_path: Path) -> None:
    done, receipt = call(probe("Copy", tmp_path / "store"))
    assert (done.returncode, receipt.status) == (0, "done")
    assert "INFO copying 5 characters" in done.stdout


def test_a_foreign_error_shows_its_traceback_with_the_level_on_each_line(call: Any, tmp_path: Path) -> None:
    done, receipt = call(probe("Fail", tmp_path / "store", how="ValueError"))
    assert (done.returncode, receipt.error["kind"], receipt.summary) == (
        1,
        "ValueError",
        "ValueError: as asked",
    )
    assert "ERROR Traceback (most recent call last):" in done.stdout
    assert all(line.startswith("ERROR ") for line in done.stdout.splitlines())


def test_text_survives_a_machine_without_utf8(call: Any, tmp_path: Path) -> None:
    request = probe("Fail", tmp_path / "store", how="BadInput", message="größe 界 …")
    done, receipt = call(
        request, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="ascii:replace"
    )
    assert (done.returncode, receipt.summary) == (80, "größe 界 …")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps({"protocol": PROTOCOL + 1, "stage": "X"}), f"speaks protocol {PROTOCOL + 1}"),
        ("{", "the request is not JSON"),
        (Request(stage="TrainModell", parameters={}, store="{tmp}").to_json(), "did you mean 'TrainModel'?"),
        (
            Request(stage="TrainModel", parameters={"datasett": 1}, store="{tmp}").to_json(),
            "did you mean 'dataset'?",
        ),
        (Request(stage="TrainModel", parameters={}, store="{tmp}").to_json(), "describe TrainModel"),
        (
            Request(stage="no_module:X", parameters={}, store="{tmp}").to_json(),
            "no module 'no_module' where the stage runs",
        ),
        (Request(stage="json:dumps", parameters={}, store="{tmp}").to_json(), "is no subclass of"),
        (Request(stage="TrainModel", parameters={}, store="nosuch://x").to_json(), "cannot be opened"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(
    call: Any, tmp_path: Path, text: str, sentence: str
) -> None:
    done, _ = call(text.replace("{tmp}", str(tmp_path / "store")))
    assert done.returncode == 80
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_stage_without_its_window_says_why_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t\n2013-01-01\n")
    given = {"sources": {"a": str(tmp_path / "a.csv")}, "query": "SELECT * FROM a WHERE t >= $window_start"}
    request = Request(
        "IngestData", given, str(tmp_path / "store"), window_note="the interval is empty: do this"
    )
    receipt = run_stage(request)
    assert receipt.status == "refused"
    assert "query uses $window_start" in receipt.summary
    assert receipt.summary.endswith("Why it has none: the interval is empty: do this.")


def test_files_that_cannot_be_read_or_written_are_sentences(tmp_path: Path) -> None:
    done = _entry_point("run", str(tmp_path / "none.json"), str(tmp_path / "receipt.json"))
    assert (done.returncode, "none.json cannot be read: No such file" in done.stderr) == (80, True)
    (tmp_path / "request.json").write_text(probe("Copy", tmp_path / "store").to_json())
    done = _entry_point("run", str(tmp_path / "request.json"), str(tmp_path / "no" / "receipt.json"))
    assert (done.returncode, "receipt.json cannot be written: No such file" in done.stderr) == (1, True)


@pytest.mark.parametrize("argv", [["stages"], *(["describe", name] for name in all_stages())])
def test_stages_and_describe_need_neither_airflow_nor_an_engine(argv: list[str]) -> None:
    code = WITHOUT.format(absent=ABSENT, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if argv == ["stages"]:
        assert [line.split()[0] for line in done.stdout.splitlines()] == list(all_stages())
        assert all(len(line.split()) > 3 for line in done.stdout.splitlines())


def test_the_block_above_blocks() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import duckdb"
    assert (
        "ModuleNotFoundError"
        in subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr
    )


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "TrainModel"]) == 0
    text = capsys.readouterr().out
    assert "  dataset: ArtifactUri  (required)" in text
    assert "  folds: " in text
    assert main(["describe", "TrainModel", "--json"]) == 0
    parameters = {p["name"]: p for p in json.loads(capsys.readouterr().out)["parameters"]}
    assert (parameters["dataset"]["default"], parameters["dataset"]["type"]) == ("required", "ArtifactUri")
    assert main(["describe", "Train"]) == 80
    assert "did you mean 'TrainModel'" in capsys.readouterr().err
    assert main(["describe", "lepton_airflow.testing.probe_stages:Copy"]) == 0
    assert "text: str = 'hello'" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lepton_airflow", "describe", "TrainModel"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


# -- secrets -------------------------------------------------------------------------------------------------------------


def test_secrets_are_hidden_however_they_are_written_and_words_are_not() -> None:
    connection = Connection(
        "db",
        "postgres",
        host="database",
        login="analyst",
        password='p@ss w"ord/1',
        extra={
            "sslmode": "require",
            "region_name": "eu-central-1",
            "api_token": "tok-12345",
            "nested": {"private_key": "-----BEGIN KEY-----\nAAAABBBBCCCC\n-----END KEY-----"},
            "credentials": ["list-secret"],
            "proxy": "http://me:proxy-pass@proxy:3128",
        },
    )
    hide = redactor({"db": connection})
    secret = r'p@ss w"ord/1 p%40ss%20w%22ord%2F1 p%40ss+w%22ord%2F1 p@ss w\"ord/1 tok-12345 AAAABBBBCCCC list-secret proxy-pass'
    assert hide(secret) == " ".join(["***"] * 8)
    words = "analyst may require database in eu-central-1"
    assert hide(words) == words
    assert redactor({})(secret) == secret


def test_secrets_inside_an_address_or_a_key_file_are_hidden_too() -> None:
    key_file = json.dumps(
        {"project_id": "flights", "private_key": "-----BEGIN-----\nEEEEFFFF\n-----END-----\n"}
    )
    connection = Connection(
        "tracking", "http", host="https://me:s3cr%40t-pw@mlflow.example", extra={"keyfile_dict": key_file}
    )
    hide = redactor({"tracking": connection})
    assert hide("https://me:s3cr%40t-pw@mlflow.example") == "https://me:***@mlflow.example"
    assert hide("s3cr@t-pw\nEEEEFFFF") == "***\n***"
    assert hide("flights at mlflow.example") == "flights at mlflow.example"


def test_a_traceback_of_the_stages_own_logging_hides_secrets_too(tmp_path: Path) -> None:
    from lepton_airflow.execution.output import LevelFormatter

    try:
        raise ValueError("db://user:hunter22@host")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    text = LevelFormatter(redactor({"db": Connection("db", "db", password="hunter22")})).format(record)
    assert "db://user:***@host" in text
    assert all(line.startswith("ERROR ") for line in text.split("\n"))


# -- what comes back -----------------------------------------------------------------------------------------------------


def test_values_of_engines_become_json() -> None:
    import numpy as np

    given = {
        1: np.float32(0.5),
        "nan": np.float64("nan"),
        "inf": float("inf"),
        "a": np.arange(3),
        "t": (1, None, "x", True),
    }
    assert plain_json(given) == {
        "1": 0.5,
        "nan": None,
        "inf": None,
        "a": [0, 1, 2],
        "t": [1, None, "x", True],
    }
    assert json.dumps(plain_json(given))


def test_a_receipt_that_cannot_be_kept_is_no_success(tmp_path: Path) -> None:
    store = tmp_path / "store"
    request = probe("Copy", store)
    Store(str(store)).write("receipts", b"a file where a folder should be")
    receipt = run_stage(request)
    assert (receipt.status, receipt.error["kind"]) == ("failed", "StoreError")


def test_what_a_careless_library_prints_is_redacted_where_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's log is read by others than the worker."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # the probe looks for the secret in its folder
    request = probe("Look", tmp_path / "store", connection="db", say=True)
    (tmp_path / "request.json").write_text(request.to_json())
    connections = [{"id": "db", "type": "postgres", "password": "spilled-secret"}]
    (tmp_path / "connections.json").write_text(json.dumps(connections))
    files = [str(tmp_path / name) for name in ("request.json", "receipt.json")]
    done = _entry_point("run", *files, "--connections-file", str(tmp_path / "connections.json"))
    assert done.returncode == 1
    assert "connecting with ***" in done.stdout.splitlines()
    assert "INFO connecting to db://user:***@host" in done.stdout.splitlines()
    assert "spilled-secret" not in done.stdout + done.stderr + (tmp_path / "receipt.json").read_text()


@pytest.mark.parametrize("kind", ["ValueError", "BadInput"])
def test_a_document_that_an_error_quotes_is_cut_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    (tmp_path / "quotes.py").write_text(
        "from lepton_airflow.errors import BadInput\nfrom lepton_airflow.stages import Stage\n"
        "class Quotes(Stage):\n    def run(self, run):\n"
        "        mail = 'Dear doctor, it\\'s about ' + 'my \"illness\" ' * 300\n"
        f"        raise {kind}(f'the model\\'s words: could not convert {{mail!r}} to a number, the others\\' are short')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level("INFO"):
        receipt = run_stage(Request("quotes:Quotes", {}, str(tmp_path / "store")))
    told = [receipt.summary, *(record.getMessage() for record in caplog.records)]
    assert receipt.error is not None
    assert max(text.count("illness") for text in told) <= 8
    assert "the model's words: could not convert" in receipt.error["message"]
    assert re.search(
        r"…['\"] \(3,\d{3} characters\) to a number, the others' are short", receipt.error["message"]
    )


def test_a_termination_message_keeps_how_the_stage_ended() -> None:
    long = "naïve «words» \\" * 150
    error = {"kind": "BadInput", "message": long, "exit_code": 80}
    receipt = Receipt("Copy", "k" * 24, None, "refused", long, error=error, nonce="n")
    receipt = replace(receipt, metrics={f"m{n}": 1.0 for n in range(100)}, values={"v": "x" * 100})
    text = in_brief(receipt)
    told = Receipt.from_json(text)
    assert len(text.encode()) <= 4096
    assert (told.nonce, told.error and told.error["kind"], told.metrics) == ("n", "BadInput", {})
    assert told.summary.startswith("naïve")
    short = replace(receipt, error=None, summary="s", metrics={"m": 1.0})
    assert Receipt.from_json(in_brief(short)) == short


def test_a_missing_module_is_named_with_the_line_that_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asks_for_more.py").write_text(
        "from lepton_airflow.stages import Stage\n"
        "class AsksForMore(Stage):\n"
        "    def run(self, run):\n"
        "        import no_such_library.part\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    receipt = run_stage(
        Request(stage="asks_for_more:AsksForMore", parameters={}, store=str(tmp_path / "store"))
    )
    assert receipt.error is not None
    assert (receipt.error["kind"], receipt.error["exit_code"]) == ("BadConfiguration", 80)
    assert "no module 'no_such_library' where the stage runs" in receipt.error["message"]
    assert "asks_for_more.py line 4 asks for it" in receipt.error["message"]
