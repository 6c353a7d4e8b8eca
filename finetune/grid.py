"""A grid of overrides: every combination with its folder's name, and the recipe faults of all of them at once.

Imports no torch: a faulty grid is answered before any of it loads.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from finetune import recipe as recipes
from finetune.errors import Fault, RecipeError

MOST = 256
"""Combinations of one sweep: each is a run."""
_LONGEST = 96
"""Characters of a folder's name, as a recipe's `output:` has it."""
_OWN = {"output": "each run has a folder of its own below it", "adapters": "it would be a sweep of several runs each"}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One run of a sweep: its name, and all that it sets beyond the recipe, its output too."""

    name: str
    overrides: tuple[str, ...]
    output: Path


def combinations(path: Path, words: Sequence[str], overrides: Sequence[str]) -> tuple[Path, list[Combination]]:
    """The recipe's own output, below which the runs stand, and every combination of the grid, in its order.

    ``words``: ``key=value,value`` each; a comma inside brackets or quotes belongs to its value.

    Raises:
        RecipeError: every fault of the grid, or every fault of every combination's recipe.
    """
    axes = _axes(words, {text.partition("=")[0] for text in overrides})
    names = [_short(key, axes) for key, _ in axes]
    chosen = list(itertools.product(*(values for _, values in axes)))
    found: list[tuple[str, tuple[str, ...]]] = []
    for values in chosen:
        name = ",".join(f"{key}={_plain(value)}" for key, value in zip(names, values, strict=True))
        found.append((name, tuple(f"{key}={value}" for (key, _), value in zip(axes, values, strict=True))))
    found = _distinct(found)
    root = _check(path, found, overrides)
    others = [text for text in overrides if text.partition("=")[0] != "output"]
    return root, [
        Combination(
            name=name, output=root / name,
            overrides=(*others, *own, f"output={json.dumps(str(root / name), ensure_ascii=False)}"),
        )
        for name, own in found
    ]  # fmt: skip


def _axes(words: Sequence[str], fixed: set[str]) -> list[tuple[str, list[str]]]:
    axes: list[tuple[str, list[str]]] = []
    faults: list[Fault] = []
    for word in words:
        key, equals, written = word.partition("=")
        where, values = f"--grid {key}", split(written)
        if not key or not equals or not all(values):
            faults.append(Fault("must look like section.key=value,value", f"--grid {word}", "give each value once"))
        elif key in _OWN:
            faults.append(Fault(f"cannot be swept: {_OWN[key]}", where, "remove it"))
        elif key in fixed or key in dict(axes):
            faults.append(Fault("is given twice", where, "keep one"))
        elif len(set(values)) < len(values):
            twice = next(value for value, count in Counter(values).items() if count > 1)
            faults.append(Fault(f"has the value {twice} twice", where, "keep one"))
        axes.append((key, values))
    count = 1
    for _, values in axes:
        count *= len(values)
    if count > MOST:
        faults.append(Fault(f"{count} combinations are more than {MOST} runs", "--grid", "name fewer values"))
    if faults:
        raise RecipeError.of(faults)
    return axes


def split(written: str) -> list[str]:
    """Values between commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in written:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += (char in "[{") - (char in "]}") if not quote else 0
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _short(key: str, axes: Sequence[tuple[str, list[str]]]) -> str:
    """A key's last word, where no other key of the grid ends with it."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other, _ in axes) == 1 else key


def _plain(value: str) -> str:
    """1e+4 is 1e4, and lists lose their brackets; what else a folder cannot be called becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"[][{}\"' +]", "", value)) or "none"


def _distinct(found: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Names that are too long, or the same once they are plain, end with a digest of what they stand for."""
    seen = Counter(name.lower() for name, _ in found)
    made = []
    for name, own in found:
        if len(name) > _LONGEST or seen[name.lower()] > 1:
            name = f"{name[: _LONGEST - 9]}_{blake2b(json.dumps(own).encode(), digest_size=4).hexdigest()}"
        made.append((name, own))
    return made


def _check(path: Path, found: Sequence[tuple[str, tuple[str, ...]]], overrides: Sequence[str]) -> Path:
    """The output of all. Raises RecipeError with the faults of every combination, one that all have only once."""
    faults: dict[Fault, list[str]] = {}
    outputs: dict[str, Path] = {}
    for name, own in found:
        try:
            located = recipes.locate_all(path, [*overrides, *own])
        except RecipeError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(name)
            continue
        if len(located) > 1 or located[0].name:
            raise RecipeError("a sweep is over one run, this recipe has several", str(path), "give a recipe of one run")
        outputs[name] = Path(located[0].recipe.output)
    if faults:
        told = [
            fault if len(names) == len(found) else fault._replace(what=f"{fault.what} (in {_some(names)})")
            for fault, names in faults.items()
        ]
        raise RecipeError.of(told)
    return next(iter(outputs.values()))


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
