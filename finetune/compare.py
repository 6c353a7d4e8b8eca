"""Runs side by side: what differs between them, how each went, and whether one is better than another.

Rows are paired by what they say, so that runs on other files, folders or machines can be compared where they were
judged on the same rows; the answer may be that these rows cannot tell. No model is asked and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from finetune import bootstrap, evals, runview, scores
from finetune.errors import EnvironmentFault
from finetune.runview import Judgement, View
from finetune.terminal import clean

_NOT_THE_RUN = {"output", "tracker"}
"""Keys that no number hangs on."""
_WIDEST = 40
"""Cells of a table's column on a terminal; what is longer of a run's state is said below the table."""
_WHOLE = 1000


def compare(folders: Sequence[Path], *, picked: bool = False) -> dict[str, Any]:
    """Everything that is to be said of two runs or more; each is compared with the first.

    ``picked``: the first was chosen by these very scores, so that all pairs have been looked at, not only its own.

    Raises:
        EnvironmentFault: a folder holds no run, or fewer than two runs are named.
    """
    distinct = {folder.resolve(): folder for folder in reversed(folders)}
    if len(folders) < 2 or len(distinct) < len(folders):
        raise EnvironmentFault("a comparison needs two different runs", str(folders[0]), "name another one")
    views = named([runview.view(folder) for folder in folders])
    first, others = views[0], views[1:]
    looks = len(views) * len(others) // 2 if picked else len(others)
    return {
        "runs": [told(view) for view in views],
        "recipe": _differences({view.name: view.identity.recipe for view in views}, but=_NOT_THE_RUN),
        "resolved": _differences({view.name: view.identity.resolved for view in views}),
        "data": _files({view.name: view.identity.data for view in views}),
        "base": _files({view.name: view.identity.base for view in views}),
        "environment": _differences({view.name: view.identity.environment for view in views}),
        "level": 1 - 0.05 / looks,
        "looks": looks,
        "picked": picked,
        "answers": [
            {"run": other.name, "against": first.name} | _answers(first, other, 1 - 0.05 / looks) for other in others
        ],
        "curves": {view.name: {"training": list(view.curve), "held_out": list(view.held_out)} for view in views},
    }


def named(views: Sequence[View]) -> list[View]:
    """The runs under the shortest ends of their paths that tell them apart."""
    parts = [view.folder.resolve().parts for view in views]
    depth = next(
        depth for depth in range(1, 1 + max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)
    )
    return [replace(view, name=clean("/".join(p[-depth:]))) for view, p in zip(views, parts, strict=True)]


def told(view: View) -> dict[str, Any]:
    """One run in numbers."""
    losses = [loss for _, loss in view.curve]
    tail = losses[-math.ceil(len(losses) / 10) :] if losses else []
    lowest = min(view.curve, key=lambda point: point[1], default=None)
    found: dict[str, Any] = {
        "name": view.name, "folder": str(view.folder), "state": view.state, "finished": view.finished,
        "steps": view.steps, "training_loss": {
            "last_tenth": math.fsum(tail) / len(tail) if tail else None,
            "lowest": None if lowest is None else {"step": lowest[0], "loss": lowest[1]},
        },
        "held_out": [{"step": step, "loss": loss} for step, loss in view.held_out],
        "judged": None,
    }  # fmt: skip
    if view.judged is not None:
        found["judged"] = {"name": view.judged.name} | _scores(view.judged)
    return found


def _scores(judged: Judgement) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in evals.ROWWISE:
        if judged.number(metric) is not None:
            span = scores.interval(judged.scores, metric)
            if span is None and judged.verdicts.get(metric):
                values = list(judged.verdicts[metric].values())
                span = bootstrap.interval(values, [1.0] * len(values))
            found[metric] = {"value": judged.number(metric), "interval": list(span) if span else None}
    if judged.number("loss") is not None:
        interval = None
        if judged.losses:
            totals, weights = zip(*judged.losses.values(), strict=True)
            interval = list(bootstrap.interval(totals, weights))
        found["loss"] = {"value": judged.number("loss"), "interval": interval}
    return found


def _differences(runs: Mapping[str, Mapping[str, Any]], but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Key → each run's value, of keys whose values are not all the same; None where a run has no such key."""
    keys = dict.fromkeys(key for values in runs.values() for key in values if key not in but)
    rows = {key: {name: values.get(key) for name, values in runs.items()} for key in keys}
    return {key: row for key, row in rows.items() if len(set(map(repr, row.values()))) > 1}


def _files(runs: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str | None]]:
    """Name of a file → each run's digest of it; a file that all have under some name is no difference."""
    digests = [set(map(str, files.values())) for files in runs.values()]
    shared = set.intersection(*digests)
    found = _differences(runs)
    return {key: row for key, row in found.items() if set(filter(None, row.values())) - shared}


def _answers(first: View, other: View, level: float) -> dict[str, Any]:
    """Is ``other`` better than ``first``? For each measure, or why that cannot be said."""
    if first.judged is None or other.judged is None:
        who = " and ".join(view.name for view in (first, other) if view.judged is None)
        return {"refused": f"nothing can be compared: {who} has no scores", "measures": {}}
    one, two = first.judged, other.judged
    found: dict[str, Any] = {}
    if "exact_match" in {*one.scores, *two.scores}:
        found["exact_match"] = _paired("exact_match", one.right, two.right, level)
    for metric in evals.ROWWISE[1:]:
        if metric in {*one.scores, *two.scores}:
            found[metric] = _paired(metric, one.verdicts.get(metric, {}), two.verdicts.get(metric, {}), level)
    if "loss" in {*one.scores, *two.scores}:
        found["loss"] = _paired("loss", one.losses, two.losses, level)
    return {"refused": None if found else "neither has scores", "judged": [one.name, two.name], "measures": found}


