"""Several adapters, step by step together: one forward and one backward pass over the rows of all of them.

The joint loop beside ``loop.run``, of the same parts. Each member has its own samples, course, optimizer and loss:
summed over its rows, divided by the count of its own step. No sample sees another, and no weight of one adapter meets
rows of another one, so that the gradients of a pass fall apart into those of runs of their own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune import loop
from finetune.errors import ModelError
from finetune.loop import Course, StepDone
from finetune.model import Policy
from finetune.shared_base import Joint

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.objectives import Batch, Objective


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter's training, as ``loop.run`` would take it."""

    name: str
    policy: Policy
    examples: Sequence[Example]
    course: Course
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """A member's policy whose hidden states were computed already, in the joint pass. hidden: [1, tokens, hidden]."""

    policy: Policy
    states: torch.Tensor

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
        assert ids.shape[1] == self.states.shape[1], "another batch than that of the joint pass"
        return self.states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def run(joint: Joint, objective: Objective, members: Sequence[Member], start: int = 0) -> Iterator[dict[str, StepDone]]:
    """Train from step ``start`` to the end of the longest course; after each step, what each member did in it.

    A member takes no part in steps beyond its own course. ``seconds`` is the time of the joint step for each.

    Raises:
        ModelError: a loss, gradient or weight that is not finite, with the member's name and the rows of its batch.
    """
    joint.train()
    feeds = [loop.step_batches(member.examples, member.course, objective, start) for member in members]
    for step in range(start, max(len(member.course.steps) for member in members)):
        began = time.perf_counter()
        active = [who for who, member in enumerate(members) if step < len(member.course.steps)]
        batches = {who: next(feeds[who]) for who in active}
        waited = time.perf_counter() - began
        losses = _passes(joint, objective, members, step, batches)
        done = {}
        for who in active:
            member = members[who]
            with _named(member.name):
                done[member.name] = loop.end_step(
                    member.policy, member.course, member.optimizer, member.scaler,
                    step, batches[who], losses[who], began, waited,
                )  # fmt: skip
        seconds = time.perf_counter() - began
        yield {name: replace(event, seconds=seconds) for name, event in done.items()}


def _passes(
    joint: Joint, objective: Objective, members: Sequence[Member], step: int, batches: dict[int, list[Batch]]
) -> dict[int, float]:
    """Forward and backward over a step's micro-batches, the first of each member together, then the second; each
    member's mean loss."""
    counts = {who: sum(batch.count for batch in own) for who, own in batches.items()}
    totals = dict.fromkeys(batches, 0.0)
    for number in range(max(map(len, batches.values()))):
        here = {who: own[number].to(joint.policy.device) for who, own in batches.items() if number < len(own)}
        seeds = [members[who].course.noise_seed(step, number) for who in here]
        with joint.rows([(who, batch.tokens) for who, batch in here.items()], seeds):
            states = joint.policy.hidden(*_packed(list(here.values())))
            total = torch.zeros((), device=states.device)
            low = 0
            for who, batch in here.items():
                member = members[who]
                seat: Any = _Seat(policy=member.policy, states=states[:, low : low + batch.tokens])
                low += batch.tokens
                result = objective.loss(seat, batch)
                with _named(member.name):
                    loop.stop_if_not_finite(result.total, "loss", step, batch.rows)
                totals[who] += result.total.item()
                scaled = result.total / counts[who]
                total = total + (member.scaler.scale(scaled) if member.scaler else scaled)
            total.backward()  # type: ignore[no-untyped-call]
    return {who: totals[who] / counts[who] for who in totals}


def _packed(batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], list[int]]:
    """ids, positions [1, tokens] and bounds of all batches, one after the other; where all but the first begin."""
    bounds, cuts = [0], list[int]()
    for batch in batches:
        low = bounds[-1]
        cuts.append(low)
        bounds += [low + bound for bound in batch.bounds[1:]]
    ids, positions = (torch.cat([getattr(batch, name) for batch in batches], dim=1) for name in ("ids", "positions"))
    return ids, positions, tuple(bounds), cuts[1:]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the member's name before a fault of its own."""
    try:
        yield
    except ModelError as error:
        raise ModelError.of([one._replace(what=f"adapter {name}: {one.what}") for one in error.faults]) from None
