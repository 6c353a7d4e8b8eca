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
from finetune.recipe.adapter_source import FieldSource, methods
from finetune.recipe.words import Finding, describe, did_you_mean, mend, nearest, shown

METHOD = "lora"  # the one method that can be trained, merged and proven

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
)
REQUIRED = ("r", "lora_alpha")  # they change what is learned: no hidden default

# Narrower than PEFT: the values that train and merge here.
_NARROWED: dict[str, str] = {
    "bias": "Literal['none']",
    "fan_in_fan_out": "Literal[False]",
    "init_lora_weights": "Literal[True, 'gaussian', 'orthogonal']",
    "rank_pattern": "dict[str, int]",
    "alpha_pattern": "dict[str, Union[int, float]]",
}
_NARROWED_WHY = {
    "bias": "bias must be none: merge cannot yet fold trained biases",
    "fan_in_fan_out": "fan_in_fan_out must be false: no supported family stores its weights transposed",
    "init_lora_weights": "init_lora_weights must be true, gaussian or orthogonal: the others change the base "
    "or do not start at zero",
}

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
    method = section.get("method")
    if "method" in section and method != METHOD:
        return {}, [_refused_method(method)]
    known = methods()[METHOD]
    written = {key: value for key, value in section.items() if key not in ("method", START)}
    findings = [_missing(key) for key in ("method", *REQUIRED) if key not in section]
    for key, value in written.items():
        findings += _field(key, value, known)
    bad = {finding.path[0] for finding in findings}
    findings += _together({key: value for key, value in written.items() if key not in bad})
    meant = {word for word in ("method", *REQUIRED) for finding in findings if finding.fix == f"did you mean {word!r}?"}
    findings = [one for one in findings if not (one.path[0] in meant and one.path[0] not in section)]
    return {**defaults(), **written}, findings


def defaults() -> dict[str, Any]:
    """PEFT's defaults of the accepted fields that are not required."""
    known = methods()[METHOD]
    optional = [key for key in FOLDED if key in known and key not in REQUIRED]
    return {key: _constant(known[key].default) for key in optional}


def schema() -> dict[str, Any]:
    """JSON schema of the section for the installed PEFT."""
    known = methods()[METHOD]
    properties: dict[str, Any] = {
        "method": {"const": METHOD, "type": "string", "description": "PEFT method"},
        START: {
            "anyOf": [{"type": "string"}, {"type": "null"}], "default": None,
            "description": "the finished run or adapter whose weights it begins with",
        },
    }  # fmt: skip
    for key in FOLDED:
        if key in known:
            properties[key] = {**_fragment(key, known), "description": f"PEFT's LoraConfig.{key}"}
    for key, value in defaults().items():
        properties[key]["default"] = value
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["method", *REQUIRED],
        "properties": properties,
    }


def _refused_method(method: object) -> Finding:
    if isinstance(method, str) and method in methods():
        return Finding(("method",), f"{method} cannot yet be trained, merged and proven here", f"use {METHOD}")
    if isinstance(method, str):
        return Finding(
            ("method",), f"{shown(method)} is not a PEFT method", did_you_mean(method, _near_methods(method))
        )
    return Finding(("method",), f"must be the name of a PEFT method, found {shown(method)}", f"use {METHOD}")


def _near_methods(word: str) -> list[str]:
    """The usable method when it is near or nothing is (forty names help nobody), else all."""
    known = sorted(methods())
    return [METHOD] if nearest(word, [METHOD]) or not nearest(word, known) else known


def _missing(key: str) -> Finding:
    if key == "method":
        return Finding((key,), "missing", f"add 'method: {METHOD}'")
    return Finding((key,), "missing", f"add '{key}:' to this section; it changes what is learned, so it has no default")


def _field(key: str, value: Any, known: dict[str, FieldSource]) -> list[Finding]:
    if key not in known:
        legal = ["method", *(word for word in FOLDED if word in known)]
        return [Finding((key,), f"unknown key; not a field of the installed PEFT's {METHOD}", did_you_mean(key, legal))]
    if key == "trainable_token_indices":
        return [Finding((key,), "refused: token rows are trained by name", "write trainable_tokens: [...] instead")]
    if key not in FOLDED:
        return [Finding((key,), "refused: merge cannot yet fold this field's effect", "remove it")]
    fragment = _fragment(key, known)
    if not _fits(value, _NARROWED.get(key, known[key].annotation)) and not _is_default(key, value, known):
        what = _NARROWED_WHY.get(key, f"must be {describe(fragment)}")
        return [Finding((key,), f"{what}; found {shown(value)}", mend(value, fragment))]
    return [*_bounds(key, value), *adapter_targets.check(key, value)]


def _is_default(key: str, value: Any, known: dict[str, FieldSource]) -> bool:
    default = _constant(known[key].default)
    return type(value) is type(default) and bool(value == default)


def _bounds(key: str, value: Any) -> Iterator[Finding]:
    """Numbers that PEFT's types allow and no run could want."""
    if key == "r" and not 1 <= value <= adapter_targets.MAX_RANK:
        yield Finding((key,), f"must be from 1 to {adapter_targets.MAX_RANK}; found {shown(value)}")
    if key == "lora_alpha" and not 0 < value <= adapter_targets.MAX_ALPHA:
        yield Finding((key,), f"must be above 0, at most {adapter_targets.MAX_ALPHA}; found {shown(value)}")
    if key == "lora_dropout" and not 0 <= value < 1:
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


def _fragment(key: str, known: dict[str, FieldSource]) -> dict[str, Any]:
    fragment = _adapter(_NARROWED.get(key, known[key].annotation)).json_schema()
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
