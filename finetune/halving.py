"""Successive halving: all runs go a share of their steps, the better half goes on, until one or two are left.

Source: K. Jamieson and A. Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter Optimization*, 2016.
A run is paused at a checkpoint of its whole course, not trained on a shorter one: what goes on to the end has the very
bits of an unbroken run, whatever its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rungs(count: int) -> int:
    """How often the better half of so many runs is taken."""
    return int(math.log2(count)) if count > 1 else 0


def step(steps: int, rung: int, last: int) -> int:
    """Where a run of ``steps`` pauses at a rung; its end at the last one."""
    return math.ceil(steps * 2.0 ** (rung - last))


def better_half(count: int) -> int:
    return math.ceil(count / 2)


def at_most(seconds: Sequence[float]) -> float:
    """The time of all rungs if it is always the dearer runs that go on."""
    left, last = sorted(seconds, reverse=True), rungs(len(seconds))
    total, before = 0.0, 0.0
    for rung in range(last + 1):
        share = 2.0 ** (rung - last)
        total, before = total + math.fsum(left) * (share - before), share
        left = left[: better_half(len(left))]
    return total
