"""Curves as inline SVG, drawn with nothing else: few ticks, labels at the lines themselves, no script.

A curve of many steps is thinned by buckets that keep their lowest and highest point, so that no spike is lost. Colours
and fonts are the page's own (classes); hovering a stretch of a curve shows its numbers.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.webpage import safe

Point = tuple[float, float]

WIDTH, HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 104, 14, 28
BUCKETS = 240
"""Twice as many points at most are drawn of a curve: more than one for each pixel of a plot."""
_HOVERED = 60
_LABEL_GAP = 14.0
_SMOOTHED = 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points by rising x. ``label`` stands at the line's end, ``name`` (else the label) where one hovers.

    ``kind``: classes of the page's style. ``dots``: few measurements, each of which counts; else a line.
    """

    label: str
    points: Sequence[Point]
    kind: str = "main"
    dots: bool = False
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn into one frame. ``bound``: a level to compare with, and its label; ``shown`` writes a value.

    ``zero``: the axis begins at 0; else only where the values come near it.
    """

    title: str
    series: Sequence[Series]
    shown: Callable[[float], str]
    x_name: str = "step"
    bound: tuple[float, str] | None = None
    smooth: bool = False
    zero: bool = False


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most two points a bucket, its lowest and its highest, and always the first and the last."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for low, high in _spans(len(points), buckets):
        part = range(low, high)
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends | ({0} if low == 0 else set()))]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _spans(count: int, parts: int) -> list[tuple[int, int]]:
    edges = [count * index // parts for index in range(parts + 1)]
    return [(low, high) for low, high in itertools.pairwise(edges) if high > low]


def averaged(points: Sequence[Point], parts: int = _SMOOTHED) -> list[Point]:
    """The mean of each of ``parts`` stretches, in its middle."""
    found = []
    for low, high in _spans(len(points), min(parts, len(points))):
        part = points[low:high]
        found.append((sum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)))
    return found


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within a range, at most ``most`` of them and more than half as many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((size * power for size in (1, 2, 2.5, 5) if size * power >= rough), 10 * power)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + index) * step for index in range(count)]


@dataclass(frozen=True)
class _Frame:
    """Data → pixels."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        share = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / (high - low) if high > low else 0.5
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)


