"""A recipe as one level of dotted keys, for trackers and for comparing."""

from __future__ import annotations

from typing import Any, Protocol

Scalar = str | int | float | bool


class Resolved(Protocol):
    """What is asked of a recipe here."""

    def to_yaml_dict(self) -> dict[str, Any]: ...


def flatten(recipe: Resolved) -> dict[str, Scalar]:
    """The resolved recipe as ``{"train.steps": 12, ...}``: trackers refuse nested values and lists."""
    flat: dict[str, Scalar] = {}
    _into(flat, "", recipe.to_yaml_dict())
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
