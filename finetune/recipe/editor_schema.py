"""The recipe's JSON schema, for editors and for wording faults: pydantic's export, flattened and completed."""

from __future__ import annotations

from typing import Any

from finetune.recipe import adapter_fields, several


def build(exported: dict[str, Any]) -> dict[str, Any]:
    """One self-contained schema from the models' own: references inlined, the installed PEFT's adapter fields in place.

    A recipe that extends another may leave anything out, and one with several adapters may leave it to them: keys are
    required only without ``extends`` and ``adapters``.
    """
    definitions = exported.get("$defs", {})
    properties: dict[str, Any] = {
        "extends": {
            "type": "string",
            "description": "recipe to start from, relative to this file; this file's keys win",
        }
    }
    required: dict[str, dict[str, Any]] = {}
    for key, fragment in exported["properties"].items():
        section = _inlined(fragment, definitions)
        if key == "adapter":
            section = {**adapter_fields.schema(), "description": "what is trained: a PEFT method and its own fields"}
        if section.get("type") == "object":
            required[key] = {"required": section.pop("required", [])} | (
                {"allOf": section.pop("allOf")} if "allOf" in section else {}
            )
        properties[key] = section
    properties[several.KEY] = several.schema(properties)
    full = {"required": exported["required"], "properties": {k: v for k, v in required.items() if v["required"]}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "finetune recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "if": {"not": {"anyOf": [{"required": ["extends"]}, {"required": [several.KEY]}]}},
        "then": full,
    }


def fragment(schema: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    """The part of a built schema that governs a key; empty where nothing does."""
    for part in path:
        kind = "items" if isinstance(part, int) else "properties"
        # Of a key that may also be null, the branch that has such parts.
        branches: list[dict[str, Any]] = [schema, *schema.get("anyOf", ())]
        schema = next((one[kind] for one in branches if kind in one), {})
        schema = schema if isinstance(part, int) else schema.get(part, {})
    return schema


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    # pydantic's titles repeat the key
    return {
        key: _inlined(value, definitions) for key, value in node.items() if not (key == "title" and _is_text(value))
    }


def _is_text(value: object) -> bool:
    return isinstance(value, str)
