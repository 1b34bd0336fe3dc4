"""Backfills as a person starts them: log in, Trigger, Backfill, fill the form, watch; on real flights, in Chromium.

With ``LEPTON_SCREENSHOTS=1`` the pictures of ``docs/backfill.md`` are made anew.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lepton_airflow.registry.ledger import Ledger, registrations
from lepton_airflow.stages import get_stage
from lepton_airflow.store import Store
from lepton_airflow.testing import LocalAirflow, LocalEndpoint, LocalMlflow

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DAG = "flights_retrain"
MODEL = "flights_late"
QUICK = {"Model": "logistic_regression", "Trials": 2}  # what is tested here is the chain, not the model
CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


Receipts = dict[str, dict[str, dict[str, Any]]]  # of each task of each month


@pytest.fixture(scope="module")
def page(airflow: LocalAirflow, require_program: Callable[[str, str], Path]) -> Iterator[Page]:
    """A browser's window, logged in, on the DAG's page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=require_program("chromium", "chromium"), args=CHROMIUM
        )
        window = browser.new_page(
            viewport={"width": 1400, "height": 900}, locale="en-US", timezone_id="Etc/UTC"
        )
        window.set_default_timeout(60_000)
        window.goto(f"{airflow.url}/dags/{DAG}")
        window.get_by_label("Username").fill("admin")
        window.locator("input[type=password]").fill(airflow.password)
        window.get_by_role("button", name="Sign in").click()
        window.get_by_role("button", name="Trigger").wait_for()
        yield window
        browser.close()


