"""trackio's page as ``finetune dashboard`` serves it, in a browser with no other host to reach."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import browser, runs
from tests.browser import DESKTOP, PHONE, TABLET, Tab, opened
from tests.payloads import WRITABLE
from tests.runs import ENVIRONMENT, process

if TYPE_CHECKING:
    from playwright.sync_api import Browser

COMMAND = "from finetune.cli import main; main()"
_VIEWS = ("", "system", "runs", "settings")
_LOG = """
import contextlib, io, json, sys, trackio
for name, config, metrics in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()):
        trackio.init("finetune", name, config=config, embed=False, auto_log_cpu=False, auto_log_gpu=False)
        for step in range(3):
            trackio.log({metric: step / 2 for metric in metrics}, step=step)
        trackio.finish()
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.browser() as found:
        yield found


@pytest.fixture
def served(work: Path) -> Iterator[str]:
    """The address of the dashboard over what ``work/runs`` holds when it is first asked for."""
    serving: list[subprocess.Popen[str]] = []

    def start() -> str:
        command = [sys.executable, "-P", "-c", COMMAND, "dashboard", "runs"]
        child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        serving.append(child)
        assert child.stdout is not None
        found = re.search(r"(http://127\.0\.0\.1:\d+/) ", child.stdout.readline())
        assert found is not None
        return found[1]

    yield start  # type: ignore[misc]
    for child in serving:
        child.kill()
        child.communicate()


def log(*tracked: tuple[str, dict[str, str], list[str]]) -> None:
    """Runs as somebody else's data base may hold them."""
    done = subprocess.run(
        [sys.executable, "-c", _LOG], input=json.dumps(tracked), text=True, capture_output=True, check=False,
        env=ENVIRONMENT | {"TRACKIO_DIR": str(Path("runs/trackio").absolute())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def settled(tab: Tab) -> None:
    """It asks for news without an end, so it is given time instead."""
    tab.page.wait_for_selector(".nav-link")
    tab.page.wait_for_timeout(1000)


def body(answer: Any) -> Any:
    """What was answered; nothing for an answer that a later one of the page has replaced."""
    from playwright.sync_api import Error

    try:
        return answer.json()
    except Error:
        return None


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)


@browser.needed
def test_it_asks_nobody_and_shows_every_curve(work: Path, served: Any, chromium: Browser) -> None:
    done = process(COMMAND, "train", "r.yaml", "--set", "tracker=trackio")
    assert done.returncode == 0, done.stderr
    own = served()
    for view, width, dark in (*((view, DESKTOP, False) for view in _VIEWS), ("", PHONE, True)):
        with opened(chromium, own + view, own=own, width=width, dark=dark) as tab:
            settled(tab)
            assert tab.faults == {}, view
            assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    with opened(chromium, own, own=own, width=TABLET) as tab:
        answers: list[Any] = []
        tab.page.on("response", lambda found: answers.append(found))
        tab.page.reload()
        settled(tab)
        assert tab.page.locator("canvas").count() > 0
        assert tab.page.evaluate("document.documentElement.scrollWidth") == TABLET
        told = {one for answer in answers if "/api/" in answer.url for one in numbers(body(answer))}
    assert {line["loss"] for line in runs.metrics()} <= told, "the curves that it draws are the run's"


@browser.needed
def test_hostile_names_do_nothing(work: Path, served: Any, chromium: Browser) -> None:
    """Names of runs and recipe values are a folder's and a recipe's. Names of metrics are ours; with somebody else's

    trackio 0.43 says on the console that it cannot draw a name with a quote or a line break, and runs nothing.
    """
    texts = [text for text in WRITABLE if not text.startswith("__")]
    log(*((text, {one: one for one in texts[n : n + 10]}, ["loss"]) for n, text in enumerate(texts[::10])))
    own = served()
    for view in _VIEWS:
        with opened(chromium, own + view, own=own) as tab:
            settled(tab)
            tab.provoke()
            assert tab.faults == {}, view
            assert tab.page.title() == "Trackio Dashboard"
    log(("named", {}, texts[::8]))
    with opened(chromium, own, own=own) as tab:
        tab.page.wait_for_timeout(2000)
        tab.provoke()
        assert set(tab.faults) <= {"console"}
        assert all(said.startswith(("Vega render error", "Failed to load resource: net::ERR_INS")) for said in tab.said)
