"""From a validation error to one line a person can act on: place, key, what is wrong, the nearest legal word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.errors import Fault
from finetune.recipe import editor_schema, secrets_shape
from finetune.recipe.sources import Origins
from finetune.recipe.words import describe, did_you_mean, mend, nearest, shown
from finetune.recipe.yamlfile import KeyPath


def word(errors: Sequence[Any], tree: dict[str, Any], origins: Origins, schema: dict[str, Any]) -> list[Fault]:
    """Faults for pydantic's errors, one per key: pydantic names a union's branches one by one."""
    unknown = {path for error in errors if error["type"] == "extra_forbidden" for path in [tuple(error["loc"])]}
    meant = meanings(unknown, schema)
    faults: dict[KeyPath, Fault] = {}
    for error in errors:
        path = _within(tuple(error["loc"]), tree, error["type"])
        if path in faults or (error["type"] == "missing" and _explained(path, meant)):
            continue
        where = origins.where(path)
        if path in unknown:
            faults[path] = Fault("unknown key", where, _other_home(path, schema))
        elif error["type"] == "missing":
            part = editor_schema.fragment(schema, path)
            faults[path] = Fault("missing", where, f"add '{path[-1]}:', {describe(part)}")
        else:
            part = editor_schema.fragment(schema, path)
            value = _value(path, tree)
            faults[path] = Fault(f"must be {describe(part)}; found {shown(value)}", where, mend(value, part))
    return list(faults.values())


def meanings(unknown: Iterable[KeyPath], schema: dict[str, Any]) -> set[KeyPath]:
    """The legal keys that unknown ones were meant to be, so that those are not reported missing as well."""
    meant: set[KeyPath] = set()
    for path in unknown:
        near = nearest(str(path[-1]), editor_schema.fragment(schema, path[:-1]).get("properties", {}))
        if near is not None:
            meant.add((*path[:-1], near))
    return meant


def unknown_keys(tree: dict[str, Any], schema: dict[str, Any]) -> set[KeyPath]:
    """Keys of the root and its sections that the schema does not have."""
    legal = schema["properties"]
    found: set[KeyPath] = {(key,) for key in tree if key not in legal}
    for section, content in tree.items():
        if isinstance(content, dict) and "properties" in legal.get(section, {}):
            found |= {(section, key) for key in content if key not in legal[section]["properties"]}
    return found


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """By file, line and column; no secret survives in any text; each fault once."""
    clean = {Fault(*(secrets_shape.mask(text) for text in fault)) for fault in faults}
    return sorted(clean, key=_place)


def _place(fault: Fault) -> tuple[str, int, int, str, str]:
    found = re.match(r"(.*?):(\d+):(\d+)", fault.where)
    file, line, column = (found[1], int(found[2]), int(found[3])) if found else (fault.where, 0, 0)
    return file, line, column, fault.what, fault.where


def _explained(path: KeyPath, meant: set[KeyPath]) -> bool:
    """A misspelt ``extends`` explains every missing key."""
    return path in meant or ("extends",) in meant


def _within(loc: KeyPath, tree: Any, kind: str) -> KeyPath:
    """The part of an error's location that names keys of the recipe, without pydantic's names of union branches."""
    node = tree
    for depth, part in enumerate(loc):
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            node = _value((part,), node)
        else:
            return loc[: depth + 1] if kind == "missing" else loc[:depth]
    return loc


def _value(path: KeyPath, tree: Any) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _other_home(path: KeyPath, schema: dict[str, Any]) -> str:
    """For an unknown key: the section it belongs to, else the nearest key of this one."""
    key = str(path[-1])
    homes = {name: part["properties"] for name, part in schema["properties"].items() if "properties" in part}
    here = editor_schema.fragment(schema, path[:-1]).get("properties", {})
    if key in schema["properties"]:
        return f"move '{key}:' to the left margin"
    for name, keys in homes.items():
        if key in keys:
            return f"move it under '{name}:'"
    if nearest(key, here) is None:
        for name, keys in homes.items():
            if (near := nearest(key, keys)) is not None and key.lower() != near:
                return f"did you mean '{name}.{near}'?"
    return did_you_mean(key, here)
