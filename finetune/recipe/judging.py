"""What must hold of ``evaluate:``: held-out rows for the metrics that need them, and what each metric needs itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import answer_schema, pattern
from finetune.recipe.words import Finding, near_path, shown
from finetune.recipe.yamlfile import KeyPath

_OWN = {
    "regex": "write the pattern that an answer must match",
    "json_schema": "name a file with a JSON schema",
    "multiple_choice": "list the options, or name the column that holds a row's own",
    "command": "write the command as a list of words",
    "unit_test": "write the command that tries out an answer, as unit_test: {command: [word, word]}",
}
"""Metrics that need something under their own name, and what."""


def check(tree: dict[str, Any]) -> Iterator[Finding]:
    """Every fault of the section; values of a wrong type are somebody else's to report."""
    section, data = tree.get("evaluate"), tree.get("data")
    section = section if isinstance(section, dict) else {}
    listed = section.get("metrics")
    metrics = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    if isinstance(data, dict):
        yield from _rows(section, data, metrics)
    for at, metric in enumerate(metrics):
        if metric in metrics[:at]:
            yield Finding(("evaluate", "metrics", at), f"{metric} is given twice", "keep one")
        elif metric in _OWN and section.get(metric) is None:
            yield Finding(("evaluate", "metrics", at), f"{metric} needs evaluate.{metric}", f"{_OWN[metric]} there")
    for metric in _OWN:
        value = section.get(metric)
        if value is not None and metric not in metrics:
            yield Finding(("evaluate", metric), f"evaluate.metrics does not name {metric}", "add it there")
        elif value is not None and (fault := _FAULTS[metric](value)):
            yield Finding(("evaluate", metric), *fault)


def rewards(tree: dict[str, Any]) -> Iterator[Finding]:
    """Faults of ``objective.rewards``: each metric has what it needs, as in ``evaluate:``, and nothing else."""
    section = tree.get("objective")
    listed = section.get("rewards") if isinstance(section, dict) else None
    for number, reward in enumerate(listed if isinstance(listed, list) else []):
        metric = reward.get("metric") if isinstance(reward, dict) else None
        if not isinstance(metric, str):
            continue
        at: KeyPath = ("objective", "rewards", number)
        for key in ("regex", "json_schema", "command", "unit_test"):
            value = reward.get(key)
            if value is None and key == metric:
                yield Finding(at, f"{metric} needs {metric}:", f"{_OWN[metric]} there")
            elif value is not None and key != metric:
                yield Finding((*at, key), f"has no meaning with {metric}", "remove it")
            elif value is not None and (fault := _FAULTS[key](value)):
                yield Finding((*at, key), *fault)
        if reward.get("command_timeout") is not None and metric != "command":
            yield Finding((*at, "command_timeout"), f"has no meaning with {metric}", "remove it")


def _rows(section: dict[str, Any], data: dict[str, Any], metrics: list[str]) -> Iterator[Finding]:
    if data.get("eval_path") is not None and data.get("eval_fraction") is not None:
        yield Finding(("data", "eval_fraction"), "cannot be given together with eval_path", "keep one")
    if data.get("eval_path") is not None or data.get("eval_fraction") is not None:
        return
    fix = "add data.eval_path or data.eval_fraction"
    for at, metric in enumerate(metrics):
        if metric != "loss":
            yield Finding(("evaluate", "metrics", at), f"{metric} needs held-out rows", fix)
    every = section.get("every")
    if isinstance(every, int | float) and not isinstance(every, bool) and every:
        yield Finding(("evaluate", "every"), "there are no held-out rows to evaluate on", fix)


Fault = tuple[str, str] | None
"""What is wrong, and what to do."""


def _regex(value: Any) -> Fault:
    if not isinstance(value, str):
        return None
    try:
        pattern.compiled(value)
    except ValueError as error:
        return f"this pattern cannot be read: {error}", "mend it; in YAML write a pattern in 'single quotes'"
    return None


def _json_schema(value: Any) -> Fault:
    if not isinstance(value, str):
        return None
    if not value or "\0" in value or not Path(value).is_file():
        return f"no such file: {shown(value)}", near_path(Path(value)) if value.isprintable() and value else ""
    try:
        answer_schema.load(Path(value))
    except ValueError as error:
        return f"the schema {shown(value)} {error}", "mend it"
    return None


def _multiple_choice(value: Any) -> Fault:
    if isinstance(value, str):
        return None if value else ("the name of the column is empty", _OWN["multiple_choice"])
    texts = [one.strip() for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(texts) < len(value):
        return None
    if len(texts) < 2:
        return "one option is no choice", "list two or more"
    if len(set(texts)) < len(texts) or "" in texts:
        return "an option is empty or comes twice", "keep one"
    return None


def _command(value: Any) -> Fault:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    if not value or not value[0]:
        return "the command is empty", _OWN["command"]
    if any("\0" in one for one in value) or shutil.which(value[0]) is None:
        fix = "install it, or write its path; the words stand one by one in the list, no shell reads them"
        return f"no such command: {shown(value[0])}", fix
    return None


def _unit_test(value: Any) -> Fault:
    return _command(value.get("command")) if isinstance(value, dict) else None


_FAULTS = {
    "regex": _regex, "json_schema": _json_schema, "multiple_choice": _multiple_choice, "command": _command,
    "unit_test": _unit_test,
}  # fmt: skip