def draw(plot: Plot) -> str:
    """The plot as one ``<svg>``; a line of text where there is nothing to draw."""
    series = [one for one in plot.series if one.points]
    if not series:
        return '<p class="none">nothing was recorded</p>'
    frame = _frame(plot, series)
    parts = [_axes(plot, frame)]
    labels: list[tuple[float, str, str]] = []
    if plot.bound is not None:
        level, words = plot.bound
        y = frame.down(level)
        parts.append(f'<line class="bound" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        labels.append((y, "bound-label", words))
    for one in series:
        parts.append(_line(plot, frame, one))
        y = one.points[-1][1]
        words = f"{plot.shown(y)} {one.label}".strip()
        labels.append((frame.down(y), f"{one.kind} curve-label", words))
    if len(labels) * _LABEL_GAP <= HEIGHT - _TOP - _BOTTOM:  # else a key below the plot says which is which
        parts.append(_labels(labels))
    parts.append(_hover(plot, frame, series))
    name = safe(plot.title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _frame(plot: Plot, series: Sequence[Series]) -> _Frame:
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + ([plot.bound[0]] if plot.bound else [])
    low, high = min(ys), max(ys)
    if low >= 0 and (plot.zero or low <= high / 2 or low == high):
        low = 0.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Frame((min(xs), max(xs)), (low if low == 0 else low - room, high + room))


def _axes(plot: Plot, frame: _Frame) -> str:
    parts = []
    for value in ticks(*frame.y):
        y = frame.down(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 3.5, "tick end", plot.shown(value)))
    marks = [value for value in ticks(*frame.x, most=4) if value == int(value)]
    for value in marks:
        parts.append(_text(frame.across(value), HEIGHT - 11, "tick middle", f"{value:,.0f}"))
    parts.append(_text(WIDTH - _RIGHT + 20, HEIGHT - 11, "tick", plot.x_name))
    return "".join(parts)


def _text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{safe(words)}</text>'


def _line(plot: Plot, frame: _Frame, one: Series) -> str:
    if one.dots:
        line = f'<polyline class="line {one.kind}" points="{frame.path(one.points)}"/>'
        dots = (
            f'<circle class="{one.kind}" cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}" r="3"/>'
            for x, y in one.points
        )
        return line + "".join(dots)
    if len(one.points) == 1:
        ((x, y),) = one.points
        return f'<circle class="{one.kind}" cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}" r="3"/>'
    every = frame.path(thinned(one.points))
    if not plot.smooth or len(one.points) < 3 * _SMOOTHED:
        return f'<polyline class="line {one.kind}" points="{every}"/>'
    mean = frame.path(averaged(one.points))
    return (
        f'<polyline class="line faint {one.kind}" points="{every}"/><polyline class="line {one.kind}" points="{mean}"/>'
    )


def _labels(labels: list[tuple[float, str, str]]) -> str:
    """At the right, each at its line, moved apart where they would touch and kept above the axis."""
    places: list[float] = []
    for y, _, _ in sorted(labels):
        places.append(max(y, places[-1] + _LABEL_GAP) if places else y)
    low = max(0.0, places[-1] - (HEIGHT - _BOTTOM))
    return "".join(
        _text(WIDTH - _RIGHT + 8, place - low + 3.5, kind, words)
        for place, (_, kind, words) in zip(places, sorted(labels), strict=True)
    )


def _hover(plot: Plot, frame: _Frame, series: Sequence[Series]) -> str:
    """Invisible columns whose titles a browser shows: the steps that they stand for, and the range of values there."""
    every = sorted({x for one in series for x, _ in one.points})
    places = [[x for x, _ in one.points] for one in series]
    parts = []
    for low, high in _spans(len(every), min(_HOVERED, len(every))):
        first, last = every[low], every[high - 1]
        left = frame.across((every[low - 1] + first) / 2) if low else _LEFT
        right = frame.across((every[high] + last) / 2) if high < len(every) else WIDTH - _RIGHT
        said = [f"{plot.x_name} {first:,.0f}" if first == last else f"{plot.x_name} {first:,.0f} to {last:,.0f}"]
        for one, xs in zip(series, places, strict=True):
            values = [y for _, y in one.points[bisect.bisect_left(xs, first) : bisect.bisect_right(xs, last)]]
            if values:
                span = dict.fromkeys((plot.shown(min(values)), plot.shown(max(values))))
                said.append(f"{one.name or one.label or plot.title}: {' to '.join(span)}")
        title = safe("\n".join(said))
        parts.append(
            f'<rect class="hover" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0.5):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{title}</title></rect>'
        )
    return "".join(parts)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A measured amount beside its name; ``interval`` is drawn where it is known."""

    label: str
    value: float
    words: str
    interval: Point | None = None
    kind: str = "main"


def bars(title: str, rows: Sequence[Bar], most: float | None = None) -> str:
    """Amounts one below the other from zero, each with its name and its number."""
    top = most or max((row.value for row in rows), default=0) or 1.0
    left, wide, each = 104, WIDTH - 104 - 110, 26
    parts = []
    for index, row in enumerate(rows):
        y, length = index * each, min(1.0, max(0.0, row.value / top)) * wide
        parts.append(_text(left - 8, y + 17, "tick end", row.label))
        parts.append(
            f'<rect class="bar {row.kind}" x="{left}" y="{y + 6}" width="{max(length, 1):.1f}" height="14" rx="1"/>'
        )
        end = length
        if row.interval is not None:
            low, high = (min(1.0, max(0.0, value / top)) * wide for value in row.interval)
            parts.append(
                f'<line class="interval" x1="{left + low:.1f}" x2="{left + high:.1f}" y1="{y + 13}" y2="{y + 13}"/>'
            )
            end = max(length, high)
        parts.append(_text(left + end + 8, y + 17, "label", row.words))
    name = safe(title)
    return f'<svg viewBox="0 0 {WIDTH} {len(rows) * each + 6}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def columns(title: str, bins: Sequence[tuple[float, float, float]], unit: str) -> str:
    """A histogram of (from, to, count); hovering a column shows its numbers."""
    if not bins:
        return '<p class="none">nothing was recorded</p>'
    frame = _Frame((bins[0][0], bins[-1][1] + 1), (0.0, max(count for _, _, count in bins) or 1.0))
    parts = [_text(WIDTH - _RIGHT + 20, HEIGHT - 11, "tick", unit)]
    for value in ticks(*frame.y):
        y = frame.down(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 3.5, "tick end", f"{value:,.6g}"))
    parts += [_text(frame.across(x), HEIGHT - 11, "tick middle", f"{x:,.0f}") for x in ticks(*frame.x)]
    for low, high, count in bins:
        x, y = frame.across(low), frame.down(count)
        width = max(1.0, frame.across(high + 1) - x - 1)
        span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        parts.append(
            f'<rect class="bar main" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}"><title>{span} {safe(unit)}: {count:,.0f}</title></rect>'
        )
    name = safe(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
