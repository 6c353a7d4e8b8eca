"""How many tokens go through at once and how many layers are recomputed: what ``auto`` becomes on a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.budget import USABLE, Load, Need, Pass
from finetune.hardware import Hardware
from finetune.recipe import Recipe

_MOST_TOKENS = {"cuda": 16_384, "cpu": 4_096}
"""Tokens of a micro-batch beyond which nothing is gained: dequantisation is below 2 % of a pass (CUDA)."""
_RECOMPUTE, _OFFLOAD = 0.47, 0.1
"""Time of a whole recomputation and of moving the layers' inputs, as shares of a step without them."""
_PASS_TOKENS = {"cuda": 200, "cpu": 100}
"""A pass over the weights (dequantisation, launches) costs as much as so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """``recompute``: none, layers or offload; ``layers``: how many of them."""

    recompute: str
    layers: int
    micro_batch_tokens: int


def fit(need: Need, step: int | None) -> Fitted:
    """How many tokens go through at once and how many layers are recomputed, so that a token costs the least time.

    A recomputed layer costs one more forward; a pass over the weights costs as much as some tokens, which is shared by
    all tokens of a micro-batch. ``step``: the most tokens of one step, where that is known.
    """
    train, shape, hardware = need.recipe.train, need.shape, need.hardware
    room = hardware.free_memory * USABLE

    def total(tokens: int, layers: int, offload: bool) -> int:
        one = Pass(tokens=tokens, supervised=tokens, longest=min(tokens, train.max_length))
        return need.budget(one, layers, offload=offload).total

    choices = {"auto": range(shape.layers + 1), "none": [0]}.get(train.recompute, [shape.layers])
    options = [(layers, train.recompute == "offload") for layers in choices]
    options += [(shape.layers, True)] if train.recompute == "auto" and hardware.device == "cuda" else []

    def judged(layers: int, offload: bool) -> tuple[bool, float]:
        """Whether it fits; of those that do the fastest is best, of the others the smallest."""
        fitting = _most_tokens(lambda tokens: total(tokens, layers, offload) <= room)
        micro = _micro(need.recipe, hardware, fitting, step)
        time = _token_time(layers / shape.layers, offload, micro, hardware)
        fits = fitting >= min(micro, step or micro)
        return fits, -time if fits else -total(micro, layers, offload)

    layers, offload = max(options, key=lambda option: judged(*option))
    fitting = _most_tokens(lambda tokens: total(tokens, layers, offload) <= room)
    word = "offload" if offload else "layers" if layers else "none"
    return Fitted(recompute=word, layers=layers, micro_batch_tokens=_micro(need.recipe, hardware, fitting, step))


def _most_tokens(fits: Callable[[int], bool]) -> int:
    """The most tokens that fit, up to a million; memory grows with them."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _micro(recipe: Recipe, hardware: Hardware, fitting: int, step: int | None) -> int:
    if recipe.train.micro_batch_tokens != "auto":
        return recipe.train.micro_batch_tokens
    longest = recipe.unit_tokens
    return max(longest, min(_MOST_TOKENS[hardware.device], fitting, max(step or fitting, longest)))


def _token_time(recomputed: float, offload: bool, micro: int, hardware: Hardware) -> float:
    """Relative to a token with nothing recomputed and no pass over the weights to share."""
    return 1 + _RECOMPUTE * recomputed + (_OFFLOAD if offload else 0) + _PASS_TOKENS[hardware.device] / micro


def step_tokens(recipe: Recipe, load: Load | None) -> int | None:
    """The most tokens that one step can hold, where that is known."""
    if recipe.train.tokens_per_step:
        return recipe.train.tokens_per_step
    if load and recipe.train.examples_per_step:
        return sum(sorted(load.lengths)[-recipe.train.examples_per_step :])
    return None
