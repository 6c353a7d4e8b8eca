"""Curves: what is thinned stays true, axes have few round ticks, names stay text."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from finetune import plot
from finetune.plot import Bar, Plot, Series


def curve(count: int, spike: int | None = None) -> list[tuple[float, float]]:
    draw = random.Random(5)
    points = [(float(step), 2 + draw.random()) for step in range(1, count + 1)]
    if spike is not None:
        points[spike] = (points[spike][0], 40.0)
    return points


def drawn(points: list[tuple[float, float]], **how: object) -> str:
    return plot.draw(Plot(title="loss", series=[Series(label="", points=points)], shown="{:g}".format, **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 479, 480, 481, 5_003, 10_000])
def test_a_thinned_curve_keeps_its_ends_and_every_extreme(count: int) -> None:
    points = curve(count)
    kept = plot.thinned(points)
    assert len(kept) <= 2 * plot.BUCKETS + 2
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for low, high in plot._spans(count, plot.BUCKETS):
        part = [y for _, y in points[low:high]]
        if count > 2 * plot.BUCKETS:
            assert {min(part), max(part)} <= {y for _, y in kept if (_, y) in points[low:high]}


@pytest.mark.parametrize("spike", [0, 1, 4_999, 7_777, 9_998, 9_999])
def test_a_spike_of_one_step_is_seen(spike: int) -> None:
    found = drawn(curve(10_000, spike), smooth=True)
    heights = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]+)"', found)[0].split()]
    assert min(heights) < 40 < sorted(heights)[5], "one point stands far above all others"
    assert "40" in " ".join(re.findall(r"<title>(.*?)</title>", found, re.DOTALL))
    assert len(found) < 60_000


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.047), (5.8, 7.47), (0, 1e-5), (1, 10_000), (-3, 3), (3e8, 4e9)]
)
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in found)
    assert all(len(f"{value:.10g}".replace("0", "").replace(".", "").replace("-", "")) <= 6 for value in found)


def test_flat_and_lonely_curves_are_drawn() -> None:
    for points in ([(1.0, 0.0)], [(1.0, 3.0)], [(1.0, 3.0), (2.0, 3.0)], [(5.0, -1e17), (6.0, 1e17)]):
        assert "nan" not in drawn(points)
        assert "inf" not in drawn(points)
    assert "nothing was recorded" in drawn([])


def test_points_can_be_read_back() -> None:
    points = [(1.0, 4.0), (2.0, 2.0), (3.0, 3.0)]
    found = drawn(points)
    pairs = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]+)"', found)[0].split()]
    (x1, y1), (x2, y2), (x3, y3) = pairs
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert (y2 - y3) * 2 == pytest.approx(y2 - y1, abs=0.3), "3 stands half way between 2 and 4"
    titles = re.findall(r"<title>step (\d): loss: (\d)</title>", found.replace("\n", ": "))
    assert [(float(x), float(y)) for x, y in titles] == points


def test_labels_do_not_touch() -> None:
    series = [Series(label=name, points=[(0.0, 0.0), (1.0, 1.0)]) for name in "abc"]
    found = plot.draw(Plot(title="t", series=series, shown="{:g}".format, bound=(1.0, "planned")))
    places = [float(y) for y in re.findall(r'<text class="[^"]*label" x="[^"]+" y="([^"]+)"', found)]
    assert len(places) == 4
    assert all(after - before >= 14 - 0.11 for before, after in itertools.pairwise(places))


def test_names_stay_text() -> None:
    evil = '"><script>alert(1)</script>'
    found = plot.draw(Plot(title=evil, series=[Series(label=evil, points=[(0.0, 1.0), (1.0, 2.0)])], shown=str))
    found += plot.bars(evil, [Bar(label=evil, value=1.0, words=evil, interval=(0.5, 2.0))])
    found += plot.columns(evil, [(1.0, 2.0, 3.0)], evil)
    assert "<script" not in found
    assert "&lt;script" in found


def test_bars_stay_in_their_frame() -> None:
    found = plot.bars("t", [Bar(label="a", value=5.0, words="5"), Bar(label="b", value=-1.0, words="-1")], most=1.0)
    assert all(0 < float(width) <= plot.WIDTH for width in re.findall(r' width="([\d.]+)"', found))
