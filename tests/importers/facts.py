"""What the other trainers' own packages say, where they are installed: read from their source, not imported.

Their config classes import torch, transformers of other versions, vLLM and more; their defaults are plain literals.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

FIXTURES = Path(__file__).parent


def source(package: str) -> Path:
    """The folder of an installed package, or of one below FINETUNE_PEERS; skips where there is none."""
    beside = Path(os.environ.get("FINETUNE_PEERS", "/nowhere"))
    for folder in (beside / package, *beside.glob(f"*/{package}")):
        if (folder / "__init__.py").is_file():
            return folder
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed: nothing to compare its defaults with")
    return Path(found.submodule_search_locations[0])


def defaults(file: Path, *classes: str) -> dict[str, Any]:
    """Field → default of the classes in a file; a default that is no literal is ``...``."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or (classes and node.name not in classes):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = _literal(field.value)
                for alias in _keywords(field.value, "alias"):
                    found[ast.literal_eval(alias)] = found[field.target.id]
    return found


def _keywords(value: ast.expr | None, name: str) -> list[ast.expr]:
    return [word.value for word in value.keywords if word.arg == name] if isinstance(value, ast.Call) else []


def _literal(value: ast.expr | None) -> Any:
    given = _keywords(value, "default")
    if given:
        value = given[0]
    elif isinstance(value, ast.Call):
        value = value.args[0] if value.args else None
    try:
        return ast.literal_eval(value) if value is not None else ...
    except ValueError:
        return ...
