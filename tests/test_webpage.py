"""The pages in a real browser with no network: nothing runs or is asked for, all fits, plots hold the data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from finetune import compare, comparepage, datashow, look, runpage, webpage
from finetune.datashow import Piece
from finetune.runfolder import RunFolder
from tests import browser, runs
from tests.browser import DESKTOP, PHONE, TABLET, Tab, opened
from tests.payloads import PAYLOADS, WRITABLE
from tests.runs import OUTPUT
from tests.test_runpage import hostile_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_STRANGERS = "script, img, iframe, object, embed, link, base, form, input, a, foreignObject, use, image, [style], [src]"
_SHEET_WIDTH = 718
"""Pixels of an A4 page between margins of 1 cm."""
_CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = one => { for (; one; one = one.parentElement) {
    const found = rgb(getComputedStyle(one).backgroundColor); if (found.length == 3 || found[3] == 1) return found; }
    return [255, 255, 255] };
  const found = [];
  for (const one of document.querySelectorAll('body *')) {
    if (![...one.childNodes].some(node => node.nodeType == 3 && node.data.trim()) || one.closest('title')) continue;
    if (one.matches('style')) continue;
    const style = getComputedStyle(one), both = [light(rgb(one.closest('svg') ? style.fill : style.color)),
      light(ground(one))].sort((a, b) => b - a);
    const ratio = (both[0] + .05) / (both[1] + .05);
    if (ratio < 4.5) found.push(`${one.tagName}.${one.className.baseVal ?? one.className}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""
_OVERFLOW = """() => {
  const root = document.documentElement, held = one => one.closest('.wide');
  const wide = [...document.querySelectorAll('body *')].filter(one => !held(one) && !one.closest('svg')
    && one.getBoundingClientRect().right > root.clientWidth + 1).map(one => `${one.tagName}.${one.className}`);
  for (const one of document.querySelectorAll('svg text'))
    if (one.getBoundingClientRect().right > root.clientWidth) wide.push(one.textContent);
  return root.scrollWidth > root.clientWidth ? ['the page'] : [...new Set(wide)];
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.browser() as found:
        yield found


def pages() -> dict[str, Path]:
    """Every page that the project writes, of the finished run in the working folder."""
    runpage.write(RunFolder(OUTPUT))
    other = Path("runs/two")
    shutil.copytree(OUTPUT, other)
    lines = runs.metrics()
    runs.write_rows(other / "metrics.jsonl", [line | {"loss": line["loss"] * 1.25} for line in lines])
    Path("data.html").write_text(datashow.page("r.yaml", look.rows(Path("r.yaml"), (), None, 8)))
    Path("comparison.html").write_text(comparepage.page(compare.compare([OUTPUT, other])))
    return {
        "finetune report": OUTPUT / "report.html",
        "finetune data": Path("data.html"),
        "finetune comparison": Path("comparison.html"),
    }


def hostile_data() -> Path:
    """Payloads as whole tokens, whatever a tokenizer makes of them, and as all that is said of a row."""
    (row,) = look.rows(Path("r.yaml"), (), None, 1)
    pieces = tuple(Piece(text=text, ids=(1,), kind="trained", weight=1.0, turn=text) for text in PAYLOADS)
    shown = [replace(row, pieces=pieces[n::50], heading=text, note=text) for n, text in enumerate(PAYLOADS[:50])]
    Path("data.html").write_text(datashow.page(PAYLOADS[0], shown))
    return Path("data.html")


def hostile_comparison() -> Path:
    """Payloads as names of runs, keys and values of recipes, files, machines and metrics."""
    named = [OUTPUT.parent / text for text in WRITABLE if 0 < len(text.encode()) < 200 and not set(text) & {"/", "\0"}]
    folders = [OUTPUT, *(folder for folder in named[:60] if folder.name not in (".", ".."))]
    for number, folder in enumerate(folders):
        if folder != OUTPUT:
            shutil.copytree(OUTPUT, folder)
        identity = json.loads((folder / "identity.json").read_text())
        for part in ("recipe", "resolved", "data", "base", "environment"):
            identity[part] |= {text: f"{number}{text}" for text in PAYLOADS} if number < 2 else {}
        (folder / "identity.json").write_text(json.dumps(identity))
        scores = json.loads((folder / "scores.json").read_text())
        (folder / "scores.json").write_text(json.dumps(dict.fromkeys(PAYLOADS, scores["before"]) | scores))
        rows = [line | dict.fromkeys(PAYLOADS, 1.0) for line in runs.metrics(folder)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = comparepage.page(compare.compare(folders))
    Path("comparison.html").write_text(made)
    return Path("comparison.html")


def test_the_policy_names_the_style_by_its_digest(finished: Path) -> None:
    for kind, path in pages().items():
        text = path.read_text()
        assert f'<p class="kicker">{kind}</p>' in text
        found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
        style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
        assert found is not None
        assert style is not None
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert html.unescape(found[1]) == webpage.POLICY
        assert f"default-src 'none'; style-src 'sha256-{digest}'" in webpage.POLICY
        assert "unsafe" not in webpage.POLICY


def test_there_are_payloads_enough() -> None:
    assert len(WRITABLE) >= 200
    assert len(set(PAYLOADS)) == len(PAYLOADS)


@browser.needed
def test_what_a_page_does_wrong_is_seen(tmp_path: Path, chromium: Browser) -> None:
    """The plant: each payload that can run does where it is not escaped, and is caught."""
    page = tmp_path / "page.html"
    planted = {
        "<img src=x onerror=window.__pwned=1>": ("requests", "ran"),
        "<script>window.__pwned=1</script>": ("ran",),
        "<b onmouseover=window.__pwned=1>x</b>": ("ran",),
        "<script>alert(1)</script>": ("ran",),
        "<link rel=stylesheet href=//example.org/x>": ("requests",),
        "<style>@import url(http://example.org/x)</style>": ("requests",),
        "<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>": ("requests",),
        "<script>new WebSocket('ws://127.0.0.1:9/x')</script>": ("requests",),
        "<meta http-equiv=refresh content=0;url=//example.org>": ("requests",),
        "<script>console.error(1)</script>": ("console",),
        "<script>throw 1</script>": ("console",),
        f'<meta http-equiv="Content-Security-Policy" content="{webpage.POLICY}"><script>1</script>': ("console",),
    }
    for text, expected in planted.items():
        page.write_text(f"<!doctype html><title>t</title>{text}")
        with opened(chromium, page) as tab:
            tab.provoke()
            assert set(expected) <= set(tab.faults), (text, tab.faults)
    page.write_text("<!doctype html><title>t</title><p>quiet</p>")
    with opened(chromium, page) as tab:
        tab.provoke()
        assert tab.faults == {}


@browser.needed
@pytest.mark.parametrize("kind", ["report", "data", "comparison"])
def test_two_hundred_payloads_do_nothing(finished: Path, chromium: Browser, kind: str) -> None:
    make = {"report": hostile_report, "data": hostile_data, "comparison": hostile_comparison}[kind]
    page = make()
    said = page.read_text()
    assert re.sub("<[^>]*>", "", said).count("window.__pwned=1") > 200
    assert not re.search("[\x00\x1b\x07\x9b\u202e\u2066]", said)
    with opened(chromium, page, width=PHONE) as tab:
        tab.provoke()
        assert tab.faults == {}
        assert tab.page.locator(_STRANGERS).count() == 0
        events = "one => [...one.attributes].some(has => has.name.startsWith('on'))"
        assert not tab.page.evaluate(f"[...document.querySelectorAll('*')].some({events})")
        assert tab.page.locator("style").count() == 1
        assert tab.page.locator("html > body > main").count() == 1, "no text has closed what it stands in"
        assert tab.page.evaluate("Object.prototype.x") is None
        assert tab.page.evaluate(_OVERFLOW) == []


@browser.needed
@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_each_page_fits_and_can_be_read(finished: Path, chromium: Browser, width: int, dark: bool) -> None:
    for kind, page in pages().items():
        with opened(chromium, page, width=width, dark=dark) as tab:
            tab.provoke()
            assert tab.page.locator(".kicker").first.inner_text() == kind
            assert tab.page.evaluate(_OVERFLOW) == [], kind
            assert tab.page.evaluate(_CONTRAST) == [], kind
            paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (not dark)
            assert tab.faults == {}


@browser.needed
def test_each_page_prints_in_black_on_white(finished: Path, chromium: Browser) -> None:
    for kind, page in pages().items():
        with opened(chromium, page, width=_SHEET_WIDTH, dark=True) as tab:
            tab.page.emulate_media(media="print")
            paper, ink = tab.page.evaluate(
                "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
            )
            assert (paper, ink) == ("rgb(255, 255, 255)", "rgb(29, 35, 41)"), kind
            assert tab.page.evaluate(_OVERFLOW) == [], kind
            assert tab.page.evaluate(_CONTRAST) == [], kind
            assert tab.page.locator(".hover:visible").count() == 0
            assert tab.page.pdf(format="A4").startswith(b"%PDF")
            assert tab.faults == {}


def read_back(tab: Tab, title: str) -> list[list[tuple[float, float]]]:
    """The curves of a plot in data's own numbers, by the ticks that stand at its axes."""
    picture = tab.page.locator(f'svg[aria-label="{title}"]')
    scales = []
    for kind, attribute, shift in (("tick middle", "x", 0.0), ("tick end", "y", -3.5)):
        marks = picture.locator(f'text[class="{kind}"]').evaluate_all(
            f"all => all.map(one => [one.textContent, one.getAttribute('{attribute}')])"
        )
        (low, low_at), *_, (high, high_at) = [(float(text.replace(",", "")), float(at) + shift) for text, at in marks]
        scales.append((low, low_at, (high - low) / (high_at - low_at)))

    def value(axis: int, at: str) -> float:
        low, low_at, each = scales[axis]
        return low + (float(at) - low_at) * each

    lines = picture.locator("polyline").evaluate_all("all => all.map(one => one.getAttribute('points'))")
    return [[(value(0, x), value(1, y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def near(found: list[tuple[float, float]], points: list[tuple[float, float]], spread: float) -> bool:
    """Equal within what a tenth of a pixel, of some 170, and two rounded ticks can tell."""
    return len(found) == len(points) and all(
        abs(x - to_x) < 0.05 and abs(y - to_y) < 0.004 * spread
        for (x, y), (to_x, to_y) in zip(found, points, strict=True)
    )


@browser.needed
def test_the_plots_hold_the_metrics(finished: Path, chromium: Browser) -> None:
    losses = [(line["step"], line["loss"]) for line in runs.metrics()]
    held = json.loads((OUTPUT / "scores.json").read_text())
    judged = [(0, held["before"]["loss"]), (len(losses), held["after"]["loss"])]
    spread = max(loss for _, loss in [*losses, *judged])
    made = pages()
    with opened(chromium, made["finetune report"]) as tab:
        for title, key in (
            ("loss", "loss"),
            ("gradient norm", "grad_norm"),
            ("tokens per second", "tokens_per_second"),
        ):
            points = [(line["step"], line[key]) for line in runs.metrics()]
            found = read_back(tab, title)
            assert near(found[0], points, max(y for _, y in points)), title
        assert near(read_back(tab, "loss")[1], judged, spread)
    with opened(chromium, made["finetune comparison"]) as tab:
        first, second = read_back(tab, "training loss")
        assert near(first, losses, spread * 1.25)
        assert near(second, [(step, loss * 1.25) for step, loss in losses], spread * 1.25)
        assert not near(second, losses, spread * 1.25), "another curve is seen to be another"
        assert [near(line, judged, spread) for line in read_back(tab, "held-out loss")] == [True, True]
        assert len(tab.page.locator(".key li").all()) == 2
