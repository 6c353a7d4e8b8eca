"""What a run is: recipe, data, base and machine, written at its start and compared when it goes on.

The first three must be equal, or the result would be a mixture that no recipe describes. A different machine or
library is allowed and said, because the bits may then differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import DataError, EnvironmentFault, Fault, FinetuneError, ModelError, RecipeError
from finetune.runfolder import read_json, write_json

LENGTHS = ("train.steps", "train.epochs")
_LONGER = (*LENGTHS, "evaluate.early_stopping_patience")
"""What may change where a run is lengthened; ``run`` says whether it is longer by it."""
_FREE = (
    "tracker", "output", "train.workers", "train.copy_to", "train.shard", "adapter.start_from", "objective.teacher",
)  # fmt: skip
"""What may change between two parts of a run: no number of the result hangs on it, and a folder may have moved. What an
adapter to begin from or a teacher holds is compared by its digest."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """``recipe``: flat keys and values. ``data``, ``base``: file → sha-256. ``resolved``: what ``auto`` became.

    ``together``: the other adapters whose rows went through the same passes. A product over more rows may round
    otherwise, so that bits hang on it. ``start``: the digest of the adapter that the run began from; ``teacher``: those
    of what it learns from.
    """

    recipe: dict[str, Any]
    data: dict[str, str]
    base: dict[str, str]
    resolved: dict[str, Any]
    environment: dict[str, Any]
    together: list[str] = field(default_factory=list)
    start: dict[str, str] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def read(path: Path) -> Identity | None:
    """The stored identity; None where no run has begun.

    Raises:
        EnvironmentFault: the file is damaged.
    """
    if not path.exists():
        return None
    stored = read_json(path)
    try:
        return Identity(**stored)
    except TypeError:
        raise EnvironmentFault(
            "this run's identity cannot be read",
            str(path),
            "give the recipe another `output:`, or move the folder away",
        ) from None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def compare(old: Identity, new: Identity, folder: Path, *, extend: bool) -> list[str]:
    """Refuse another recipe, data or base; return what to say about another machine.

    Raises:
        RecipeError, DataError, ModelError: with each key or file that differs.
    """
    free = (*_FREE, *_LONGER) if extend else _FREE
    keys = [key for key in _differences(old.recipe, new.recipe) if key not in free]
    faults = [
        Fault(f"was {old.recipe.get(key)!r}, is {new.recipe.get(key)!r} now", f"{folder}: {key}", _fix(key, old, new))
        for key in keys
    ]
    _raise(RecipeError, faults)
    _raise(DataError, _changed(old.data, new.data))
    _raise(ModelError, _changed(old.base, new.base))
    _raise(ModelError, _changed(old.start, new.start))
    _raise(ModelError, _changed(old.teacher, new.teacher))
    _raise(RecipeError, _joined(old, new, folder))
    before, now = processes(1) | old.environment, processes(1) | new.environment
    left = [name for name in old.together if name not in new.together]
    alone = f"{folder.name} was trained together with {', '.join(old.together)} and goes on without {', '.join(left)}"
    said = [f"{alone}: its bits will differ from an unbroken run's"] if left else []
    return said + [
        f"{key} was {before.get(key)} and is {now.get(key)} now: "
        "the run goes on, but its bits will differ from an unbroken one"
        for key in _differences(before, now)
        if key != "threads"
    ]


def processes(world: int) -> dict[str, Any]:
    """How many processes share a step: sums over them round otherwise. A run that says nothing has one."""
    return {"processes": world}


def _joined(old: Identity, new: Identity, folder: Path) -> list[Fault]:
    """Adapters that were not there when the run began: they would begin beside one that is under way."""
    added = [name for name in new.together if name not in old.together]
    what = f"this adapter began without {', '.join(added)}"
    return (
        [Fault(what, str(folder), "go on with it alone (--set adapters=NAME), or give another `output:`")]
        if added
        else []
    )


def _fix(key: str, old: Identity, new: Identity) -> str:
    before, now = old.recipe.get(key), new.recipe.get(key)
    shorter = isinstance(before, int | float) and isinstance(now, int | float) and now < before
    if key in _LONGER and not shorter:
        return "add --extend to lengthen this run, or give another `output:`"
    return "put it back to go on with this run, or give another `output:`"


def _changed(old: dict[str, str], new: dict[str, str]) -> list[Fault]:
    return [
        Fault("this file is not the one that the run began with", name, "put it back, or give another `output:`")
        for name in _differences(old, new)
    ]


def _raise(kind: type[FinetuneError], faults: list[Fault]) -> None:
    if faults:
        raise kind.of(faults)
