"""Every step of each adapter in a joint run is the step of its own single run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import loop, model, shared_base
from finetune.dataset import Example
from finetune.lockstep import Member, run
from finetune.loop import Course, StepDone
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

BOUND = 1e-5
LENGTHS = [12, 40, 7, 22, 33, 31, 15, 9]


@dataclass
class Wanted:
    """One adapter: its fields, samples and course."""

    fields: dict[str, Any]
    examples: list[Example]
    course: Course
    decay: float = 0.0
    seed: int = field(default=0)


def steps(count: int, per_step: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(len(LENGTHS), generator=generator)[:per_step].tolist() for _ in range(count)]


def unlike() -> dict[str, Wanted]:
    """Rank, alpha, targets, rows, rate, schedule, decay, rows a step, steps: nothing is as in the others."""
    few = {"target_modules": ["q_proj", "down_proj"]}
    return {
        "wide": Wanted(
            {"r": 8, "lora_alpha": 16}, tiny.samples(LENGTHS, 1), tiny.course(steps(6, 3, 1), peak_rate=5e-3), 0.1, 4
        ),
        "few": Wanted(
            {"r": 2, "lora_alpha": 16, "use_rslora": True, **few}, tiny.samples(LENGTHS, 2),
            tiny.course(steps(4, 5, 2), kind="cosine", warmup=1, peak_rate=2e-3, max_grad_norm=0.1), 0.0, 5,
        ),
        "long": Wanted({"r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 6}}, tiny.samples(LENGTHS, 3),
                       tiny.course(steps(6, 1, 3), kind="linear"), 0.01, 6),
    }  # fmt: skip


@dataclass
class Lived:
    """What a run did: its events, and the adapter's tensors after every step."""

    events: list[StepDone] = field(default_factory=list)
    tensors: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def add(self, event: StepDone, policy: Policy) -> None:
        self.events.append(event)
        self.tensors.append(model.adapter_weights(policy.model))
        self.tensors[-1] = {name: value.clone() for name, value in self.tensors[-1].items()}


def alone(folder: Path, weights: str, wanted: Wanted, **attach: Any) -> Lived:
    policy = model.attach(tiny.load(folder, weights), tiny.FIELDS | wanted.fields | attach, wanted.seed)
    optimizer = loop.make_optimizer(policy.trainable(), wanted.decay)
    lived = Lived()
    for event in loop.run(policy, sft, wanted.examples, wanted.course, optimizer):
        lived.add(event, policy)
    return lived


def members(
    folder: Path, weights: str, all_: dict[str, Wanted], **attach: Any
) -> tuple[shared_base.Joint, list[Member]]:
    base = tiny.load(folder, weights)
    made = []
    for name, wanted in all_.items():
        policy = model.attach(shared_base.view(base), tiny.FIELDS | wanted.fields | attach, wanted.seed)
        optimizer = loop.make_optimizer(policy.trainable(), wanted.decay)
        made.append(
            Member(name=name, policy=policy, examples=wanted.examples, course=wanted.course, optimizer=optimizer)
        )
    return shared_base.join(base, [member.policy for member in made]), made


def together(
    folder: Path, weights: str, all_: dict[str, Wanted], recompute: bool = False, **attach: Any
) -> dict[str, Lived]:
    joint, made = members(folder, weights, all_, **attach)
    if recompute:
        joint.policy.recompute_layers()
    lived = {member.name: Lived() for member in made}
    for done in run(joint, sft, made):
        for member in made:
            if member.name in done:
                lived[member.name].add(done[member.name], member.policy)
    return lived


def apart(one: Lived, two: Lived) -> float:
    """The largest norm-relative difference of any loss, gradient norm or tensor of any step."""
    assert len(one.events) == len(two.events)
    found = [0.0]
    for a, b, mine, theirs in zip(one.events, two.events, one.tensors, two.tensors, strict=True):
        assert (a.step, a.learning_rate, a.tokens, a.supervised, a.samples) == (
            b.step, b.learning_rate, b.tokens, b.supervised, b.samples,
        )  # fmt: skip
        found += [abs(a.loss - b.loss) / b.loss, abs(a.grad_norm - b.grad_norm) / b.grad_norm]
        assert mine.keys() == theirs.keys()
        found += [
            tiny.distance(mine[name], theirs[name])
            for name in mine
            if bool(theirs[name].any()) or bool(mine[name].any())
        ]
    return max(found)


@pytest.mark.parametrize("weights", ["nf4", "fp32"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_step_of_each_is_that_of_its_own_run(tiny_base: Path, weights: str, recompute: bool) -> None:
    all_ = unlike()
    lived = together(tiny_base, weights, all_, recompute)
    for name, wanted in all_.items():
        d = apart(lived[name], alone(tiny_base, weights, wanted))
        print(name, d)
        assert d < BOUND, name
