"""scores.json, samples.jsonl and losses.jsonl of a run: numbers under a name (before, after, merged), and each row's
answers and losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import evals
from finetune import metrics as steplog
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder, read_json, write_atomic, write_json
from finetune.terminal import clean

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.evaluate import HeldOut, Judged


_NAMED = 12
"""Numbers that a command named, shown in a table."""
VERDICTS = "verdicts"
"""A row's key in samples.jsonl below which stands what each metric said of each judgement's answer."""
PARTS = {"loss_by_source": "source", "loss_by_role": "role"}
"""Scores that are themselves numbers by name, and what those names are."""
_LOG_PROBS = "log_probs"
"""In losses.jsonl, before a judgement's name: the log-probabilities of a row's two texts."""


def read(folder: RunFolder) -> dict[str, Any]:
    """The stored scores by name; empty where the file is absent or damaged."""
    stored = read_json(folder.scores)
    if not isinstance(stored, dict):
        return {}
    return {name: value for name, value in stored.items() if isinstance(value, dict)}


def record(folder: RunFolder, name: str, judged: Judged, held_out: HeldOut) -> dict[str, Any]:
    """Store one judgement; what is behind it first, so that scores never stand without that. Returns all scores."""
    if judged.answers or judged.verdicts:
        asked = [{"row": one.where, "content": one.content, "expected": one.answer} for one in held_out.questions]
        _beside(folder.samples, name, judged.answers, asked, judged.verdicts)
    if judged.losses:
        judged_on = [
            {"row": one.where, "content": content(one, judged.measured), "weight": _weight(one)}
            for one in held_out.examples
        ]
        _beside(folder.losses, name, judged.losses, judged_on)
    if judged.log_probs and judged.losses:
        both = [judged.log_probs[at : at + 2] for at in range(0, len(judged.log_probs), 2)]
        _beside(folder.losses, f"{_LOG_PROBS} {name}", both, judged_on)
    scores = read(folder)
    scores[name] = judged.scores
    write_json(folder.scores, scores)
    return scores


def copy(folder: RunFolder, name: str, to: str) -> None:
    """The judgement ``name`` under another name too, with what is behind it: it is of the same weights."""
    for path in (folder.samples, folder.losses):
        if path.is_file():
            held = [_with(row, name, to) for row in _stored(path)]
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held).encode())
    found = read(folder)
    write_json(folder.scores, found | {to: found[name]})


def _with(row: dict[str, Any], name: str, to: str) -> dict[str, Any]:
    """A row with what stands under one name under another too, also one level below."""
    deep = {key: _with(value, name, to) if isinstance(value, dict) else value for key, value in row.items()}
    return deep | {to: deep[name]} if name in deep else deep


def drop(folder: RunFolder, *names: str) -> None:
    """Forget judgements of what is not there any more."""
    found = read(folder)
    if not found.keys().isdisjoint(names):
        write_json(folder.scores, {key: value for key, value in found.items() if key not in names})


def _beside(
    path: Path, name: str, values: Sequence[Any], rows: list[dict[str, Any]],
    verdicts: Mapping[str, Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """Each row's value under ``name``, beside what the file has of the same rows; and its verdicts by metric."""
    if path.is_file():
        stored = _stored(path)
        rows = stored if [entry.get("row") for entry in stored] == [entry["row"] for entry in rows] else rows
    for entry, value in zip(rows, values, strict=True) if values else ():
        entry[name] = value
    for metric, numbers in (verdicts or {}).items():
        for entry, number in zip(rows, numbers, strict=True):
            entry.setdefault(VERDICTS, {}).setdefault(name, {})[metric] = number
    write_atomic(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows).encode())


def _stored(path: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl or losses.jsonl. Raises EnvironmentFault where a line is damaged."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line.decode("utf-8")) if line else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            what, fix = (
                "this line is damaged",
                "take the file from a copy, or remove it: judgements to come make it anew",
            )
            raise EnvironmentFault(what, f"{path}:{number}", fix)
        rows += [row] if row else []
    return rows


