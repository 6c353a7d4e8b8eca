"""The sections of a run's report, each a piece of HTML from the run's story; a section without facts is left out.

All that comes from files goes through ``webpage.words`` or ``safe``: it can be read and do nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from finetune import datashow
from finetune.datashow import Piece
from finetune.plot import Bar, Plot, Series, bars, columns, draw
from finetune.runstory import Story, listed, number, part
from finetune.terminal import clean, duration, size
from finetune.webpage import safe, table, words

_PARTS = ("weights", "teacher", "adapter", "gradients", "optimizer", "activations", "head", "generation", "overhead")
_KINDS = ("trained", "end", "frame", "read")
ROWS = 200
_NUMBERS = 20
_REWARDS = 6
"""Rewards whose curves are drawn."""


def took(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def short(value: float) -> str:
    """A number in few characters."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def training(story: Story) -> str:
    """The curves of the steps, and their numbers as a table."""
    curves = story.curves
    if not curves["loss"]:
        return ""
    planned = number(story.plan.get("memory"))
    large = story.peak >= 1e9
    unit = 1e9 if large else 1e6
    plots = [
        Plot(
            title="loss", shown=short, smooth=True,
            series=[
                Series(label="training", points=curves["loss"]),
                Series(label="held-out", points=story.at_steps("loss"), kind="second", dots=True),
            ],
        ),
        *_judging(story),
        *_teaching(story),
        *_sampling(story),
        Plot(title="learning rate", shown=short, series=[Series(label="", points=curves["learning_rate"])]),
        Plot(title="gradient norm", shown=short, smooth=True, series=[Series(label="", points=curves["grad_norm"])]),
        Plot(
            title="tokens per second", shown=short, smooth=True, zero=True,
            series=[Series(label="", points=curves["tokens_per_second"])],
        ),
        Plot(
            title=f"peak memory, {'GB' if large else 'MB'}", shown=short, zero=True,
            series=[Series(label="", points=[(x, y / unit) for x, y in curves["memory"]])],
            bound=(planned / unit, f"{short(planned / unit)} planned") if planned else None,
        ),
    ]  # fmt: skip
    drawn = "".join(
        f"<figure><figcaption>{safe(one.title)}</figcaption>{draw(one)}</figure>"
        for one in plots
        if any(series.points for series in one.series)
    )
    return f'<div class="plots">{drawn}</div>{_numbers(story)}'


def _judging(story: Story) -> list[Plot]:
    """The curves of an objective that learns from judged answers."""
    curves = story.curves

    def two(title: str, name: str) -> Plot:
        sides = [("chosen", "main"), ("rejected", "second")]
        series = [Series(label=side, points=curves[f"{name}/{side}"], kind=kind) for side, kind in sides]
        return Plot(title=title, shown=short, smooth=True, series=series)

    def one(title: str, name: str, held_out: str) -> Plot:
        series = [Series(label="training", points=curves[name])]
        if held_out:
            series.append(Series(label="held-out", points=story.at_steps(held_out), kind="second", dots=True))
        return Plot(title=title, shown=short, smooth=True, series=series)

    if not curves["rewards/margins"]:
        return []
    return [
        one("margin of the rewards", "rewards/margins", "reward_margin"),
        one("rewards right", "rewards/accuracies", "reward_accuracy"),
        two("rewards", "rewards"), two("log-probabilities", "logps"), one("KL: the zero point", "kl", ""),
    ]  # fmt: skip


def _teaching(story: Story) -> list[Plot]:
    """The curves of a run that learns from a teacher."""
    curves = story.curves
    if not curves["divergence"]:
        return []
    apart = [
        Series(label="training", points=curves["divergence"]),
        Series(label="held-out KL", points=story.at_steps("teacher_kl"), kind="second", dots=True),
    ]
    own = [Series(label="", points=curves["cross_entropy"])]
    return [
        Plot(title="divergence from the teacher", shown=short, smooth=True, zero=True, series=apart),
        Plot(title="cross-entropy of the answers", shown=short, smooth=True, series=own),
    ]


