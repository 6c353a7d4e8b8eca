"""A comparison as one page: which run is better, how each went, their curves over one another, what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune import compare, webpage
from finetune.plot import Plot, Series, draw
from finetune.runsections import short
from finetune.webpage import SERIES, safe, table, words

_CURVES = (
    ("training", "training loss", "by step; of a long run the range, and in it the mean of each stretch"),
    ("held_out", "held-out loss", "at each judgement; step 0 is the bare base"),
)

_FIGURES = 6


def page(found: Mapping[str, Any]) -> str:
    """The comparison that ``compare.compare`` made. Names, keys and values are somebody else's text."""
    names = [run["name"] for run in found["runs"]]
    title = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    lead = f"<p>{len(names)} runs side by side, each compared with the first: {words(names[0])}.</p>"
    return webpage.page(
        title=title, kind="finetune comparison", lead=lead + _figures(found["runs"]), sections=_sections(found)
    )


def _figures(runs: Sequence[Mapping[str, Any]]) -> str:
    """The numbers that one looks for first: exact match where it was judged, else the held-out loss."""
    cells = []
    for run in runs[:_FIGURES]:
        judged = run["judged"] or {}
        exact = [(f"{judged['exact_match']['value']:.1%}", "exact match")] if "exact_match" in judged else []
        loss = [(f"{judged['loss']['value']:.4f}", "held-out loss")] if "loss" in judged else []
        if said := exact + loss:
            below = ", ".join([said[0][1], *(f"{name} {value}" for value, name in said[1:])])
            cells.append(f"<div><dt>{words(run['name'], 40)}</dt><dd>{said[0][0]}<small>{below}</small></dd></div>")
    return f'<dl class="figures">{"".join(cells)}</dl>' if cells else ""


def _sections(found: Mapping[str, Any]) -> Iterator[str]:
    cautions = "".join(f'<p class="quiet">{safe(one)}</p>' for one in compare.cautions(found))
    yield webpage.section("Which is better?", "".join(map(_answer, found["answers"])) + cautions)
    note = '<p class="quiet">Training loss: mean of the last tenth of the steps. In brackets: 95 % intervals.</p>'
    yield webpage.section("How each went", _table(compare.table(found)) + note)
    yield webpage.section("Curves", _plots(found["curves"]))
    tables = [compare.difference_table(found, part) for part in compare.DIFFERENCES]
    same = ", ".join(rows[0][0] for rows in tables if len(rows) == 1)
    differing = "".join(_table(rows) for rows in tables if len(rows) > 1)
    yield webpage.section("What differs", differing + (f'<p class="quiet">the same: {safe(same)}</p>' if same else ""))


def _answer(answer: Mapping[str, Any]) -> str:
    said = {one["answer"] for one in answer["measures"].values()} - {"equal", "refused"}
    kind = said.pop() if len(said) == 1 else ""
    mark = f" {kind}" if kind in ("better", "worse") else ""
    lines = "".join(f"<p>{safe(line)}</p>" for line in compare.sentences(answer))
    question = compare.question(answer)
    return f'<div class="answer{mark}"><h3>{safe(question[:1].upper() + question[1:])}</h3>{lines}</div>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table([str(one) for one in rows[0]], ([words(cell, 2000) for cell in row] for row in rows[1:]))


def _plots(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Each run has the same colour in every plot, and a dash that tells it apart without colour."""
    kinds = {name: f"s{n % SERIES} d{(n + n // SERIES) % SERIES}" for n, name in enumerate(curves)}
    drawn = []
    for key, title, note in _CURVES:
        series = [
            Series(
                label="", name=name, kind=kinds[name], dots=key == "held_out", points=[(x, y) for x, y in points[key]]
            )
            for name, points in curves.items()
            if points[key]
        ]
        if series:
            picture = draw(Plot(title=title, series=series, shown=short, smooth=True))
            drawn.append(f'<figure><figcaption>{title}</figcaption>{picture}<p class="quiet">{note}</p></figure>')
    if not drawn:
        return ""
    key = "".join(
        f'<li><svg viewBox="0 0 28 10"><line class="line {kind}" x2="28" y1="5" y2="5"/></svg>{words(name)}</li>'
        for name, kind in kinds.items()
    )
    return f'<ul class="key">{key}</ul><div class="plots">{"".join(drawn)}</div>'
