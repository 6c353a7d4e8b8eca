"""Which methods of PEFT can be trained here, on which base, and why the others cannot.

What a method is by its nature (virtual tokens, a router, a call within the training loop) stands here with its reason.
What was tried stands in ``capabilities.json`` beside this file, which ``make capabilities`` writes: a method that did
not train, resume or load elsewhere on a base is refused there; one that only cannot be merged is trained with a remark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from finetune.recipe.words import Finding, nearest, shown

_VIRTUAL = "its virtual tokens stand before each sample, and samples are packed without them"
NOT_HERE: dict[str, str] = {
    "adalora": "it moves ranks between modules by a call after each step, whose state PEFT does not save with the "
    "adapter: a resumed run would be another one",
    "adaption_prompt": "it replaces the attention's forward by its own, which knows no packed samples",
    "cartridge": "it trains a cache of keys and values before each sample, and samples are packed without it",
    "cpt": _VIRTUAL,
    "multitask_prompt_tuning": _VIRTUAL,
    "p_tuning": _VIRTUAL,
    "poly": "its router needs a task number with every sample",
    "prefix_tuning": "it trains keys and values before each sample, and samples are packed without them",
    "prompt_tuning": _VIRTUAL,
    "shadow": "it runs a second model beside the base, with a loss of its own",
    "trainable_tokens": "token rows are trained by name here: write trainable_tokens: [...] beside a lora adapter",
    "xlora": "it mixes adapters that are trained already",
}
"""Methods that no base makes possible, and why."""

# Narrower than PEFT: the values that train, resume and merge here.
NARROWED: dict[str, str] = {
    "bias": "Literal['none']",
    "fan_in_fan_out": "Literal[False]",
    "init_lora_weights": "bool | str",
    "rank_pattern": "dict[str, int]",
    "alpha_pattern": "dict[str, Union[int, float]]",
    "eva_config": "dict[str, Union[bool, int, float]] | None",
    "corda_config": "dict[str, Union[bool, str]] | None",
    "lora_ga_config": "dict[str, Union[int, str]] | None",
    "save_projection": "Literal[True]",
    "save_precomputed_indices": "Literal[True]",
    "save_only_topk_weights": "Literal[False]",
    "use_asa": "Literal[False]",
}
NARROWED_WHY = {
    "bias": "bias must be none: merge cannot yet fold trained biases",
    "fan_in_fan_out": "fan_in_fan_out must be false: no supported family stores its weights transposed",
    "save_projection": "save_projection must be true: drawn anew, a projection may differ from machine to machine",
    "save_precomputed_indices": "save_precomputed_indices must be true: found anew, they may differ",
    "save_only_topk_weights": "save_only_topk_weights must be false: a run could not go on from its checkpoint",
    "use_asa": "use_asa must be false: it moves ranks by a call after each step, which no checkpoint would hold",
}
NESTED: dict[str, tuple[str, ...]] = {
    "eva_config": ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors"),
    "corda_config": ("corda_method", "use_float16_for_covariance"),
    "lora_ga_config": ("direction", "scale", "stable_gamma"),
}
"""Of fields that are sections themselves, PEFT's keys that a recipe may set: those that name files may not."""

STARTS = ("true", "gaussian", "orthogonal", "mica", "pissa", "olora", "eva", "corda", "lora_ga")
"""The words of LoRA's ``init_lora_weights``; pissa also as pissa_niter_N."""
OFF_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Those that begin as a part of the base, which is taken off beside it."""
_STARTS_WHY = {
    "loftq": "LoftQ replaces the base by a quantisation of its own, which is not the base that is trained on here",
    "false": "the adapter would not start at zero",
}

TRIED = ("fp32", "bf16", "nf4", "fp4", "int8")
_AS = {"fp16": "bf16", "torchao_int8": "int8", "gptq": "nf4", "awq": "nf4"}
"""A number format that was not tried, and the one that speaks for it."""

# Fields that make another method of one, in the order in which the matrix names them.
_VARIANTS = ("use_rslora", "use_dora", "init_lora_weights", "init_weights")


def variants(method: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in the matrix, field that makes it one) of a method and of each variant that its fields choose."""
    yield method, "method"
    for key in _VARIANTS:
        value = fields.get(key)
        if value not in (None, True, False) or (value is True and key.startswith("use_")):
            yield f"{method} {key}: {_word(value)}", key


def _word(value: object) -> str:
    if value is True:
        return "true"
    return "pissa" if str(value).startswith("pissa") else str(value)


def start_of(fields: Mapping[str, Any]) -> str:
    """The word that LoRA begins by, ``pissa`` for all its kinds; empty for PEFT's usual start."""
    value = fields.get("init_lora_weights")
    return "" if value in (None, True, False) else _word(value)


def start_fault(value: bool | str) -> Finding | None:
    """What is wrong with LoRA's beginning."""
    word = "true" if value is True else "false" if value is False else value
    if word in STARTS or re.fullmatch(r"pissa_niter_\d{1,4}", word):
        return None
    if word in _STARTS_WHY:
        return Finding(("init_lora_weights",), f"{word} is refused: {_STARTS_WHY[word]}", "use true")
    what = f"init_lora_weights must be true or one of {', '.join(STARTS[1:])}; found {shown(value)}"
    near = nearest(word, STARTS[1:])
    return Finding(("init_lora_weights",), what, f"did you mean {near!r}?" if near else "")


@cache
def tried() -> dict[str, Any]:
    """``{"peft": version, "refused": {name: {base: reason}}, "unmerged": …}``, as ``make capabilities`` found it."""
    text = resources.files(__package__).joinpath("capabilities.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def refusals(method: str, fields: Mapping[str, Any], weights: str) -> Iterator[tuple[str, str]]:
    """(field, reason) of what the matrix found not to train, resume or load elsewhere on a base held so."""
    base = _AS.get(weights, weights)
    for name, key in variants(method, fields):
        if reason := tried()["refused"].get(name, {}).get(base):
            yield key, f"{name} on {weights}: {reason}"


def remarks(method: str, fields: Mapping[str, Any], weights: str, installed: str) -> Iterator[str]:
    """What a plan says of a method that can be trained."""
    base = _AS.get(weights, weights)
    for name, _ in variants(method, fields):
        if reason := tried()["unmerged"].get(name, {}).get(base):
            yield f"{name} on {weights} cannot be merged: {reason}; serve the adapter with PEFT"
    if method != "lora" and installed != tried()["peft"]:
        yield f"{method} was tried with PEFT {tried()['peft']}, and {installed} is installed: docs/capabilities.md"