def _sampling(story: Story) -> list[Plot]:
    """The curves of an objective that answers by itself and is rewarded."""
    curves = story.curves
    if not curves["reward"]:
        return []
    kinds = itertools.cycle(("main", "second"))
    names = sorted(name for name in curves if name.startswith("rewards/") and name.endswith("/mean"))[:_REWARDS]
    parts = [
        Series(label=clean(name.split("/")[1], 40), points=curves[name], kind=kind)
        for name, kind in zip(names, kinds, strict=False)
    ]

    def one(title: str, name: str) -> Plot:
        return Plot(title=title, shown=short, smooth=True, series=[Series(label="", points=curves[name])])

    each = [Plot(title="rewards", shown=short, smooth=True, series=parts)] if parts[1:] else []
    return [
        one("reward", "reward"), *each,
        one("groups whose answers earn the same", "frac_reward_zero_std"), one("KL from the reference", "kl"),
        one("tokens of an answer", "completions/mean_length"), one("answers cut off", "completions/clipped_ratio"),
    ]  # fmt: skip


def _numbers(story: Story) -> str:
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory")
    at = {name: dict(story.curves[name]) for name in names}
    steps = [step for step, _ in story.curves["loss"]]
    chosen = sorted(
        {round(index * (len(steps) - 1) / max(1, _NUMBERS - 1)) for index in range(_NUMBERS)} & set(range(len(steps)))
    )
    rows = []
    for step in (steps[index] for index in chosen):
        values = [f"{at[name][step]:.5g}" if step in at[name] else "–" for name in names[:4]]
        memory = size(at["memory"][step]) if step in at["memory"] else "–"
        rows.append([f"{step:,.0f}", *values, memory])
    heads = ("step", "loss", "learning rate", "gradient norm", "tokens/s", "peak memory")
    return f"<details><summary>numbers of {len(rows)} steps</summary>{table(heads, rows, numbers=6)}</details>"


def data(story: Story) -> str:
    """What was trained on in numbers, and samples token by token."""
    found = story.data
    if not found:
        return ""
    rows = [
        [
            words(one.get("name"), 120),
            *(f"{number(one.get(key)) or 0:,.0f}" for key in ("samples", "tokens", "supervised")),
        ]
        for one in listed(found, "sources")[:ROWS]
        if isinstance(one, dict)
    ]
    counts = table(("source", "samples", "tokens", "supervised"), rows, numbers=3)
    bins = [tuple(number(one.get(key)) for key in ("from", "to", "samples")) for one in listed(found, "lengths")[:100]
            if isinstance(one, dict)]  # fmt: skip
    whole = [(low, high, count) for low, high, count in bins if None not in (low, high, count)]
    lengths = columns("samples by length", whole, "tokens")  # type: ignore[arg-type]
    held = f"{number(found.get('held_out')) or 0:,.0f} rows are held out to judge by."
    left = "; ".join(f"{count:,} rows {words(done, 40)}" for done, count in sorted(story.left.items()))
    said = f"{held} Not taken as they stand: {left}." if left else held
    shown = "".join(_sample(one) for one in listed(found, "shown")[:4] if isinstance(one, dict))
    figure = f"<figure><figcaption>samples by length</figcaption>{lengths}</figure>"
    tokens = f'<div class="tokens"><p>{datashow.LEGEND}.</p>{shown}</div>'
    return f'{counts}<p>{said}</p><div class="plots">{figure}</div>{tokens}'


def _sample(one: dict[str, Any]) -> str:
    more = number(one.get("more"))
    rest = f'<p class="quiet">and {more:,.0f} more tokens</p>' if more else ""
    return f"<h3>{words(one.get('summary', ''), 200)}</h3>{datashow.block(list(_pieces(one)))}{rest}"