def log_probs(folder: RunFolder, held_out: HeldOut, measured: str) -> list[float] | None:
    """The log-probabilities that these rows' texts had before the first step, if they are there."""
    if not folder.losses.is_file():
        return None
    stored = _stored(folder.losses)
    wanted = [content(one, measured) for one in held_out.examples]
    if [entry.get("content") for entry in stored] != wanted:
        return None
    found: list[Any] = [entry.get(f"{_LOG_PROBS} before") for entry in stored]
    return [value for both in found for value in both] if all(found) else None


def content(example: Example, measured: str = "") -> str:
    """A digest of what a loss is of: losses of other tokens, of the same with other weights, or of another objective
    (``measured``) are not comparable."""
    what: list[Any] = [example.ids, example.weights]
    if measured:
        what += [example.half, example.label, measured]
    return blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()


def _weight(example: Example) -> float:
    """What a row's loss counts: its tokens', or that of one judged answer."""
    return 1.0 if example.half or example.label is not None else sum(example.weights)


def parts(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The losses of sources and roles, by name; as far as they are what they should be."""
    found = [(name, values.get(key)) for key, name in PARTS.items()]
    return [
        (f"{name} {clean(str(part), 80)}", float(value))
        for name, by_name in found
        if isinstance(by_name, dict)
        for part, value in sorted(by_name.items())
        if isinstance(value, int | float)
    ]


def outcome(folder: RunFolder) -> dict[str, Any]:
    """What became of a run, for a program."""
    finished = read_json(folder.finished) or {}
    return {
        "folder": str(folder.root),
        "finished": bool(finished),
        "steps": finished.get("steps") or steplog.last_step(folder.metrics),
        "adapter": str(folder.adapter) if finished else None,
        "scores": read(folder),
    }


def metrics(scores: Mapping[str, Any]) -> list[str]:
    """The metrics of answers that are among the scores of several judgements, in the order of the recipe's words."""
    found = dict.fromkeys(key for values in scores.values() if isinstance(values, dict) for key in values)
    own = [key for key in found if key.startswith("command.") and key != "command."]
    return [metric for metric in (*evals.ROWWISE, *evals.RANKED, *evals.TAUGHT) if metric in found] + own[:_NAMED]


def interval(values: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """A metric's 95 % confidence interval, where it has one."""
    found = values.get("confidence_interval" if metric == "exact_match" else f"{metric}_interval")
    good = isinstance(found, list) and len(found) == 2 and all(isinstance(one, int | float) for one in found)
    return (float(found[0]), float(found[1])) if good and found else None


def label(metric: str) -> str:
    """A metric's name for people. One that a command named is somebody else's text."""
    return clean(metric.removeprefix("command."), 40) if "." in metric else metric.replace("_", " ")


def table(scores: Mapping[str, Any]) -> list[str]:
    """The scores as lines of text."""
    shown = metrics(scores)
    heads = [(label(metric), max(12, len(label(metric)) + 2)) for metric in shown]
    head = "".join(f"{name:>{width}}{'95 % interval':>18}" for name, width in heads)
    lines = [f"{'':<12}{head}{'loss':>10}{'rows':>7}"]
    for name, values in scores.items():
        cells = ""
        for metric, (_, width) in zip(shown, heads, strict=True):
            span = interval(values, metric)
            value = f"{values[metric]:.{4 if metric in evals.TAUGHT else 3}f}" if metric in values else "-"
            cells += f"{value:>{width}}{f'{span[0]:.3f} – {span[1]:.3f}' if span else '-':>18}"
        loss = f"{values['loss']:.4f}" if "loss" in values else "-"
        lines.append(f"{clean(name, 40):<12}{cells}{loss:>10}{values.get('rows', 0):>7}")
        room = 12 + sum(width + 18 for _, width in heads)
        lines += [f"{'':<{room}}{value:>10.4f}  {part}" for part, value in parts(values)]
    return lines
