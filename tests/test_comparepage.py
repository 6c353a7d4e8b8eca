"""The comparison as a page: its plots hold the data, and nothing in it runs or is fetched."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune import compare, comparepage
from finetune.plot import BUCKETS, HEIGHT, WIDTH
from tests.runs import OUTPUT, finetune, write_rows

OTHER = Path("runs/two")
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e\ud800'


class Elements(HTMLParser):
    """Every element with its attributes, and the text of all."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """Elements of a class, or all."""
        own = [attrs for name, attrs in self.found if name == tag]
        return [attrs for attrs in own if not kind or kind in (attrs.get("class") or "").split()]


@pytest.fixture
def two(finished: Path) -> Path:
    shutil.copytree(OUTPUT, OTHER)
    return finished


def page() -> str:
    return comparepage.page(compare.compare([OUTPUT, OTHER]))


def metrics(folder: Path, losses: list[float]) -> None:
    write_rows(folder / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])


def drawn(line: dict[str, Any]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (place.split(",") for place in line["points"].split())]


def test_the_plot_holds_the_curve(two: Path) -> None:
    losses = [3.0, 2.0, 2.5, 1.0, 1.5]
    metrics(OUTPUT, losses)
    metrics(OTHER, [1.0, 3.0])
    curves = [drawn(line) for line in Elements(page()).of("polyline", "line")][:2]
    assert [len(curve) for curve in curves] == [5, 2]
    (x1, y1), (x2, y2) = curves[0][0], curves[0][3]  # (1, 3.0) and (4, 1.0): the scale
    for step, (loss, (x, y)) in enumerate(zip(losses, curves[0], strict=True), 1):
        assert x == pytest.approx(x1 + (step - 1) / 3 * (x2 - x1), abs=0.11)
        assert y == pytest.approx(y1 + (loss - 3.0) / (1.0 - 3.0) * (y2 - y1), abs=0.11)
    assert curves[1][0] == pytest.approx((x1, y2), abs=0.11)  # both are drawn on one scale


def test_a_long_run_keeps_the_page_small(two: Path) -> None:
    metrics(OUTPUT, [2.0 + (step % 7) / 10 for step in range(20_000)])
    made = page()
    assert len(made) < 60_000
    assert all(len(drawn(line)) <= 2 * BUCKETS + 2 for line in Elements(made).of("polyline"))


def test_a_spike_of_one_step_is_seen(two: Path) -> None:
    metrics(OUTPUT, [40.0 if step == 7_777 else 2.0 for step in range(20_000)])
    heights = sorted(y for _, y in drawn(Elements(page()).of("polyline", "faint")[0]))
    assert heights[0] < heights[1] - 100


def test_many_runs_are_told_apart_by_the_key(two: Path) -> None:
    others = [Path(f"runs/{number:02}") for number in range(20)]
    for folder in others:
        shutil.copytree(OUTPUT, folder)
    seen = Elements(comparepage.page(compare.compare(others)))
    kinds = [str(line["class"]) for line in seen.of("polyline", "line")][:20]
    assert len(set(kinds)) == 20, "each has its colour and dash"
    assert not seen.of("text", "curve-label"), "labels that do not fit are left to the key"
    assert [str(line["class"]) for line in seen.of("line", "line")] == kinds


@pytest.mark.parametrize("losses", [[1.0], [1.0, 1.0], [0.0, 0.0], [-5.0, -5.0], [1e-12, 2e-12], [1e99, -1e99], []])
def test_any_curve_can_be_drawn(two: Path, losses: list[float]) -> None:
    metrics(OUTPUT, losses)
    for line in Elements(page()).of("polyline"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn(line))


def test_text_of_others_is_text_and_nothing_else(two: Path) -> None:
    for folder, sign in ((OUTPUT, "1"), (OTHER, "2")):
        identity = json.loads((folder / "identity.json").read_text())
        for part in ("recipe", "resolved", "data", "base", "environment"):
            identity[part] |= {HOSTILE: HOSTILE + sign}
        (folder / "identity.json").write_text(json.dumps(identity))
        scores = json.loads((folder / "scores.json").read_text())
        (folder / "scores.json").write_text(json.dumps({HOSTILE: scores["before"], **scores}))
    bad = Path("runs") / re.sub("[/\ud800]", "", HOSTILE)
    shutil.move(OTHER, bad)
    said = finetune("compare", str(OUTPUT), str(bad), "--html", "page.html")
    assert (said.code, said.err) == (0, "")
    assert "\x1b" not in said.out
    assert "\u202e" not in said.out
    made = Path("page.html").read_text(encoding="utf-8")
    seen = Elements(made)
    assert {tag for tag, _ in seen.found} <= {
        "html", "meta", "title", "style", "header", "main", "section", "h1", "h2", "h3", "p", "div", "table", "thead",
        "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "rect", "ul",
        "li", "dl", "dt", "dd", "small",
    }  # fmt: skip
    assert not [name for _, attrs in seen.found for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert seen.text.count("<script>alert(1)</script>") >= 10


def test_runs_without_scores_or_curves_still_make_a_page(two: Path) -> None:
    for folder in (OUTPUT, OTHER):
        for name in ("scores.json", "metrics.jsonl", "plan.json", "samples.jsonl", "losses.jsonl"):
            (folder / name).unlink()
    made = page()
    assert "<svg" not in made
    assert "has no scores" in made
