"""The recipe's ``adapter:`` section, judged against the installed PEFT's own config fields.

Field names, types and defaults are PEFT's, read from its source (``adapter_source``): no table of ours can drift. What
PEFT offers and this project cannot yet train, merge and prove is refused by name, never ignored.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, Optional, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune.recipe import adapter_targets
from finetune.recipe.adapter_methods import NARROWED, NARROWED_WHY, NESTED, NOT_HERE, OFF_BASE, start_fault, start_of
from finetune.recipe.adapter_source import FieldSource, methods
from finetune.recipe.words import Finding, describe, did_you_mean, mend, nearest, shown

METHOD = "lora"  # the method that a recipe without one is judged by

START = "start_from"  # ours, not PEFT's
# LoRA fields whose effect ``merge`` can fold exactly.
FOLDED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
REQUIRED = ("r", "lora_alpha")  # they change what is learned: no hidden default

_TYPES: dict[str, Any] = {
    "Optional": Optional,
    "Union": Union,
    "Literal": Literal,
    "list": list,
    "List": list,
    "dict": dict,
    "Dict": dict,
    "tuple": tuple,
    "Tuple": tuple,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "Any": Any,
}


def check(section: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The section's fields with PEFT's defaults filled in, and everything wrong with them.

    Every accepted field is present in the result, ``None`` where PEFT's default is None.
    """
    method = section.get("method", METHOD)
    if (refused := _refused_method(method)) is not None:
        return {}, [refused]
    known = methods()[method]
    written = {key: value for key, value in section.items() if key not in ("method", START)}
    needed = ("method", *required(method))
    findings = [_missing(key) for key in needed if key not in section]
    for key, value in written.items():
        findings += _field(key, value, method)
    bad = {finding.path[0] for finding in findings}
    findings += _together({key: value for key, value in written.items() if key not in bad})
    meant = {word for word in needed for finding in findings if finding.fix == f"did you mean {word!r}?"}
    findings = [one for one in findings if not (one.path[0] in meant and one.path[0] not in section)]
    return {**defaults(method), **{key: value for key, value in written.items() if key in known}}, findings


def legal(method: str) -> list[str]:
    """The fields of a method that a recipe may set."""
    known = methods()[method]
    if method == METHOD:
        return [key for key in FOLDED if key in known]
    return [key for key in known if key != "trainable_token_indices"]


def required(method: str) -> tuple[str, ...]:
    """The fields that change what is learned and have no default here: a rank, where PEFT's default is one."""
    if method == METHOD:
        return REQUIRED
    rank = methods()[method].get("r")
    return ("r",) if rank is not None and rank.default not in ("0", "None") else ()


def defaults(method: str = METHOD) -> dict[str, Any]:
    """PEFT's defaults of the accepted fields that are not required."""
    known, needed = methods()[method], required(method)
    return {key: _constant(known[key].default) for key in legal(method) if key not in needed}


def trainable() -> list[str]:
    """The methods that a recipe may name, LoRA first."""
    return [METHOD, *sorted(name for name in methods() if name != METHOD and name not in NOT_HERE)]


def schema() -> dict[str, Any]:
    """JSON schema of the section for the installed PEFT: the fields of all methods, LoRA's own first."""
    kinds = trainable()
    properties: dict[str, Any] = {
        "method": {"enum": kinds, "type": "string", "description": "PEFT method"},
        START: {
            "anyOf": [{"type": "string"}, {"type": "null"}], "default": None,
            "description": "the finished run or adapter whose weights it begins with",
        },
    }  # fmt: skip
    whose: dict[str, list[str]] = {}
    for method in kinds:
        for key in legal(method):
            whose.setdefault(key, []).append(method)
    for key, owners in whose.items():
        said = "PEFT's LoraConfig." + key if owners[0] == METHOD else f"PEFT's field of {', '.join(owners)}"
        parts = [_fragment(key, methods()[owner]) for owner in owners]
        alike = all(part == parts[0] for part in parts)
        properties[key] = {**(parts[0] if alike or owners[0] == METHOD else {}), "description": said}
    for key, value in defaults().items():
        properties[key]["default"] = value
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["method"],
        "allOf": [_needed(method) for method in kinds if required(method)],
        "properties": properties,
    }


def _needed(method: str) -> dict[str, Any]:
    return {"if": {"properties": {"method": {"const": method}}}, "then": {"required": list(required(method))}}


def _refused_method(method: object) -> Finding | None:
    where = ("method",)
    if isinstance(method, str) and method in NOT_HERE:
        return Finding(where, f"{method} cannot be trained here: {NOT_HERE[method]}", "docs/capabilities.md has others")
    if isinstance(method, str) and method in methods():
        return None
    if isinstance(method, str):
        return Finding(where, f"{shown(method)} is not a PEFT method", did_you_mean(method, _near_methods(method)))
    return Finding(where, f"must be the name of a PEFT method, found {shown(method)}", f"use {METHOD}")


def _near_methods(word: str) -> list[str]:
    """The usual method when it is near or nothing is (forty names help nobody), else all."""
    known = sorted(methods())
    return [METHOD] if nearest(word, [METHOD]) or not nearest(word, known) else known


def _missing(key: str) -> Finding:
    if key == "method":
        return Finding((key,), "missing", f"add 'method: {METHOD}'")
    return Finding((key,), "missing", f"add '{key}:' to this section; it changes what is learned, so it has no default")


