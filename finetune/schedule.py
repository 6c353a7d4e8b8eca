"""The order of a run, by arithmetic: which samples each step takes, how they are packed, and the learning rate.

Nothing here has state. Step s of a run is a pure function of the recipe's numbers and the samples' lengths, so that a
resumed run finds the same step without replaying anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

_DECAY_SHARE = 0.2
"""Share of the steps in which ``wsd`` goes linearly to zero (warm-up, stable, decay)."""


def epoch_order(rows: int, epoch: int, seed: int) -> list[int]:
    """A permutation of the samples that depends on nothing but these three numbers."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def _stream(rows: int, seed: int, epochs: float) -> Iterator[int]:
    left = math.ceil(rows * epochs) if math.isfinite(epochs) else math.inf
    epoch = 0
    while left > 0:
        order = epoch_order(rows, epoch, seed)
        yield from order[: int(min(left, rows))]
        left -= rows
        epoch += 1


def steps(
    lengths: Sequence[int],
    seed: int,
    *,
    count: int | None,
    epochs: float | None,
    examples: int | None,
    tokens: int | None,
) -> list[tuple[int, ...]]:
    """The samples of every step.

    Args:
        lengths: tokens of each sample.
        count, epochs: how long: a number of steps, or passes over the data (the last step may be short).
        examples, tokens: how much per step: a number of samples, or at most so many tokens (and at least one sample).
    """
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    size = 0
    for index in _stream(len(lengths), seed, math.inf if epochs is None else epochs):
        full = len(current) == examples if examples else bool(current) and size + lengths[index] > (tokens or 0)
        if full:
            found.append(tuple(current))
            current, size = [], 0
            if len(found) == count:
                return found
        current.append(index)
        size += lengths[index]
    if current:
        found.append(tuple(current))
    return found


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Split one step's samples, in order, into micro-batches of at most ``limit`` tokens; returns positions."""
    packs: list[list[int]] = []
    room = 0
    for position, size in enumerate(sizes):
        if not packs or size > room:
            packs.append([])
            room = limit
        packs[-1].append(position)
        room -= size
    return packs


def learning_rate(step: int, *, total: int, peak: float, warmup: int, kind: str) -> float:
    """The rate of step ``step`` (from 0 to total-1): linear warm-up, then the named shape, which ends near zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak * (1 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "wsd":
        return peak * min(1.0, (1 - progress) / _DECAY_SHARE)
    raise ValueError(f"unknown schedule {kind!r}")
