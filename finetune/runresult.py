"""What a run achieved: the few numbers that one looks for first, every judgement, and answers side by side."""

from __future__ import annotations

from typing import Any

from finetune import scores
from finetune.plot import Bar, averaged, bars
from finetune.runsections import ROWS, took
from finetune.runstory import Story, number, part
from finetune.terminal import clean, size
from finetune.webpage import safe, table, words

_ANSWERS, _TEXT = 8, 700
_BETWEEN = 6
_DRAWN = 11


def figures(story: Story) -> str:
    """The few numbers that one looks for first."""
    found: list[tuple[str, str, str]] = []
    ends = story.first_and_last()
    for key, name, shown in (
        ("exact_match", "exact match", _percent), ("reward_accuracy", scores.label("reward_accuracy"), _percent),
        ("loss", "held-out loss", "{:.3f}".format),
    ):  # fmt: skip
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
    drawn = []
    for name, values in judged[:ROWS]:
        exact, span = number(values.get("exact_match")), scores.interval(values, "exact_match")
        if exact is not None:
            shown = {"label": clean(name, 16), "words": _percent(exact), "kind": "soft"}
            drawn.append(Bar(value=exact, interval=span, **shown))
    picture = f"<figure>{bars('exact match', [*drawn[:1], *drawn[1:][-_DRAWN:]], 1.0)}</figure>" if drawn else ""
    return f"{picture}{_judgements(dict(judged[:ROWS]))}"


def _judgements(judged: dict[str, dict[str, Any]]) -> str:
    """Scores by the judgement's name, as a table."""
    metrics = scores.metrics(judged) or ["exact_match"]
    rows = []
    for name, values in judged.items():
        cells = []
        for metric in metrics:
            value, span = number(values.get(metric)), scores.interval(values, metric)
            cells += [
                f"{value:.3f}" if value is not None else "–",
                f"{span[0]:.3f} – {span[1]:.3f}" if span and value is not None else "–",
            ]
        loss, count = number(values.get("loss")), number(values.get("rows")) or 0
        rows.append([words(name, 60), *cells, f"{loss:.4f}" if loss is not None else "–", f"{count:,.0f}"])
        for name_of, value in scores.parts(values)[:50]:
            quiet = f'<span class="quiet">{words(name_of, 80)}</span>'
            rows.append([quiet, *[""] * len(cells), f"{value:.4f}", ""])
    heads = [head for metric in metrics for head in (scores.label(metric), "95 % interval")]
    return table(("judged", *heads, "loss", "rows"), rows, numbers=len(heads) + 2)


def evaluation(story: Story) -> str:
    """What ``finetune eval`` measured last: base, adapter and merged model on the held-out rows and on tasks."""
    judged = {str(name): one for name, one in part(story.evaluation, "scores").items() if isinstance(one, dict)}
    tasks = part(story.evaluation, "tasks")
    names = list(dict.fromkeys(name for one in tasks.values() if isinstance(one, dict) for name in one))[:ROWS]
    rows = []
    for task, by_name in [(task, one) for task, one in tasks.items() if isinstance(one, dict)][:ROWS]:
        found = {name: part(by_name, name) for name in names}
        for metric in dict.fromkeys(metric for one in found.values() for metric in one):
            values = [number(found[name].get(metric)) for name in names]
            shown = [f"{value:.4f}" if value is not None else "–" for value in values]
            rows.append([words(task, 80), words(metric, 60), *shown])
    heads = ("task", "metric", *(clean(name, 40) for name in names))
    on = story.evaluation.get("data")
    said = f"<p>Judged on {words(str(on), 200)}.</p>" if on and judged else ""
    said += _judgements(dict(list(judged.items())[:ROWS])) if judged else ""
    return said + (table(heads, rows, numbers=len(names)) if rows else "")


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
