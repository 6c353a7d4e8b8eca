"""From files and ``--set`` words to one tree of plain values that knows where each leaf was written.

``extends:`` names a base recipe, relative to the recipe that names it. Mappings merge key by key; all else replaces.
Origins are recorded while merging: afterwards no walk could tell which file a value came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import Fault, RecipeError
from finetune.recipe import secrets_shape, yamlfile
from finetune.recipe.words import near_path
from finetune.recipe.yamlfile import KeyPath, Origin, dotted

MAX_CHAIN = 8  # recipes in one extends chain

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


@dataclass
class Origins:
    """Where each key and value of a merged recipe was written."""

    keys: dict[KeyPath, Origin] = field(default_factory=dict)
    values: dict[KeyPath, Origin] = field(default_factory=dict)
    secrets: list[Fault] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """``file:line:column: key``; a key that is missing is placed at the nearest section that would hold it."""
        near = path
        while near and near not in self.keys and near not in self.values:
            near = near[:-1]
        origin = self.keys.get(near) or self.values.get(near) or Origin("recipe")
        if not path or str(origin) == f"--set {dotted(path)}":
            return str(origin)
        return f"{origin}: {dotted(path)}"

    def cut(self, path: KeyPath) -> None:
        """Forget everything at and below ``path``: it is about to be replaced."""
        for table in (self.keys, self.values):
            for old in [old for old in table if old[: len(path)] == path]:
                del table[old]

    def take(self, other: Origins, path: KeyPath) -> None:
        """Adopt the other's origins at and below ``path``."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine.update({at: origin for at, origin in theirs.items() if at[: len(path)] == path})


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Origins]:
    """Merge the chain of ``path`` from its root base upwards, then the overrides. Raises ``RecipeError``."""
    tree: dict[str, Any] = {}
    origins = Origins()
    for document in reversed(_chain(path)):
        layer = Origins(document.keys, document.values, list(_secrets(document)))
        origins.secrets += layer.secrets
        origins.values[()] = layer.values[()]
        content = {key: value for key, value in document.value.items() if key != "extends"}
        merge(tree, origins, content, layer, ())
    override(tree, origins, overrides)
    return tree, origins


def override(tree: dict[str, Any], origins: Origins, overrides: Sequence[str]) -> None:
    """Apply ``--set`` words to a tree, in place. Raises ``RecipeError``."""
    faults, seen = [], set[str]()
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise RecipeError("overrides must be a list of texts", "overrides", "write ['section.key=value', …]")
    for text in overrides:
        key = text.partition("=")[0]
        if key in seen:
            faults.append(Fault("given twice", f"--set {key}", "keep one"))
        seen.add(key)
        try:
            _override(tree, origins, text)
        except RecipeError as error:
            faults += error.faults
    if faults:
        raise RecipeError.of(faults)


def _chain(path: Path) -> list[yamlfile.Document]:
    """The recipe and its bases, nearest first."""
    chain: list[yamlfile.Document] = []
    visited: set[Path] = set()
    while True:
        visited.add(path.resolve())
        document = yamlfile.load(path)
        chain.append(document)
        base = document.value.get("extends")
        if base is None:
            return chain
        where = f"{document.keys[('extends',)]}: extends"
        if not isinstance(base, str) or not base or "://" in base:
            raise RecipeError("must be the path of another recipe file", where)
        path = Path(os.path.normpath(path.parent / base))
        if path.resolve() in visited:
            raise RecipeError("the recipes extend each other in a circle", where, "remove one extends")
        if not path.is_file():
            raise RecipeError(f"no such file: {path}", where, near_path(path))
        if len(chain) >= MAX_CHAIN:
            raise RecipeError(f"more than {MAX_CHAIN} recipes extend each other", where, "merge some of them")


def merge(tree: dict[str, Any], origins: Origins, layer: dict[str, Any], theirs: Origins, at: KeyPath) -> None:
    """Lay one tree over another, in place: mappings key by key, all else replaces."""
    for key, value in layer.items():
        path = (*at, key)
        mine = tree.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            origins.keys[path] = theirs.keys[path]
            origins.values[path] = theirs.values[path]
            merge(mine, origins, value, theirs, path)
        else:
            tree[key] = value
            origins.cut(path)
            origins.take(theirs, path)


def _override(tree: dict[str, Any], origins: Origins, text: str) -> None:
    """Apply one ``a.b=c``; ``c`` is read by the rules of the file, so ``2e-4`` means the same in both places."""
    key, equals, written = text.partition("=")
    source = f"--set {key}"
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError("must look like section.key=value", f"--set {text}")
    if key.split(".")[0] == "extends":
        raise RecipeError("extends works in a file only", source)
    if any(True for _ in secrets_shape.spots(text)):
        origins.secrets.append(Fault("holds something shaped like a secret", source, _SECRET_FIX))
    document = _parse_override(written, source)
    path: KeyPath = tuple(key.split("."))
    origin = Origin(source)
    holder = tree
    for depth, part in enumerate(path[:-1], 1):
        inner = holder.setdefault(str(part), {})
        origins.keys.setdefault(path[:depth], origin)
        if not isinstance(inner, dict):
            raise RecipeError(f"{dotted(path[:depth])} is not a section", source)
        holder = inner
    holder[str(path[-1])] = document.value
    origins.cut(path)
    origins.keys[path] = origins.values[path] = origin
    for below in document.values:
        origins.values[(*path, *below)] = origin
    for below in document.keys:
        origins.keys[(*path, *below)] = origin


def _parse_override(written: str, source: str) -> yamlfile.Document:
    try:
        return yamlfile.parse(written, source)
    except RecipeError as error:
        # A line and column inside a command-line word would only puzzle.
        raise RecipeError.of([Fault(fault.what, source) for fault in error.faults]) from None


_SECRET_FIX = "remove it and revoke it; log in with the tool's own login command or its environment variable"


def _secrets(document: yamlfile.Document) -> list[Fault]:
    """Comments count too: the file itself is copied into run folders."""
    source = document.values[()].source
    return [
        Fault(
            "holds something shaped like a secret", str(yamlfile.position(document.text, offset, source)), _SECRET_FIX
        )
        for offset in secrets_shape.spots(document.text)
    ]