def _pieces(one: dict[str, Any]) -> Iterator[Piece]:
    for piece in listed(one, "pieces")[:600]:
        if isinstance(piece, dict) and piece.get("kind") in _KINDS:
            ids = tuple(int(number(token) or 0) for token in listed(piece, "ids")[:16])
            text = str(piece.get("text", ""))[:200]
            yield Piece(text=text, ids=ids, kind=piece["kind"], weight=number(piece.get("weight")) or 0.0)


def plan(story: Story) -> str:
    """What was predicted, beside what came."""
    planned, seconds = number(story.plan.get("memory")), number(story.plan.get("seconds"))
    drawn = [Bar(label=name, value=value, words=size(value), kind="soft") for name in _PARTS
             if (value := number(part(story.plan, "budget").get(name)))]  # fmt: skip
    pairs = [
        ("peak memory", size(planned) if planned else "–", size(story.peak) if story.peak else "–"),
        (
            "time",
            f"{took(seconds)} with {_times(story)}" if seconds else "–",
            f"{took(story.seconds)}, the steps alone" if story.seconds else "–",
        ),
    ]
    compared = table(("", "planned", "measured"), [[safe(one) for one in pair] for pair in pairs], numbers=2)
    picture = f"<figure><figcaption>planned memory</figcaption>{bars('planned memory', drawn)}</figure>"
    return f'{compared}<div class="plots">{picture if drawn else ""}</div>' if planned or story.peak else ""


def _times(story: Story) -> str:
    return "judging" if story.scores or number(story.data.get("held_out")) else "nothing judged"


def notes(story: Story) -> str:
    """What is to be known of this run: remarks of the plan, what it did not check, what gave way on the road."""
    said = [str(one) for one in listed(story.plan, "notes")]
    said += [f"not checked: {one}" for one in listed(story.plan, "unchecked")]
    for one in listed(part(story.identity, "resolved"), "fallbacks"):
        if isinstance(one, dict):
            settings = ", ".join(f"{key} {value}" for key, value in one.items() if key != "step")
            said.append(f"out of memory at step {one.get('step')}: from it on {settings}")
    steps = max(story.step, int(number(story.end.get("steps")) or 0))
    if (missing := steps - len(story.curves["loss"])) > 0:
        said.append(f"metrics.jsonl lacks {missing:,} of {steps:,} steps: curves, time and speed are of the others")
    if story.end and not story.scores and number(story.data.get("held_out")):
        said.append("scores.json is lost or damaged: what was judged is not shown")
    if others := [str(one) for one in listed(story.identity, "together")]:
        said.append(f"trained in the same passes as {', '.join(others)}")
    items = "".join(f"<li>{words(one, 500)}</li>" for one in said[:ROWS])
    return f"<ul>{items}</ul>" if items else ""


def identity(story: Story) -> str:
    """Where and from what: the machine, the digests, the recipe with every default."""
    parts = []
    groups = {
        "environment": part(story.identity, "environment"),
        "what auto became": {
            key: value for key, value in part(story.identity, "resolved").items() if key != "fallbacks"
        },
        "sha-256 of the base": part(story.identity, "base"),
        "sha-256 of the data": part(story.identity, "data"),
        "sha-256 of the adapter": story.digests,
    }
    for title, found in groups.items():
        if found:
            rows = "".join(
                f"<div><dt>{words(key, 120)}</dt><dd>{words(value, 200)}</dd></div>"
                for key, value in list(found.items())[:ROWS]
            )
            parts.append(f'<h3>{safe(title)}</h3><dl class="facts">{rows}</dl>')
    if story.recipe:
        text = "\n".join(clean(line, 400) for line in story.recipe[:60_000].split("\n"))
        parts.append(f"<details><summary>the recipe, with every default</summary><pre>{safe(text)}</pre></details>")
    return "".join(parts)
