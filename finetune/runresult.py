"""What a run achieved: the few numbers that one looks for first, every judgement, and answers side by side."""

from __future__ import annotations

from typing import Any

from finetune.plot import Bar, averaged, bars
from finetune.runsections import ROWS, took
from finetune.runstory import Story, listed, number, part
from finetune.terminal import clean, size
from finetune.webpage import safe, table, words

_ANSWERS, _TEXT = 8, 700
_BETWEEN = 6
_DRAWN = 11


def figures(story: Story) -> str:
    """The few numbers that one looks for first."""
    found: list[tuple[str, str, str]] = []
    ends = story.first_and_last()
    for key, name, shown in (("exact_match", "exact match", _percent), ("loss", "held-out loss", "{:.3f}".format)):
        values = [number(story.scores[one].get(key)) for one in ends] if ends else []
        if len(values) == 2 and values[0] is not None and values[1] is not None:
            found.append((name, shown(values[1]), f"before: {shown(values[0])}"))
    if story.step:
        speed = story.curves["tokens_per_second"]
        pace = f"{averaged(speed, 1)[0][1]:,.0f} tokens/s on average" if speed else ""
        found.append(("steps", f"{story.step:,}", f"of {story.total:,}" if not story.finished else pace))
        predicted = number(story.plan.get("seconds"))
        found.append(
            ("time of the steps", took(story.seconds), f"with judging {took(predicted)} planned" if predicted else "")
        )
    if story.peak:
        planned = number(story.plan.get("memory"))
        found.append(("peak memory", size(story.peak), f"{size(planned)} planned" if planned else ""))
    cells = "".join(f"<div><dt>{safe(a)}</dt><dd>{safe(b)}<small>{safe(c)}</small></dd></div>" for a, b, c in found)
    return f'<dl class="figures">{cells}</dl>' if cells else ""


def _percent(value: float) -> str:
    return f"{value:.1%}"


def result(story: Story) -> str:
    """Every judgement: a picture of exact matches, and the table."""
    judged = story.judged()
    if not judged:
        return ""
    rows, drawn = [], []
    for name, values in judged[:ROWS]:
        exact, loss = number(values.get("exact_match")), number(values.get("loss"))
        interval = [number(one) for one in listed(values, "confidence_interval")]
        span = (interval[0], interval[1]) if len(interval) == 2 and None not in interval else None
        if exact is not None:
            shown = {"label": clean(name, 16), "words": _percent(exact), "kind": "soft"}
            drawn.append(Bar(value=exact, interval=span, **shown))  # type: ignore[arg-type]
        rows.append([
            words(name, 60), f"{exact:.3f}" if exact is not None else "–",
            f"{span[0]:.3f} – {span[1]:.3f}" if span else "–", f"{loss:.4f}" if loss is not None else "–",
            f"{number(values.get('rows')) or 0:,.0f}",
        ])  # fmt: skip
        for source, value in sorted(part(values, "loss_by_source").items())[:50]:
            rows.append([f'<span class="quiet">{words(source, 80)}</span>', "", "", f"{number(value) or 0:.4f}", ""])
    heads = ("judged", "exact match", "95 % interval", "loss", "rows")
    picture = f"<figure>{bars('exact match', [*drawn[:1], *drawn[1:][-_DRAWN:]], 1.0)}</figure>" if drawn else ""
    return f"{picture}{table(heads, rows, numbers=4)}"


def answers(story: Story) -> str:
    """Rows whose answer changed from wrong to right, from right to wrong, or stayed wrong, side by side."""
    ends = story.first_and_last()
    if ends is None or not story.answers:
        return ""
    first, last = ends
    kinds: dict[str, list[dict[str, str]]] = {"became right": [], "became wrong": [], "still wrong": [], "right": []}
    for one in story.answers:
        if first in one and last in one:
            was, now = (one[name] == one.get("expected") for name in ends)
            kinds[("right" if was else "became right") if now else ("became wrong" if was else "still wrong")].append(
                one
            )
    asked = part(story.data, "asked")
    counts = ", ".join(f"{len(rows):,} {kind}" for kind, rows in kinds.items())
    parts = [f"<p>Of {sum(map(len, kinds.values())):,} held-out rows: {counts}.</p>"]
    for kind, rows in kinds.items():
        if rows:
            more = f" · the first {_ANSWERS} of {len(rows):,}" if len(rows) > _ANSWERS else ""
            parts.append(f"<h3>{kind}<small>{more}</small></h3>")
            parts += [_answer(one, asked.get(one.get("row", "")), first, last) for one in rows[:_ANSWERS]]
    return "".join(parts)


def _answer(one: dict[str, str], asked: Any, first: str, last: str) -> str:
    expected = one.get("expected", "")
    question = f'<p class="asked">{_passage(asked.strip())}</p>' if isinstance(asked, str) else ""
    cells = [("expected", expected, "")]
    for name, who in ((first, "base"), (last, "adapter" if last == "after" else f"adapter, {last}")):
        cells.append((who, one[name], "right" if one[name] == expected else "wrong"))
    shown = "".join(
        f'<div class="{kind}"><dt>{words(who, 60)}{_mark(kind)}</dt><dd>{_passage(text)}</dd></div>'
        for who, text, kind in cells
    )
    where = f'<p class="where">{words(one.get("row", ""), 120)}</p>'
    return f'<article>{where}{question}<dl class="sides">{shown}</dl>{_between(one, first, last)}</article>'


def _between(one: dict[str, str], first: str, last: str) -> str:
    """The answers of the evaluations in between, folded away."""
    names = [name for name in one if name.startswith("step ") and name not in (first, last)][-_BETWEEN:]
    rows = "".join(f"<div><dt>{words(name, 60)}</dt><dd>{_passage(one[name])}</dd></div>" for name in names)
    return f'<details><summary>in between</summary><dl class="facts">{rows}</dl></details>' if rows else ""


def _mark(kind: str) -> str:
    return {"right": " ✓", "wrong": " ✗"}.get(kind, "")


def _passage(text: str) -> str:
    """Text of several lines, cut where it is long."""
    cut = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    return safe("\n".join(clean(line, _TEXT) for line in cut.split("\n"))) or '<span class="quiet">(empty)</span>'
