"""The order of a run, by arithmetic: which samples each step takes, how they are packed, and the learning rate.

Nothing here has state. Step s of a run is a pure function of the recipe's numbers and the samples' lengths, so that a
resumed run finds the same step without replaying anything.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_DECAY_SHARE = 0.2
"""Share of the steps in which ``wsd`` goes linearly to zero (warm-up, stable, decay)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source: its name, how many of the samples are its own, and the share of the tokens that it is to give."""

    name: str
    samples: int
    share: float | None


def epoch_order(rows: int, epoch: int, seed: int, source: int = 0) -> list[int]:
    """A permutation of the samples that depends on nothing but these numbers."""
    # torch seeds with the low 32 bits alone: there the sources must differ.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + source * 0x9E37_79B1) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def _stream(rows: int, seed: int, epochs: float) -> Iterator[int]:
    left = math.ceil(rows * epochs) if math.isfinite(epochs) else math.inf
    epoch = 0
    while left > 0:
        order = epoch_order(rows, epoch, seed)
        yield from order[: int(min(left, rows))]
        left -= rows
        epoch += 1


def _passes(first: int, rows: int, seed: int, source: int) -> Iterator[int]:
    for epoch in itertools.count():
        yield from (first + index for index in epoch_order(rows, epoch, seed, source))


def _mixed(lengths: Sequence[int], parts: Sequence[Part], seed: int, epochs: float) -> Iterator[int]:
    """Samples of several sources, always from the one that lags furthest behind its share of the tokens.

    Each source is gone through in its own shuffled passes. An epoch is as many tokens as all sources have together.
    """
    firsts = [0, *itertools.accumulate(part.samples for part in parts)][:-1]
    orders = [
        _passes(first, part.samples, seed, source)
        for source, (first, part) in enumerate(zip(firsts, parts, strict=True))
    ]
    shares = [part.share or 0.0 for part in parts]
    wanted = epochs * sum(lengths)
    drawn = [0] * len(parts)
    total = 0
    while total < wanted:
        source = max(range(len(shares)), key=lambda one: shares[one] * (total + 1) - drawn[one])
        index = next(orders[source])
        drawn[source] += lengths[index]
        total += lengths[index]
        yield index


def steps(
    lengths: Sequence[int],
    seed: int,
    *,
    count: int | None,
    epochs: float | None,
    examples: int | None,
    tokens: int | None,
    parts: Sequence[Part] = (),
) -> list[tuple[int, ...]]:
    """The samples of every step.

    Args:
        lengths: tokens of each sample.
        count, epochs: how long: a number of steps, or passes over the data (the last step may be short).
        examples, tokens: how much per step: a number of samples, or at most so many tokens (and at least one sample).
        parts: whose samples they are, in that order. Where they have shares, each source gives its share of the tokens;
            else a pass takes each sample once.
    """
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    size = 0
    passes = math.inf if epochs is None else epochs
    mixed = any(part.share is not None for part in parts)
    stream = _mixed(lengths, parts, seed, passes) if mixed else _stream(len(lengths), seed, passes)
    for index in stream:
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
    """Samples in as few micro-batches of at most ``limit`` tokens as best fit finds; returns positions, in order.

    The longest goes first, each into the fullest batch that still has room (best-fit decreasing, at most 11/9 of the
    fewest possible: Johnson 1973). A sample longer than the limit has a batch of its own.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), sorted
    for position in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        size = sizes[position]
        at = bisect.bisect_left(rooms, (size, 0))
        room, into = rooms.pop(at) if at < len(rooms) else (limit, len(packs))
        if into == len(packs):
            packs.append([])
        packs[into].append(position)
        bisect.insort(rooms, (room - size, into))
    return sorted(sorted(positions) for positions in packs)


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


def deal(tokens: Sequence[int], world: int) -> list[list[int]]:
    """Numbers of micro-batches for each process: the heaviest first, each to the one with the least so far.

    At most 4/3 of the best possible (Graham 1969). The same on every process.
    """
    loads, dealt = [0] * world, [list[int]() for _ in range(world)]
    for number in sorted(range(len(tokens)), key=lambda one: (-tokens[one], one)):
        rank = min(range(world), key=lambda one: (loads[one], one))
        loads[rank] += tokens[number]
        dealt[rank].append(number)
    return [sorted(numbers) for numbers in dealt]
