"""scores.json and samples.jsonl of a run: numbers under a name (before, after, merged), and each row's answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune.runfolder import RunFolder, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from finetune.evaluate import HeldOut, Judged


def read(folder: RunFolder) -> dict[str, Any]:
    """The stored scores by name; empty where the file is absent or damaged."""
    stored = read_json(folder.scores)
    return stored if isinstance(stored, dict) else {}


def record(folder: RunFolder, name: str, judged: Judged, held_out: HeldOut) -> dict[str, Any]:
    """Store one judgement; answers first, so that scores never stand without them. Returns all scores."""
    if judged.answers:
        _answers(folder, name, judged.answers, held_out)
    scores = read(folder)
    scores[name] = judged.scores
    write_json(folder.scores, scores)
    return scores


def _answers(folder: RunFolder, name: str, answers: list[str], held_out: HeldOut) -> None:
    rows = [{"row": question.where, "expected": question.answer} for question in held_out.questions]
    if folder.samples.is_file():
        stored = [json.loads(line) for line in folder.samples.read_text(encoding="utf-8").splitlines()]
        rows = stored if [entry["row"] for entry in stored] == [entry["row"] for entry in rows] else rows
    for entry, answer in zip(rows, answers, strict=True):
        entry[name] = answer
    write_atomic(folder.samples, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows).encode())


def _by_source(values: dict[str, Any]) -> list[tuple[str, float]]:
    return sorted(values.get("loss_by_source", {}).items())


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
