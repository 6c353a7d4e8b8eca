"""The config fields of every method of the installed PEFT, read from its source text.

Importing PEFT costs seconds and pulls in torch; parsing its config files costs a fraction of one and is remembered in
``$XDG_CACHE_HOME/finetune`` under a digest of those files. An unwritable home or a damaged cache only costs time.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from finetune.errors import EnvironmentFault
from finetune.runfolder import user_cache

# What PEFT keeps in a config for itself: not a user's choice, or the recipe says it elsewhere.
INTERNAL = frozenset(
    ["auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"]
)

_FORMAT = 1  # of the cache file


class FieldSource(NamedTuple):
    """One config field as PEFT's source states it; ``default`` is source text, None where the field has none."""

    annotation: str
    default: str | None


Methods = dict[str, dict[str, FieldSource]]


@cache
def methods() -> Methods:
    """``{"lora": {"r": FieldSource("int", "8"), ...}, ...}``. Raises ``EnvironmentFault`` where PEFT is missing."""
    root = _peft_folder()
    files = sorted({root / "config.py", *root.glob("tuners/*.py"), *root.glob("tuners/*/config.py")})
    registrations = sorted(root.glob("tuners/*/__init__.py"))
    stamp = _stamp([*files, *registrations])
    place = user_cache() / f"peft-{version()}.json"
    known = _remembered(place, stamp)
    if known is None:
        known = _parse(files, registrations)
        _remember(place, stamp, known)
    return known


def version() -> str:
    """The installed PEFT's version."""
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _peft_folder() -> Path:
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise EnvironmentFault("the package peft is not installed", fix="install it with: pip install peft")
    return Path(spec.origin).parent


def _parse(files: list[Path], registrations: list[Path]) -> Methods:
    classes: dict[str, ast.ClassDef] = {}
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: Methods = {}
    for file in registrations:
        for name, config in _registered(file.read_text(encoding="utf-8")):
            found[name] = {key: value for key, value in _fields(config, classes).items() if key not in INTERNAL}
    return found


def _registered(text: str) -> Iterator[tuple[str, str]]:
    """(method name, config class name) of each ``register_peft_method`` call."""
    if "register_peft_method(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("register_peft_method"):
            continue
        words = {word.arg: word.value for word in node.keywords}
        name, config = words.get("name"), words.get("config_cls")
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and config is not None:
            yield name.value, ast.unparse(config)


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, FieldSource]:
    """Fields of a dataclass, its bases' first. A base outside PEFT's config files has none."""
    node = classes.get(name)
    if node is None:
        return {}
    fields: dict[str, FieldSource] = {}
    for base in reversed(node.bases):
        fields |= _fields(ast.unparse(base).rpartition(".")[2], classes)
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation = ast.unparse(item.annotation)
        if "InitVar" in annotation or "ClassVar" in annotation:
            continue
        default, is_option = _default(item.value)
        if is_option:
            fields[item.target.id] = FieldSource(annotation, default)
        else:
            fields.pop(item.target.id, None)
    return fields


def _default(value: ast.expr | None) -> tuple[str | None, bool]:
    """The default's source text, and whether the constructor takes the field (``field(init=False)`` says no)."""
    if value is None:
        return None, True
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field"):
        return ast.unparse(value), True
    words = {word.arg: word.value for word in value.keywords}
    init = words.get("init")
    takes = not (isinstance(init, ast.Constant) and init.value is False)
    if "default" in words:
        return ast.unparse(words["default"]), takes
    factory = words.get("default_factory")
    return (f"{ast.unparse(factory)}()" if factory is not None else None), takes


def _stamp(files: list[Path]) -> str:
    """Changes when any file does, even in place under the same version, as in a development install."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Cached(NamedTuple):
    format: int
    stamp: str
    methods: dict[str, dict[str, tuple[str, str | None]]]


def _remembered(place: Path, stamp: str) -> Methods | None:
    try:
        cached = TypeAdapter(_Cached).validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None
    if cached.format != _FORMAT or cached.stamp != stamp:
        return None
    return {
        name: {key: FieldSource(*source) for key, source in fields.items()} for name, fields in cached.methods.items()
    }


def _remember(place: Path, stamp: str, known: Methods) -> None:
    content = json.dumps({"format": _FORMAT, "stamp": stamp, "methods": known})
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a reader sees the old file, the new one or none.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".peft-", delete=False, encoding="utf-8") as new:
            new.write(content)
        os.replace(new.name, place)  # noqa: PTH105 - a temporary file's name is text
    except OSError:
        return  # a cache that cannot be written only costs time