def _field(key: str, value: Any, method: str) -> list[Finding]:
    known = methods()[method]
    if key not in known:
        words = did_you_mean(key, ["method", START, *legal(method)])
        return [Finding((key,), f"unknown key; not a field of the installed PEFT's {method}", words)]
    if key == "trainable_token_indices":
        return [Finding((key,), "refused: token rows are trained by name", "write trainable_tokens: [...] instead")]
    if key not in legal(method):
        return [Finding((key,), "refused: merge cannot yet fold this field's effect", "remove it")]
    fragment = _fragment(key, known)
    if not _fits(value, NARROWED.get(key, known[key].annotation)) and not _is_default(key, value, known):
        what = NARROWED_WHY.get(key, f"must be {describe(fragment)}")
        return [Finding((key,), f"{what}; found {shown(value)}", mend(value, fragment))]
    if key == "init_lora_weights" and (fault := start_fault(value)) is not None:
        return [fault]
    if isinstance(value, dict) and (
        strange := next((word for word in value if word not in NESTED.get(key, value)), "")
    ):
        return [
            Finding((key, strange), "unknown key, or none that a recipe may set", did_you_mean(strange, NESTED[key]))
        ]
    if _is_default(key, value, known):
        return []
    return [*_bounds(key, value), *adapter_targets.check(key, value, method)]


def _is_default(key: str, value: Any, known: dict[str, FieldSource]) -> bool:
    default = _constant(known[key].default)
    return type(value) is type(default) and bool(value == default)


def _bounds(key: str, value: Any) -> Iterator[Finding]:
    """Numbers that PEFT's types allow and no run could want."""
    if key == "r" and not 1 <= value <= adapter_targets.MAX_RANK:
        yield Finding((key,), f"must be from 1 to {adapter_targets.MAX_RANK}; found {shown(value)}")
    if key == "lora_alpha" and not 0 < value <= adapter_targets.MAX_ALPHA:
        yield Finding((key,), f"must be above 0, at most {adapter_targets.MAX_ALPHA}; found {shown(value)}")
    if key.endswith("dropout") and isinstance(value, int | float) and not 0 <= value < 1:
        yield Finding((key,), f"must be at least 0 and below 1; found {shown(value)}")
    if key == "rank_pattern":
        for word, rank in value.items():
            if not 1 <= rank <= adapter_targets.MAX_RANK:
                yield Finding((key, word), f"must be from 1 to {adapter_targets.MAX_RANK}; found {shown(rank)}")
    if key == "alpha_pattern":
        for word, alpha in value.items():
            if not (0 < alpha <= adapter_targets.MAX_ALPHA and math.isfinite(alpha)):
                yield Finding(
                    (key, word), f"must be above 0, at most {adapter_targets.MAX_ALPHA}; found {shown(alpha)}"
                )


def _together(fields: dict[str, Any]) -> Iterator[Finding]:
    """Combinations that PEFT refuses only once the model is loaded."""
    if isinstance(fields.get("target_modules"), str):
        for key in ("layers_to_transform", "layers_pattern"):
            if fields.get(key) is not None:
                yield Finding((key,), "cannot be used when target_modules is text", "write target_modules as a list")
    elif fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        yield Finding(("layers_pattern",), "needs layers_to_transform", "add layers_to_transform or remove it")
    start = start_of(fields)
    if fields.get("use_dora") is True and start in OFF_BASE:
        what = f"{start} begins with a part of the base, whose norm DoRA's lengths are"
        yield Finding(("use_dora",), what, "remove one of the two")
    for key in NESTED:
        if fields.get(key) is not None and start != key.removesuffix("_config"):
            yield Finding((key,), f"is of init_lora_weights: {key.removesuffix('_config')}", "set that, or remove it")


def _fragment(key: str, known: dict[str, FieldSource]) -> dict[str, Any]:
    fragment = _adapter(NARROWED.get(key, known[key].annotation)).json_schema()
    extra: dict[str, dict[str, Any]] = {
        "r": {"minimum": 1, "maximum": adapter_targets.MAX_RANK},
        "lora_alpha": {"exclusiveMinimum": 0, "maximum": adapter_targets.MAX_ALPHA},
        "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    }
    if "anyOf" in fragment:
        # typing caches Union[A, B] and Union[B, A] as one: without sorting, the order would depend on what ran before.
        fragment["anyOf"].sort(key=lambda part: (part.get("type") == "null", str(part)))
    return {**fragment, **extra.get(key, {})}


def _fits(value: Any, annotation: str) -> bool:
    try:
        read = _adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return isinstance(read, bool) == isinstance(value, bool)  # pydantic takes 1 for Literal[True]


@cache
def _adapter(annotation: str) -> TypeAdapter[Any]:
    kind = _type(ast.parse(annotation, mode="eval").body)
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _type(node: ast.expr) -> Any:
    """The type an annotation names, built from a short list of names; whatever else it names accepts anything."""
    if isinstance(node, ast.Constant):
        return None if node.value is None else Any
    if isinstance(node, ast.Name):
        return _TYPES.get(node.id, Any)
    if isinstance(node, ast.Attribute):
        return _TYPES.get(node.attr, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type(node.left), _type(node.right)]  # noqa: UP007 - the parts are values here, not annotations
    if isinstance(node, ast.Subscript):
        head = _type(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if head is Any:
            return Any
        if head is Literal:
            return Literal[tuple(ast.literal_eval(part) for part in parts)]
        inner = tuple(_type(part) for part in parts)
        return head[inner if len(inner) > 1 else inner[0]]
    return Any


def _constant(source: str | None) -> Any:
    """The value of a default's source text; a factory call gives its empty collection, anything else None."""
    if source in ("dict()", "list()"):
        return {} if source == "dict()" else []
    try:
        return ast.literal_eval(source) if source is not None else None
    except (ValueError, SyntaxError):
        return None