@pytest.fixture(scope="module")
def photograph(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """``photograph("grid")`` keeps what the window shows as ``backfill-grid.png``."""
    wanted = os.environ.get("LEPTON_SCREENSHOTS") == "1"
    folder = ROOT / "docs" / "images" if wanted else tmp_path_factory.mktemp("pictures")

    def take(name: str) -> None:
        page.mouse.move(0, 0)  # no tooltip
        page.screenshot(path=folder / f"backfill-{name}.png", animations="disabled")

    return take


def _open_form(page: Page) -> Locator:
    page.get_by_role("button", name="Trigger").click()
    form = page.get_by_role("dialog").filter(has_text="Single Run")
    form.get_by_text("Backfill", exact=True).click()
    form.get_by_text("Date Range").wait_for()
    return form


def _field(form: Locator, label: str) -> Locator:
    return form.get_by_label(re.compile(rf"^{label}\W*$"))  # a field that may not be empty has a star


def _fill(
    page: Page, form: Locator, first: str, last: str, *, reprocess: str, runs: int, params: Mapping[str, Any]
) -> None:
    for label, day in (("From", first), ("To", last)):
        field = form.locator("[data-scope=field][data-part=root]").filter(
            has=page.get_by_text(label, exact=True)
        )
        field.get_by_test_id("datetime-input").click()
        calendar = page.get_by_role("dialog").filter(has=page.get_by_placeholder("YYYY/MM/DD"))
        calendar.get_by_placeholder("YYYY/MM/DD").fill(day.replace("-", "/"))
        calendar.get_by_placeholder("HH:mm").fill("00:00")
        page.keyboard.press("Escape")
        calendar.wait_for(state="hidden")
    form.get_by_text(reprocess, exact=True).click()
    form.locator("input[name=max_active_runs]").fill(str(runs))
    form.get_by_text(
        "Override parameters on existing runs"
    ).click()  # else Airflow ignores the form's parameters
    for label, value in params.items():
        field = _field(form, label)
        field.fill(str(value))
        if field.get_attribute("role") == "combobox":
            field.press("Enter")


def _start(page: Page, form: Locator) -> dict[str, Any]:
    """Press the button; returns what the browser sent."""
    with page.expect_response(lambda r: r.url.endswith("/backfills") and r.request.method == "POST") as got:
        form.get_by_role("button", name="Run Backfill").click()
    assert got.value.ok, got.value.text()
    form.wait_for(state="hidden")
    sent: dict[str, Any] = got.value.request.post_data_json
    return sent


def _watch(airflow: LocalAirflow, page: Page, within_s: float) -> None:
    """See on the page that a backfill runs and, later, that it is over.

    Meanwhile the window shows nothing: without a graphics card the page's animations cost a third of a core.
    """
    address, banner = page.url, page.get_by_text("Backfill in progress")
    banner.wait_for()
    page.goto("about:blank")
    (running,) = airflow.api("GET", "/backfills", dag_id=DAG, order_by="-id", limit=1)["backfills"]
    airflow.wait_for_backfill(running["id"], within_s)
    page.goto(address)
    page.get_by_role("row").nth(1).wait_for()
    banner.wait_for(state="hidden")


def _active(airflow: LocalAirflow) -> list[str]:
    """The backfilled months that run now."""
    found = [r for r in airflow.runs(DAG) if r["run_type"] == "backfill"]
    return [r["logical_date"][:7] for r in found if r["state"] == "running"]


def _receipts(airflow: LocalAirflow) -> Receipts:
    """What each task of each backfilled month returned; every one must have succeeded."""
    found = {}
    for run in airflow.runs(DAG):
        if run["run_type"] != "backfill":  # the schedule's own, for this year, which finds no data
            continue
        tasks = airflow.tasks(DAG, run["dag_run_id"])
        states = {name: task["state"] for name, task in tasks.items()}
        assert set(states.values()) == {"success"}, (run["logical_date"], states)
        found[run["logical_date"][:7]] = {name: airflow.xcom(DAG, run["dag_run_id"], name) for name in tasks}
    return found


def _computed(receipts: Receipts) -> list[tuple[str, str]]:
    """Stage and cache key of every cacheable task that was computed and not taken from the cache."""
    return [
        (receipt["stage"], receipt["cache_key"])
        for tasks in receipts.values()
        for receipt in tasks.values()
        if receipt["status"] == "done" and get_stage(receipt["stage"]).cacheable
    ]


def _aliases(mlflow: LocalMlflow) -> dict[str, int]:
    address = f"{mlflow.url}/api/2.0/mlflow/registered-models/get?name={MODEL}"
    with urllib.request.urlopen(address, timeout=30) as reply:
        aliases = json.load(reply)["registered_model"].get("aliases", [])
    return {alias["alias"]: int(alias["version"]) for alias in aliases}


@pytest.fixture(scope="module")
def two_months(airflow: LocalAirflow, page: Page) -> Receipts:
    """June and July, started with the form as it opens: ``register_only``."""
    form = _open_form(page)
    _fill(page, form, "2013-06-01", "2013-07-01", reprocess="Missing Runs", runs=2, params=QUICK)
    form.get_by_text("2 runs will be triggered.").wait_for()
    sent = _start(page, form)
    assert sent["dag_run_conf"]["trainer"] == "logistic_regression"
    assert sent["dag_run_conf"]["trials"] == 2
    assert sent["dag_run_conf"]["on_backfill"] == "register_only"
    page.goto(f"{airflow.url}/dags/{DAG}/backfills")
    _watch(airflow, page, 900)
    return _receipts(airflow)


def test_two_months_register_and_leave_production_alone(
    airflow: LocalAirflow,
    mlflow: LocalMlflow,
    endpoint: LocalEndpoint,
    two_months: Receipts,
) -> None:
    assert sorted(two_months) == ["2013-06", "2013-07"]
    store = Store(str(airflow.home / "store"))
    assert Ledger(store, MODEL).entries() == []
    assert {entry.version for entry in registrations(store, MODEL)} == {1, 2}
    for tasks in two_months.values():
        assert tasks["ingest"]["values"]["rows"] > 25_000
        assert tasks["evaluate"]["metrics"]["roc_auc_low"] > 0.5
        assert tasks["promote"]["values"]["moved"] is False
        assert tasks["deploy"]["values"]["deployed"] is False
    with pytest.raises(urllib.error.HTTPError):  # it has nothing to serve
        endpoint.metadata()
    assert store.keys("records/endpoints/flights-late/desired") == []
    assert _aliases(mlflow) == {"candidate": two_months["2013-07"]["register"]["values"]["version"]}


@pytest.fixture(scope="module")
def four_months(
    airflow: LocalAirflow,
    page: Page,
    endpoint: LocalEndpoint,
    two_months: Receipts,
    photograph: Callable[[str], None],
) -> Receipts:
    """June to September at once and in full; the first two have run before."""
    form = _open_form(page)
    params = QUICK | {"In a backfill": "full"}
    _fill(page, form, "2013-06-01", "2013-09-01", reprocess="All Runs", runs=4, params=params)
    form.get_by_text("4 runs will be triggered.").wait_for()
    form.get_by_text("Date Range").scroll_into_view_if_needed()
    photograph("form")
    assert _start(page, form)["dag_run_conf"]["on_backfill"] == "full"
    airflow.until(lambda: len(_active(airflow)) == 4, "four months to run at once", 300)
    page.goto(f"{airflow.url}/dags/{DAG}/backfills")
    page.get_by_role("cell", name="All Runs").wait_for()
    photograph("running")
    _watch(airflow, page, 900)
    page.goto(f"{airflow.url}/dags/{DAG}/runs")
    page.get_by_role("row").nth(4).wait_for()
    photograph("grid")
    return _receipts(airflow)


def test_four_months_at_once_compute_nothing_twice(two_months: Receipts, four_months: Receipts) -> None:
    assert sorted(four_months) == ["2013-06", "2013-07", "2013-08", "2013-09"]
    for month, before in two_months.items():
        for name, receipt in before.items():
            now = four_months[month][name]
            cacheable = get_stage(receipt["stage"]).cacheable
            assert (now["status"] == "cached") is cacheable, (month, name)
            if cacheable:
                assert now["artifacts"] == receipt["artifacts"], (month, name)
        assert four_months[month]["register"]["values"] == before["register"]["values"]
    computed = [*_computed(two_months), *_computed(four_months)]
    assert len(computed) > len(two_months)
    assert len(set(computed)) == len(computed)


def test_four_months_at_once_end_with_one_champion(
    airflow: LocalAirflow,
    mlflow: LocalMlflow,
    endpoint: LocalEndpoint,
    four_months: Receipts,
) -> None:
    store = Store(str(airflow.home / "store"))
    registered = {entry.version: entry for entry in registrations(store, MODEL)}
    assert sorted(registered) == [1, 2, 3, 4]
    history = Ledger(store, MODEL).entries()
    assert [entry.sequence for entry in history] == list(range(1, len(history) + 1))
    assert [entry.previous for entry in history] == [None, *(entry.version for entry in history[:-1])]
    ends = [entry.window["end"] for entry in history if entry.window]
    assert len(ends) == len(history)
    assert ends == sorted(set(ends))
    assert all(registered[entry.version].sha256 == entry.sha256 for entry in history)
    moved = {
        tasks["register"]["values"]["version"]
        for tasks in four_months.values()
        if tasks["promote"]["values"]["moved"]
    }
    assert moved == {entry.version for entry in history}
    assert [t["promote"]["values"]["decision"] for t in four_months.values()].count("bootstrap") == 1
    aliases = _aliases(mlflow)
    assert aliases.get("previous") == history[-1].previous
    assert aliases["champion"] == history[-1].version
    assert aliases["candidate"] == four_months["2013-09"]["register"]["values"]["version"]
    assert endpoint.metadata()["versions"] == [str(history[-1].version)]


def test_an_older_month_cannot_replace_the_champion(
    airflow: LocalAirflow, endpoint: LocalEndpoint, four_months: Receipts
) -> None:
    ledger = Ledger(Store(str(airflow.home / "store")), MODEL)
    before = ledger.entries()
    conf = {"trainer": "logistic_regression", "trials": 2, "on_backfill": "full"}
    airflow.wait_for_backfill(airflow.backfill(DAG, "2013-05-01", "2013-05-01", conf), 600)
    may = _receipts(airflow)["2013-05"]
    judged = may["promote"]["values"]
    assert (judged["decision"], judged["moved"]) == ("hold", False)
    assert "newer" in judged["reason"]
    assert ledger.entries() == before
    served = may["deploy"]["values"]
    champion = str(before[-1].version)
    assert (served["deployed"], served["version"], served["url"]) == (True, champion, endpoint.url)
