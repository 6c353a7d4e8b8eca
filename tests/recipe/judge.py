"""What loading makes of an edited recipe: refused with a place, or provably what the text says; else a failure."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune import recipe
from finetune.errors import RecipeError
from tests.recipe.edits import Edit, lines_of

SCHEMA = Path(__file__).resolve().parents[2] / "recipes" / "schema.json"


@dataclass
class Tally:
    """What became of the edits."""

    refused: int = 0
    same: int = 0
    one_key: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds


def judge(edit: Edit, file: Path, original: recipe.Recipe) -> str:
    """``refused``, ``same`` or ``one_key``; any other outcome is returned as the text of a failure."""
    file.write_text(edit.text, encoding="utf-8", newline="")
    try:
        read = recipe.load(file)
    except RecipeError as error:
        return _judge_refusal(edit, file, error)
    if odd := _oddity(edit.text):
        return f"accepted, although {odd}"
    before, after = _leaves(original), _leaves(read)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if not changed:
        return "same"
    if len(changed) > 1:
        return f"accepted with several keys changed: {changed}"
    key = changed[0]
    if key not in _touched(edit):
        return f"accepted, but {key} changed instead of {edit.key}"
    written = _written(edit.text, key)
    default = _defaults(read).get(key, "no default") if written is _ABSENT else written
    if repr(_plain(default, after[key])) != repr(after[key]):
        return f"accepted with {key} = {after[key]!r}, while the file says {written!r}"
    return "one_key"


def _oddity(text: str) -> str:
    """What independent readers find in a text that must never be accepted; empty when nothing."""
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        return f"ruamel refuses it: {str(error).splitlines()[0]}"
    # Dates are text to the loader and to the schema; ruamel's constructor makes objects of them.
    plain = json.loads(json.dumps(tree, default=str))
    found = jsonschema.exceptions.best_match(_validator().iter_errors(plain))
    return f"the committed schema refuses it: {found.message}" if found else ""


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def _judge_refusal(edit: Edit, file: Path, error: RecipeError) -> str:
    places = [re.fullmatch(rf"{re.escape(str(file))}:(\d+):(\d+)(: .+)?", fault.where) for fault in error.faults]
    if not all(places):
        return f"refused without file and line: {error}"
    numbers = {int(place[1]) for place in places if place}
    last = edit.text.count("\n") + 2
    if not all(1 <= number <= last for number in numbers):
        return f"refused with a line that does not exist: {error}"
    section = max(
        (line.number for line in lines_of(edit.text) if not line.indent and line.number <= edit.line), default=1
    )
    near = range(section, edit.line + 3)  # the line, its section's head, or where the parser stumbled right after
    names = edit.key.split(".")[-1]
    if not any(number in near for number in numbers) and names not in str(error) and "missing" not in str(error):
        return f"refused, but nothing points to line {edit.line}: {error}"
    return "refused"


def _touched(edit: Edit) -> set[str]:
    """Keys that the edited line may stand for: a stray or swapped line can reach its neighbour."""
    if edit.kind in ("stray line", "lines swapped", "lines joined", "indentation"):
        rows = [line for line in lines_of(edit.text) if abs(line.number - edit.line) <= 2]
        return {edit.key, *(line.path for line in rows)}
    return {edit.key}


_ABSENT = object()


def _written(text: str, key: str) -> Any:
    """What the file says for a key, read by ruamel's own constructor, which the loader does not use."""
    node: Any = YAML(typ="safe", pure=True).load(text)
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _plain(value: Any, like: Any) -> Any:
    """A whole number is a legal way to write a float; nothing else is converted."""
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return str(value) if isinstance(like, str) and type(value).__name__ in ("date", "datetime") else value


def _leaves(read: recipe.Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in read.to_yaml_dict().items():
        flat |= {f"{key}.{inner}": leaf for inner, leaf in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _defaults(read: recipe.Recipe) -> dict[str, Any]:
    """Defaults as the committed schema states them."""
    found: dict[str, Any] = {}
    for name, part in _validator().schema["properties"].items():
        if "default" in part and "properties" not in part:
            found[name] = part["default"]
        for key, inner in part.get("properties", {}).items():
            if "default" in inner:
                found[f"{name}.{key}"] = inner["default"]
    return found
