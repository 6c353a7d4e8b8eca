"""Which modules of the base an adapter touches, by PEFT's own matching rules, before PEFT or the weights are there.

What PEFT would pass over without a word (a layer that the model has not, a name that matches nothing) or refuse only
once the model is loaded is a fault of the recipe here, with its file and line.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune import forms, methods
from finetune.decoder import LINEARS, DecoderShape
from finetune.errors import Fault, RecipeError
from finetune.optimizer import Tensors
from finetune.recipe import adapter_methods

if TYPE_CHECKING:
    from finetune.recipe import Located


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of module that the adapter touches: how many, of which shape, and the parameters it adds."""

    module: str
    count: int
    shape: tuple[int, int]
    base_parameters: int
    adapter_parameters: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """``targets`` get what the method adds; ``whole`` counts the parameters trained whole (``modules_to_save``);
    ``tensors`` are those of both; ``known`` is false where PEFT must see the weights to count; ``said``: its remarks.
    """

    targets: tuple[Target, ...]
    whole: int
    tensors: tuple[Tensors, ...]
    known: bool = True
    said: tuple[str, ...] = ()


def select(located: Located, shape: DecoderShape) -> Selection:
    """What the recipe's adapter trains of this model.

    Raises:
        RecipeError: names, layers or patterns that match nothing, or what cannot be trained and merged.
    """
    if located.recipe.adapter.method != "lora":
        return _by_peft(located, shape)
    fields, names = located.recipe.adapter.fields, modules(shape)
    chosen = [name for name in names if selected(name, fields)]
    faults = [*_target_faults(fields, names, chosen, shape), *_pattern_faults(fields, chosen)]
    faults += _whole_faults(fields, names, shape, located.recipe.quantize.weights)
    if faults:
        raise RecipeError.of([Fault(what, located.where(f"adapter.{key}"), fix) for key, what, fix in faults])
    kinds: dict[str, list[str]] = {}
    for name in chosen:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    targets = tuple(_target(kind, members, fields, shape) for kind, members in kinds.items())
    whole = _whole_sizes(fields, shape)
    tensors = (*_low_rank_tensors(chosen, fields, shape), *(Tensors("whole", size, 1) for size in whole))
    return Selection(targets=targets, whole=sum(whole), tensors=tensors)


_ELSEWHERE = ("ia3", "ln_tuning", "beft")
"""Methods for which PEFT itself knows the modules that fit; all others get all linears where none are named."""