def _paired(measure: str, one: Mapping[Any, Any], two: Mapping[Any, Any], level: float) -> dict[str, Any]:
    """``one`` and ``two``: whether each row was right, or its (summed loss, weight)."""
    common = [key for key in one if key in two]
    counts = {"only_first": len(one) - len(common), "only_second": len(two) - len(common)}
    if not common:
        reason = "they were judged on no row in common"
        if not one or not two:
            reason = "a run kept no rows behind this score"
        elif measure == "loss":
            reason += " with the same tokens, and losses of other tokens are not comparable"
        return counts | {"rows": 0, "answer": "refused", "reason": reason}
    if measure == "loss":
        gains, weights = [one[key][0] - two[key][0] for key in common], [one[key][1] for key in common]
    else:
        gains, weights = [float(two[key]) - float(one[key]) for key in common], [1.0] * len(common)
    return counts | bootstrap.paired(gains, weights, level).to_dict()


def question(answer: Mapping[str, Any]) -> str:
    return f"is {answer['run']} better than {answer['against']}?"


def sentences(answer: Mapping[str, Any]) -> list[str]:
    """The answer in words, one for each measure."""
    if answer["refused"]:
        return [answer["refused"]]
    said = [_sentence(measure, found) for measure, found in answer["measures"].items()]
    if answer["judged"][0] != answer["judged"][1]:
        said.append(f"they stand at different points: {answer['against']} at {answer['judged'][0]!r}, "
                    f"{answer['run']} at {answer['judged'][1]!r}")  # fmt: skip
    return said


def _sentence(measure: str, found: Mapping[str, Any]) -> str:
    what = scores.label(measure)
    if found["answer"] == "refused":
        return f"{what}: cannot be compared: {found['reason']}"
    left = found["only_first"] + found["only_second"]
    rows = f"{found['rows']} rows" + (f" ({left} that only one was judged on are left out)" if left else "")
    if found["answer"] == "equal":
        return f"{what}: no difference on any of {rows}"
    sign = -1 if measure in evals.LOWER_IS_BETTER else 1
    low, high = sorted((sign * found["low"], sign * found["high"]))
    words = {"better": "yes", "worse": "no, it is worse", "cannot tell": "cannot tell"}[found["answer"]]
    return (
        f"{what}: {words} from {rows}: {sign * found['difference']:+.4f}, {percent(found['level'])} interval "
        f"{low:+.4f} to {high:+.4f}, {found['better']} rows better, {found['worse']} worse, p = {found['chance']:.2g}"
    )


def percent(level: float) -> str:
    return f"{100 * level:.3g} %"


def cautions(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the answers as a whole."""
    said = []
    if found["looks"] > 1:
        said.append(
            f"{found['looks']} comparisons are made: each interval is at {percent(found['level'])}, so that all hold "
            "together at 95 % (Bonferroni)"
        )
    if found["picked"]:
        said.append("the first was picked as the best on these very rows: its own scores flatter it a little")
    return said


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """How each run went, a heading first."""
    found_metrics = scores.metrics({str(at): run["judged"] for at, run in enumerate(found["runs"])}) or ["exact_match"]
    heads = [scores.label(metric) for metric in found_metrics]
    rows = [["run", "state", "training loss", "lowest", "judged", "held-out loss", *heads]]
    for run in found["runs"]:
        judged, training = run["judged"] or {}, run["training_loss"]
        lowest = training["lowest"]
        rows.append([
            run["name"], run["state"], _number(training["last_tenth"]),
            f"{lowest['loss']:.4f} at {lowest['step']}" if lowest else "-", judged.get("name", "not yet"),
            _with_interval(judged.get("loss")), *(_with_interval(judged.get(metric)) for metric in found_metrics),
        ])  # fmt: skip
    return rows


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    interval = score["interval"]
    return _number(score["value"]) + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


DIFFERENCES = {
    "recipe": "recipe", "resolved": "resolved by the plan", "data": "data (sha-256)", "base": "base (sha-256)",
    "environment": "environment",
}  # fmt: skip


def difference_table(found: Mapping[str, Any], part: str) -> list[list[str]]:
    """One part's differing keys with each run's value, a heading first; only the heading where there is none."""
    names = [run["name"] for run in found["runs"]]
    rows = [[DIFFERENCES[part], *names]]
    for key, values in found[part].items():
        shown = ["-" if values[name] is None else str(values[name]) for name in names]
        rows.append([key, *(value[:12] for value in shown)] if part in ("data", "base") else [key, *shown])
    return rows


def lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    said = [
        *_aligned(table(found)),
        *(f"{run['name']}: {clean(run['state'], _WHOLE)}" for run in found["runs"] if len(run["state"]) > _WIDEST),
        "training loss: mean of the last tenth of the steps; intervals of scores: 95 %",
        "",
    ]
    for part in DIFFERENCES:
        rows = difference_table(found, part)
        said += [*_aligned(rows), ""] if len(rows) > 1 else [f"{DIFFERENCES[part]}: the same"]
    said += [""] if said[-1] else []
    for answer in found["answers"]:
        said += [question(answer), *(f"  {sentence}" for sentence in sentences(answer))]
    return [*said, *cautions(found)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [[clean(cell, _WIDEST) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(map(set_cell_size, row, widths)).rstrip() for row in shown]
