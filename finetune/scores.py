"""scores.json, samples.jsonl and losses.jsonl of a run: numbers under a name (before, after, merged), and each row's
answers and losses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.runfolder import RunFolder, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.evaluate import HeldOut, Judged


def read(folder: RunFolder) -> dict[str, Any]:
    """The stored scores by name; empty where the file is absent or damaged."""
    stored = read_json(folder.scores)
    return stored if isinstance(stored, dict) else {}


def record(folder: RunFolder, name: str, judged: Judged, held_out: HeldOut) -> dict[str, Any]:
    """Store one judgement; what is behind it first, so that scores never stand without that. Returns all scores."""
    if judged.answers:
        asked = [{"row": one.where, "content": one.content, "expected": one.answer} for one in held_out.questions]
        _beside(folder.samples, name, judged.answers, asked)
    if judged.losses:
        judged_on = [
            {"row": one.where, "content": content(one), "weight": sum(one.weights)} for one in held_out.examples
        ]
        _beside(folder.losses, name, judged.losses, judged_on)
    scores = read(folder)
    scores[name] = judged.scores
    write_json(folder.scores, scores)
    return scores


def copy(folder: RunFolder, name: str, to: str) -> None:
    """The judgement ``name`` under another name too, with what is behind it: it is of the same weights."""
    for path in (folder.samples, folder.losses):
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            held = [_with(row, name, to) for row in rows]
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


def _beside(path: Path, name: str, values: Sequence[Any], rows: list[dict[str, Any]]) -> None:
    """Each row's value under ``name``, beside what the file has of the same rows."""
    if path.is_file():
        stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = stored if [entry["row"] for entry in stored] == [entry["row"] for entry in rows] else rows
    for entry, value in zip(rows, values, strict=True):
        entry[name] = value
    write_atomic(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows).encode())


def content(example: Example) -> str:
    """A digest of what a loss is of: losses of other tokens, or of the same with other weights, are not comparable."""
    return blake2b(json.dumps([example.ids, example.weights]).encode(), digest_size=16).hexdigest()


def _by_source(values: dict[str, Any]) -> list[tuple[str, float]]:
    return sorted(values.get("loss_by_source", {}).items())


def outcome(folder: RunFolder) -> dict[str, Any]:
    """What became of a run, for a program."""
    finished = read_json(folder.finished) or {}
    return {
        "folder": str(folder.root),
        "finished": bool(finished),
        "steps": finished.get("steps"),
        "adapter": str(folder.adapter) if finished else None,
        "scores": read(folder),
    }


def table(scores: dict[str, Any]) -> list[str]:
    """The scores as lines of text."""
    lines = [f"{'':<12}{'exact match':>12}{'95 % interval':>18}{'loss':>10}{'rows':>7}"]
    for name, values in scores.items():
        interval = values.get("confidence_interval")
        shown = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else "-"
        exact = f"{values['exact_match']:.3f}" if "exact_match" in values else "-"
        loss = f"{values['loss']:.4f}" if "loss" in values else "-"
        lines.append(f"{name:<12}{exact:>12}{shown:>18}{loss:>10}{values.get('rows', 0):>7}")
        lines += [f"{'':<12}{'':>30}{value:>10.4f}  {source}" for source, value in _by_source(values)]
    return lines
