"""A tree of plain values as one level of dotted keys, for trackers and for comparing."""

from __future__ import annotations

from typing import Any

Scalar = str | int | float | bool


def flattened(tree: dict[str, Any]) -> dict[str, Scalar]:
    """``{"train": {"steps": 12}}`` as ``{"train.steps": 12}``; a list becomes text, null the word."""
    flat: dict[str, Scalar] = {}
    _into(flat, "", tree)
    return flat


def _into(flat: dict[str, Scalar], prefix: str, tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            _into(flat, f"{name}.", value)
        elif isinstance(value, list | tuple | dict):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = "null" if value is None else value
