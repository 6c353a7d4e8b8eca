"""``adapters:``, several runs over one base in one recipe: each item's keys laid over the recipe make a run of its own.

What an item may change is what an adapter can have for itself. The base, and what all do at the same moment, is shared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import Fault, RecipeError
from finetune.recipe import sources
from finetune.recipe.sources import Origins
from finetune.recipe.words import did_you_mean, shown
from finetune.recipe.yamlfile import KeyPath

KEY = "adapters"
OWN: dict[str, tuple[str, ...]] = {
    "adapter": (),
    "trainable_tokens": (),
    "data": (),
    "train": (
        "steps", "epochs", "examples_per_step", "tokens_per_step", "learning_rate", "schedule", "warmup",
        "weight_decay", "max_grad_norm", "optimizer", "lora_plus_ratio", "max_length", "seed",
    ),
    "evaluate": (),
}  # fmt: skip
"""What an item may say, and of a section that it may not say wholly, which keys."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TAKEN = ("trackers", "wandb")
"""Folders that a tracker makes beside those of the adapters."""
_EMPTY = "must be a list of at least two adapters, each with a name and what it has for itself"


class Variant(NamedTuple):
    """One run's tree of plain values, and where each was written. A recipe without ``adapters:`` has one, unnamed."""

    name: str
    tree: dict[str, Any]
    origins: Origins


Known = Callable[[], dict[str, Any]]
"""The recipe's properties in its schema."""


def read(path: Path, overrides: Sequence[str], known: Known) -> list[Variant]:
    """The runs of a recipe. ``--set adapters=NAME`` takes one of several; other overrides hold for each of them.

    Raises ``RecipeError`` with every fault of the list, not of what its items say.
    """
    tree, origins = sources.read(path)
    chosen = [text.partition("=")[2].strip() for text in overrides if text.startswith(f"{KEY}=")]
    if KEY not in tree:
        if chosen:
            raise RecipeError(f"this recipe has no {KEY}:", f"--set {KEY}", "remove it")
        sources.override(tree, origins, overrides)
        return [Variant("", tree, origins)]
    items = tree.pop(KEY)
    _refuse(items, origins, known)
    names = [item["name"] for item in items]
    for name in chosen:
        if name not in names:
            raise RecipeError(f"no adapter is called {shown(name)}", f"--set {KEY}", did_you_mean(name, names))
    others = [text for text in overrides if not text.startswith(f"{KEY}=")]
    made = [_variant(tree, origins, index, item, others) for index, item in enumerate(items)]
    return sorted((one for one in made if one.name in (chosen[-1:] or names)), key=lambda one: one.name)


def _variant(
    tree: dict[str, Any], origins: Origins, index: int, item: dict[str, Any], overrides: Sequence[str]
) -> Variant:
    """The recipe with one item's keys in it. What the command line says comes last: it must not be passed over."""
    mine = copy.deepcopy(tree)
    places = Origins(dict(origins.keys), dict(origins.values), list(origins.secrets))
    at: KeyPath = (KEY, index)
    own = Origins(
        {path[2:]: origin for path, origin in origins.keys.items() if path[:2] == at},
        {path[2:]: origin for path, origin in origins.values.items() if path[:2] == at},
    )
    sources.merge(mine, places, {key: value for key, value in item.items() if key != "name"}, own, ())
    sources.override(mine, places, overrides)
    if isinstance(mine.get("output"), str) and mine["output"]:
        mine["output"] = f"{mine['output'].removesuffix('/')}/{item['name']}"
    return Variant(item["name"], mine, places)


def _refuse(items: object, origins: Origins, known: Known) -> None:
    faults = list(origins.secrets)
    if not isinstance(items, list) or len(items) < 2:
        faults.append(Fault(_EMPTY, origins.where((KEY,)), "a single adapter needs no list"))
        items = []
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            faults.append(Fault(f"must be a section; found {shown(item)}", origins.where((KEY, index)), "add 'name:'"))
            continue
        faults += _name_faults(index, item, seen, origins)
        faults += _key_faults(index, item, origins, known())
    if faults:
        raise RecipeError.of(faults)


def _name_faults(index: int, item: dict[str, Any], seen: dict[str, int], origins: Origins) -> Iterator[Fault]:
    where, name = origins.where((KEY, index, "name")), item.get("name")
    if name is None:
        yield Fault("missing: each adapter needs a name", where, "add 'name:', its folder below `output:`")
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        what = f"must be a word; found {shown(name)}"
        yield Fault(what, where, "it names a folder: letters, digits, '_' and '-', at most 64")
    elif name.lower() in _TAKEN:
        yield Fault(f"{name!r} is a folder of a tracker", where, "call it otherwise")
    elif name.lower() in seen:
        yield Fault(
            f"{name!r} is the name of adapter {seen[name.lower()] + 1} too", where, "call one of them otherwise"
        )
    else:
        seen[name.lower()] = index


def _key_faults(index: int, item: dict[str, Any], origins: Origins, known: dict[str, Any]) -> Iterator[Fault]:
    """Keys that an item may not have: shared ones, and unknown ones of its first level. Deeper ones are judged where
    the item is laid over the recipe."""
    for key, value in item.items():
        where = origins.where((KEY, index, key))
        if key == "name":
            continue
        if key not in OWN:
            if key in known and key != KEY:
                yield Fault("is shared by all adapters", where, f"move '{key}:' to the left margin")
            else:
                yield Fault("unknown key", where, did_you_mean(key, ["name", *OWN]))
            continue
        for word in value if OWN[key] and isinstance(value, dict) else ():
            if word not in OWN[key] and word in known[key]["properties"]:
                where = origins.where((KEY, index, key, word))
                yield Fault("is shared by all adapters", where, f"move it under the recipe's '{key}:'")


def faults(found: Sequence[tuple[str, Sequence[Fault]]]) -> list[Fault]:
    """The faults of all runs of a recipe; one that not all have says whose it is."""
    every = [fault for _, own in found for fault in own]
    return [
        fault if every.count(fault) == len(found) else fault._replace(what=f"{fault.what} (adapter {name})")
        for name, own in found
        for fault in own
    ]


def schema(properties: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of the list, from the recipe's own properties."""
    parts: dict[str, Any] = {
        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$", "description": "its folder below output"}
    }
    for key, words in OWN.items():
        part = {word: value for word, value in properties[key].items() if word not in ("required", "default")}
        if words:
            part["properties"] = {word: part["properties"][word] for word in words}
        parts[key] = part
    return {
        "type": "array",
        "minItems": 2,
        "items": {"type": "object", "additionalProperties": False, "required": ["name"], "properties": parts},
        "description": "several adapters over one base in one run: what each has for itself, laid over this recipe",
    }
