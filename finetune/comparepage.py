"""A comparison as one page that needs nothing else: no script, no font, no request; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune import compare
from finetune.datashow import safe

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 320, 62, 40, 12, 16
_POINTS = 600
"""Points of one curve; of a longer run each is the mean of its stretch."""
_STYLES = 6
_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --paper: #fff; --soft: #667; --line: #d8dbe0; --yes: #13795b;
--no: #b3261e; --s0: #1f6feb; --s1: #d1242f; --s2: #1a7f37; --s3: #8250df; --s4: #bc4c00; --s5: #0b7285 }}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: #e4e6ea; --paper: #15171a; --soft: #9aa3af; --line: #3a3f46; --yes: #4cc38a; --no: #ff8a80;
--s0: #6ea8fe; --s1: #ff7b72; --s2: #56d364; --s3: #c297ff; --s4: #ffa657; --s5: #5ad1e0 }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }}
body {{ color: var(--ink); background: var(--paper); overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; line-height: 1.25 }} h2 {{ font-size: 1.1rem; margin-top: 2.2rem }}
.soft, figcaption {{ color: var(--soft); font-size: .9rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem; min-width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }}
th {{ color: var(--soft); font-weight: 600 }}
td, th {{ min-width: 5rem }}
.answer {{ border-left: 4px solid var(--line); padding: .1rem 0 .1rem .9rem; margin: 1rem 0 }}
.better {{ border-color: var(--yes) }} .worse {{ border-color: var(--no) }}
.answer p {{ margin: .3rem 0 }} .answer strong {{ display: block }}
figure {{ margin: 1rem 0 }} svg {{ width: 100%; height: auto; display: block }}
svg text {{ font: 12px system-ui, sans-serif; fill: var(--soft) }}
.grid {{ stroke: var(--line) }}
.curve {{ fill: none; stroke-width: 1.8; stroke-linejoin: round }}
{series}
ul.key {{ list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .9rem }}
ul.key svg {{ width: 28px; height: 10px; display: inline-block; margin-right: .4rem }}
@media print {{ body {{ max-width: none; padding: 0 }} figure, .answer {{ break-inside: avoid }} }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
_DASHES = ("none", "9 3", "2 3", "12 3 2 3", "6 2", "1 4")
_SERIES = "\n".join(
    f".s{index} {{ stroke: var(--s{index}) }} .dot.s{index} {{ fill: var(--s{index}); stroke: var(--paper) }}"
    for index in range(_STYLES)
)


def page(found: Mapping[str, Any]) -> str:
    """The comparison that ``compare.compare`` made. Names, keys and values are somebody else's text."""
    names = [run["name"] for run in found["runs"]]
    title = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: compared"
    return _PAGE.format(title=safe(title), series=_SERIES, body="\n".join(_sections(found)))


def _sections(found: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Which is better?</h2>"
    yield from map(_answer, found["answers"])
    yield from (f'<p class="soft">{safe(caution)}</p>' for caution in compare.cautions(found))
    yield "<h2>How each went</h2>"
    yield _table(compare.table(found))
    yield '<p class="soft">Training loss: mean of the last tenth of the steps. In brackets: 95 % intervals.</p>'
    for kind, title, note in (
        (
            "training",
            "Training loss",
            f"By step; a run of more than {_POINTS} steps is drawn by the means of stretches.",
        ),
        ("held_out", "Held-out loss", "At each judgement; step 0 is the bare base."),
    ):
        curves = {name: points[kind] for name, points in found["curves"].items() if points[kind]}
        if curves:
            yield f"<h2>{title}</h2>\n<figure>{_plot(curves, list(found['curves']), title, dots=kind == 'held_out')}"
            yield f"<figcaption>{safe(note)}</figcaption></figure>"
    yield "<h2>What differs</h2>"
    for part, title in compare.DIFFERENCES.items():
        rows = compare.difference_table(found, part)
        yield _table(rows) if len(rows) > 1 else f'<p class="soft">{safe(title)}: the same</p>'


def _answer(answer: Mapping[str, Any]) -> str:
    said = {one["answer"] for one in answer["measures"].values()} - {"equal", "refused"}
    kind = said.pop() if len(said) == 1 else ""
    mark = f" {kind}" if kind in ("better", "worse") else ""
    lines = "".join(f"<p>{safe(line)}</p>" for line in compare.sentences(answer))
    return f'<div class="answer{mark}"><strong>{safe(_capital(compare.question(answer)))}</strong>{lines}</div>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{safe(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plot(curves: Mapping[str, Sequence[Sequence[float]]], order: Sequence[str], title: str, *, dots: bool) -> str:
    """Curves over one another as SVG; each has the same colour in every plot."""
    thinned = {name: _thinned(points) for name, points in curves.items()}
    steps = _ticks(*_range(point[0] for points in thinned.values() for point in points))
    losses = _ticks(*_range(point[1] for points in thinned.values() for point in points))
    across, up = _scale(steps, _LEFT, _WIDTH - _RIGHT), _scale(losses, _HEIGHT - _BOTTOM, _TOP)
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{safe(title)} by step">']
    for value in losses:
        y = f"{up(value):.1f}"
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:.4g}</text>')
    for value in steps:
        drawn.append(f'<text x="{across(value):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{value:,.4g}</text>')
    drawn.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">step</text>')
    for name, points in thinned.items():
        style = _style(order.index(name))
        places = [(across(step), up(loss)) for step, loss in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(
            f'<polyline class="curve {style[0]}" {style[1]} points="{line}"><title>{safe(name)}</title></polyline>'
        )
        if dots or len(points) == 1:
            drawn += [
                f'<circle class="dot {style[0]}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>'
                f"{safe(name)}: {loss:.4f} at step {step:g}</title></circle>"
                for (x, y), (step, loss) in zip(places, points, strict=True)
            ]
    return "".join(drawn) + "</svg>" + _key([(name, _style(order.index(name))) for name in thinned])


def _key(entries: Sequence[tuple[str, tuple[str, str]]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 28 10"><line class="curve {style}" {dash} x2="28" y1="5" y2="5"/></svg>'
        f"{safe(name)}</li>"
        for name, (style, dash) in entries
    )
    return f'<ul class="key">{items}</ul>'


def _style(index: int) -> tuple[str, str]:
    """Colour by run, and a dash that tells them apart without colour."""
    return f"s{index % _STYLES}", f'stroke-dasharray="{_DASHES[(index + index // _STYLES) % len(_DASHES)]}"'


def _thinned(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _POINTS)
    stretches = [points[low : low + size] for low in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(loss for _, loss in part) / len(part)) for part in stretches]


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, the first at most ``low`` and the last at least ``high``."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [width * count for count in range(math.floor(low / width), math.ceil(high / width) + 1)]


def _scale(ticks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = ticks[0], ticks[-1]
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)