def fields_of(method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the targets that the recipe leaves open."""
    if "target_modules" in fields and fields["target_modules"] in (None, "all-linear") and method not in _ELSEWHERE:
        return fields | {"target_modules": list(LINEARS)}
    return fields


def _by_peft(located: Located, shape: DecoderShape) -> Selection:
    """What another method than LoRA trains, as PEFT counts it. Raises as ``select``."""
    method, fields = located.recipe.adapter.method, located.recipe.adapter.fields
    names = modules(shape)
    linears = [name for name in names if name.rpartition(".")[2] in LINEARS]
    faults = _target_faults(fields, names, linears, shape)
    faults += _whole_faults(fields, names, shape, located.recipe.quantize.weights)
    if faults:
        raise RecipeError.of([Fault(what, located.where(f"adapter.{key}"), fix) for key, what, fix in faults])
    plain = fields_of(method, {key: value for key, value in fields.items() if key != "modules_to_save"})
    try:
        found = methods.added(method, plain, shape)
    except ValueError as error:
        what = f"PEFT refuses these fields of {method} for this model: {error}"
        raise RecipeError(what, located.where("adapter.method"), "mend them") from None
    if found and shape.tied and {"lm_head", "model.embed_tokens"} & set(found.modules):
        what = "matches a matrix that embedding and head share (tied): merging would have to part them"
        raise RecipeError(what, located.where("adapter.target_modules"), "leave it out")
    whole = _whole_sizes(fields, shape)
    tensors = [Tensors("whole", size, 1) for size in whole]
    if found is None:
        return Selection(targets=(), whole=sum(whole), tensors=tuple(tensors), known=False)
    tensors += [Tensors("whole", elements, count) for (_, elements), count in found.trained.items()]
    tensors += [Tensors("frozen", found.kept, 1)] if found.kept else []
    kinds: dict[str, list[str]] = {}
    for name in found.modules:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    targets = [_counted(kind, members, found, shape) for kind, members in kinds.items()]
    shared = sum(elements * count for (owner, elements), count in found.trained.items() if not owner)
    if shared:
        targets.append(Target(module="(shared)", count=1, shape=(0, 0), base_parameters=0, adapter_parameters=shared))
    return Selection(targets=tuple(targets), whole=sum(whole), tensors=tuple(tensors), said=found.said)


def _counted(kind: str, members: list[str], found: methods.Added, shape: DecoderShape) -> Target:
    size = _size(kind, shape) if kind in (*LINEARS, "lm_head", "embed_tokens") else (1, shape.hidden)
    trained = sum(elements * count for (owner, elements), count in found.trained.items() if owner in members)
    return Target(
        module=kind, count=len(members), shape=size, base_parameters=len(members) * size[0] * size[1],
        adapter_parameters=trained,
    )  # fmt: skip


def modules(shape: DecoderShape) -> list[str]:
    """Every module name of the model, containers and parameterless ones included: a pattern is held against all."""
    leaves = [name.rpartition(".")[0] for name in shape.tensors()]
    leaves += [
        *(() if shape.scored else ("lm_head",)),
        "model.rotary_emb",
        *(f"model.layers.{layer}.mlp.act_fn" for layer in range(shape.layers)),
    ]
    found: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.split(".")
        found |= {".".join(parts[:end]): None for end in range(1, len(parts) + 1)}
    return list(found)


def selected(name: str, fields: dict[str, Any]) -> bool:
    """Whether PEFT puts a LoRA on the module of that name."""
    wanted, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if excluded and _matches(name, excluded):
        return False
    if any(re.match(rf"(^|.*\.){whole}($|\..*)", name) for whole in fields.get("modules_to_save") or ()):
        return False
    if wanted is None or wanted == "all-linear":
        wanted = list(LINEARS)
    layers = fields.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or not _matches(name, wanted):
        return _matches(name, wanted)
    return _layer(name, fields.get("layers_pattern")) in ([layers] if isinstance(layers, int) else layers)


def _matches(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _layer(name: str, patterns: Any) -> int | None:
    given = [patterns] if isinstance(patterns, str) else patterns or []
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in given or [r"[^.]*"]]
    return next((int(match[1]) for match in found if match), None)


Found = list[tuple[str, str, str]]


def _target_faults(fields: dict[str, Any], names: list[str], chosen: list[str], shape: DecoderShape) -> Found:
    """(key, what, fix) of each fault."""
    wanted = fields.get("target_modules")
    listed = wanted if isinstance(wanted, list) else []
    found = [
        ("target_modules", f"{one!r} matches no module of this model", f"its linears are {', '.join(LINEARS)}")
        for one in listed
        if not any(_matches(name, [one]) for name in names)
    ]
    layers = fields.get("layers_to_transform")
    beyond = [layer for layer in ([layers] if isinstance(layers, int) else layers or []) if layer >= shape.layers]
    if beyond:
        what = f"layer {beyond[0]} is beyond the model's {shape.layers}"
        found.append(("layers_to_transform", what, f"they are numbered from 0 to {shape.layers - 1}"))
    if not chosen and not found:
        found.append(("target_modules", "the selection matches no module of this model", "widen it"))
    for name in chosen:
        if name == "lm_head" and shape.tied:
            what = "matches lm_head, whose weights are the embedding's own (tied): merging would have to part them"
            return [*found, ("target_modules", what, "leave lm_head out")]
        if name != "lm_head" and name.rpartition(".")[2] not in LINEARS:
            what = f"the pattern also matches {name}, which is no linear"
            return [*found, ("target_modules", what, r"match linears only, as in '.*self_attn\.[qkvo]_proj'")]
    return found


def _pattern_faults(fields: dict[str, Any], chosen: list[str]) -> Found:
    return [
        (key, f"{word!r} matches no module that gets an adapter", "mend or remove it")
        for key in ("rank_pattern", "alpha_pattern")
        for word in fields.get(key) or {}
        if not any(_pattern_hits(word, name) for name in chosen)
    ]


def _pattern_hits(word: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({word})$", name) is not None


def _whole_faults(fields: dict[str, Any], names: list[str], shape: DecoderShape, weights: str) -> Found:
    found = []
    for one in fields.get("modules_to_save") or []:
        hits = [name for name in names if name.endswith(one)]
        if not hits:
            found.append(("modules_to_save", f"{one!r} matches no module of this model", "remove it"))
        elif shape.tied and {"model.embed_tokens", "lm_head"} & set(hits):
            what = f"{one} shares its weights with another module (tied embeddings): merging would have to part them"
            found.append(("modules_to_save", what, "remove it, or take a base whose embeddings are not tied"))
        elif forms.is_packed(weights) and any(name.rpartition(".")[2] in LINEARS for name in hits):
            what = f"{one} is held as {weights}, and only full-precision modules can be trained whole"
            found.append(("modules_to_save", what, "remove it, or set quantize.weights to bf16"))
    return found


def _target(kind: str, members: list[str], fields: dict[str, Any], shape: DecoderShape) -> Target:
    out, inside = _size(kind, shape)
    added = sum(one.parameters for one in _low_rank_tensors(members, fields, shape) if one.role != "frozen")
    return Target(
        module=kind, count=len(members), shape=(out, inside),
        base_parameters=len(members) * out * inside, adapter_parameters=added,
    )  # fmt: skip


def _size(kind: str, shape: DecoderShape) -> tuple[int, int]:
    return shape.linear(kind) if kind in LINEARS else (shape.vocab, shape.hidden)


def _low_rank_tensors(names: list[str], fields: dict[str, Any], shape: DecoderShape) -> list[Tensors]:
    """What PEFT adds to these modules: A [rank, in], B [out, rank] and DoRA's magnitude [out] each."""
    pattern = fields.get("rank_pattern") or {}
    found: Counter[tuple[str, int]] = Counter()
    for name in names:
        out, inside = _size(name.rpartition(".")[2], shape)
        rank = next((r for word, r in pattern.items() if _pattern_hits(word, name)), fields["r"])
        found["A", rank * inside] += 1
        found["B", rank * out] += 1
        found["magnitude", out] += bool(fields.get("use_dora"))
        found["frozen", rank * (inside + out)] += adapter_methods.start_of(fields) in adapter_methods.OFF_BASE
    return [Tensors(role, elements, count) for (role, elements), count in found.items() if count]


def _whole_sizes(fields: dict[str, Any], shape: DecoderShape) -> list[int]:
    names = [*(fields.get("modules_to_save") or ()), *(("score",) if shape.scored else ())]
    return [
        math.prod(size)
        for tensor, size in shape.tensors().items()
        if any(tensor.rpartition(".")[0].endswith(name) for name in names)
    ]
