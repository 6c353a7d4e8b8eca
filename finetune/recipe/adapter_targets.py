"""Names and patterns of an adapter section, matched against the layers every supported family has.

A misspelt target is the quietest of all mistakes: the other targets train and the run looks fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from finetune.recipe.words import Finding, did_you_mean, shown
from finetune.recipe.yamlfile import KeyPath

MAX_RANK = 16_384  # wider than any matrix that LoRA could make smaller
MAX_ALPHA = 1_000_000
MAX_LAYERS = 256  # decoder layers that names are tried for

# The linears of a decoder layer as llama, qwen2 and qwen3 call them.
LINEARS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# Other modules that can be trained whole beside the adapter.
WHOLE = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
NORMS = ("ln_tuning",)
"""Methods whose targets are norms."""
_MOST_REPEATS = 4
_PLAIN = r"write it plainly, as '.*self_attn\.(q|v)_proj'"


def check(key: str, value: Any, method: str = "lora") -> Iterator[Finding]:
    """Faults of one field that holds module names or patterns, as ``(path, what, fix)``; other fields have none."""
    if key in ("target_modules", "exclude_modules") and isinstance(value, str):
        yield from _pattern(key, value)
    elif key in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(value, list):
        targets = [word for word in WHOLE if "norm" in word] if method in NORMS else list(LINEARS)
        legal = [*LINEARS, *WHOLE] if key == "modules_to_save" else targets
        yield from _names(key, value, legal)
    elif key.endswith("_pattern") and isinstance(value, dict):
        for word in value:
            yield from _layer_pattern((key, word), word)
    elif key == "layers_to_transform" and value is not None:
        layers = value if isinstance(value, list) else [value]
        for at, layer in enumerate(layers):
            if not 0 <= layer < MAX_LAYERS:
                path: KeyPath = (key, at) if isinstance(value, list) else (key,)
                yield Finding(path, f"must be a layer number from 0 to {MAX_LAYERS - 1}; found {layer}", "")
        if not layers:
            yield Finding((key,), "the list is empty: nothing would be trained", "name layers or remove it")
        if len(set(layers)) < len(layers):
            yield Finding((key,), "a layer is named twice", "keep one")


def _names(key: str, names: list[str], legal: list[str]) -> Iterator[Finding]:
    if not names and key == "target_modules":
        yield Finding(
            (key,), "the list is empty: nothing would be trained", "name modules or remove it for all linears"
        )
    for at, name in enumerate(names):
        if name.rpartition(".")[2] not in legal:
            yield Finding((key, at), f"no such module: {shown(name)}", did_you_mean(name, legal))
        elif "." in name and not any(_ends_with(full, name) for full in _modules(legal)):
            yield Finding((key, at), f"no such module: {shown(name)}", "write the last part of its name only")
        elif name in names[:at]:
            yield Finding((key, at), f"{shown(name)} is named twice", "keep one")


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _pattern(key: str, text: str) -> Iterator[Finding]:
    """PEFT takes text as one pattern for the whole module name, save the word ``all-linear``."""
    if key == "target_modules" and text == "all-linear":
        return
    pattern = _compiled(text)
    if pattern is None:
        yield Finding((key,), f"not a valid regular expression: {shown(text)}", "")
    elif _endless(text):
        yield Finding((key,), f"repeats within repeats: {shown(text)} could match for hours", _PLAIN)
    elif not any(pattern.fullmatch(name) for name in _modules(list(LINEARS))):
        hint = f"write it as a list: [{text}]" if text in LINEARS else did_you_mean(text, [*LINEARS, "all-linear"])
        yield Finding((key,), f"matches no linear: {shown(text)}", hint)


def _layer_pattern(path: KeyPath, text: str) -> Iterator[Finding]:
    """PEFT takes each key as a pattern for the end of the module name."""
    pattern = _compiled(rf"(.*\.)?({text})$")
    if pattern is None or _compiled(text) is None:
        yield Finding(path, f"not a valid regular expression: {shown(text)}", "")
    elif _endless(text):
        yield Finding(path, f"repeats within repeats: {shown(text)} could match for hours", _PLAIN)
    elif not any(pattern.match(name) for name in _modules(list(LINEARS))):
        yield Finding(path, f"matches no linear: {shown(text)}", did_you_mean(text, LINEARS))


def _endless(text: str) -> bool:
    """Whether a pattern may need time that grows without bound: a repeat within a repeat, or a row of many."""
    rest = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", text)
    if len(re.findall(r"[*+{]", rest)) > _MOST_REPEATS:
        return True
    while group := re.search(r"\(([^()]*)\)([*+{]?)", rest):
        repeated = re.search(r"[*+{]", group[1]) is not None
        if repeated and group[2]:
            return True
        rest = rest[: group.start()] + ("*" if repeated else "x") + rest[group.start(2) :]
    return False


def _compiled(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def _modules(legal: list[str]) -> list[str]:
    return _all_modules(tuple(legal))


@cache
def _all_modules(legal: tuple[str, ...]) -> list[str]:
    names = [f"model.layers.{n}.{LINEARS[w]}.{w}" for n in range(MAX_LAYERS) for w in legal if w in LINEARS]
    return [*names, *(f"model.{word}" for word in legal if word not in LINEARS)]
