"""Every step of each adapter in a joint run is the step of its own single run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lockstep, loop, model, schedule, shared_base
from finetune import optimizer as optimizers
from finetune.dataset import Example
from finetune.errors import ModelError
from finetune.kernels import frozen_linear, lora_routed
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
    policy = model.attach(tiny.load(folder, weights), tiny.FIELDS | wanted.fields, wanted.seed, **attach)
    optimizer = optimizers.make(policy.model, weight_decay=wanted.decay)
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
        policy = model.attach(shared_base.view(base), tiny.FIELDS | wanted.fields, wanted.seed, **attach)
        optimizer = optimizers.make(policy.model, weight_decay=wanted.decay)
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
    """The largest relative difference of any step: of the loss, the gradient's norm, the adapter as one vector."""
    assert len(one.events) == len(two.events)
    found = [0.0]
    for a, b, mine, theirs in zip(one.events, two.events, one.tensors, two.tensors, strict=True):
        assert (a.step, a.learning_rate, a.tokens, a.supervised, a.samples) == (
            b.step, b.learning_rate, b.tokens, b.supervised, b.samples,
        )  # fmt: skip
        found += [abs(a.loss - b.loss) / b.loss, abs(a.grad_norm - b.grad_norm) / b.grad_norm]
        assert mine.keys() == theirs.keys()
        found.append(tiny.distance(tiny.flat(mine), tiny.flat(theirs)))
    return max(found)


def worst(one: Lived, two: Lived) -> float:
    """The largest norm-relative difference of one tensor of the adapter."""
    pairs = zip(one.tensors, two.tensors, strict=True)
    return max(tiny.distance(a[name], b[name]) for a, b in pairs for name in b if bool(b[name].any()))


@pytest.fixture(scope="module")
def lone(tiny_base: Path) -> dict[tuple[str, str], Lived]:
    """The single runs, by form of the base and name."""
    return {(form, name): alone(tiny_base, form, one) for form in ("nf4", "fp32") for name, one in unlike().items()}


@pytest.mark.parametrize("weights", ["nf4", "fp32"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_step_of_each_is_that_of_its_own_run(
    tiny_base: Path, lone: dict[tuple[str, str], Lived], weights: str, recompute: bool
) -> None:
    for name, lived in together(tiny_base, weights, unlike(), recompute).items():
        assert apart(lived, lone[weights, name]) < BOUND, name
        # One tensor may be further off: Adam's first step is g / |g|, a whole one also for rounding noise.
        assert worst(lived, lone[weights, name]) < 10 * BOUND, name


@pytest.mark.parametrize("weights", ["nf4", "int8", "fp32"])
def test_each_gradient_is_that_of_its_own_run(tiny_base: Path, weights: str) -> None:
    assert gradients_apart(tiny_base, weights, unlike()) < BOUND


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}}],
    ids=["DoRA", "token rows"],
)
def test_what_the_fused_step_does_not_cover_goes_by_its_own_module(tiny_base: Path, fields: dict[str, Any]) -> None:
    """One such adapter beside plain ones."""
    wanted = unlike()
    wanted["few"].fields.update(fields)
    assert gradients_apart(tiny_base, "fp32", wanted) < BOUND


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_dropout_is_the_noise_of_its_own_run(tiny_base: Path, recompute: bool) -> None:
    wanted = unlike()
    for name, chance in (("wide", 0.3), ("long", 0.1)):
        wanted[name].fields["lora_dropout"] = chance
    # Gradients, not adapters: the noise leaves many near nothing, and Adam's g / |g| makes those as large as any.
    assert gradients_apart(tiny_base, "nf4", wanted, recompute) < BOUND


def test_without_kernels_it_is_the_same(tiny_base: Path) -> None:
    assert gradients_apart(tiny_base, "fp32", unlike(), kernels=False) < BOUND


def gradients_apart(
    folder: Path, weights: str, all_: dict[str, Wanted], recompute: bool = False, **attach: Any
) -> float:
    """The largest norm-relative difference of a gradient, tensor by tensor, of adapters that are awake."""
    joint, made = members(folder, weights, all_, **attach)
    if recompute:
        joint.policy.recompute_layers()
    recorders = [wake(member.policy) for member in made]
    made = [replace(member, optimizer=one) for member, one in zip(made, recorders, strict=True)]
    for _ in run(joint, sft, made):
        pass
    found = 0.0
    for member, recorder in zip(made, recorders, strict=True):
        one = all_[member.name]
        policy = model.attach(tiny.load(folder, weights), tiny.FIELDS | one.fields, one.seed, **attach)
        own = wake(policy)
        for _ in loop.run(policy, sft, one.examples, one.course, own):
            pass
        assert len(recorder.gradients) == len(own.gradients)
        for mine, theirs in zip(recorder.gradients, own.gradients, strict=True):
            found = max(
                found, *(tiny.distance(mine[name], theirs[name]) for name in theirs if bool(theirs[name].any()))
            )
    return found


def wake(policy: Policy) -> tiny.Recorder:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return tiny.Recorder(policy)


_ROWS, _SITE = shared_base.Joint.rows, shared_base.Routed.routed_site


def wrong_rows(self: shared_base.Joint, tokens: Any, seeds: Any) -> Any:
    """The rows of each are given to the next one's adapter."""
    who = [one for one, _ in tokens]
    return _ROWS(self, [(other, count) for other, (_, count) in zip([*who[1:], who[0]], tokens, strict=True)])


def wrong_scaling(self: shared_base.Routed) -> Any:
    """Everyone's update is scaled as the first one's."""
    site = _SITE(self)
    shares = site.shares if site else ()
    return site and replace(site, shares=tuple(replace(one, scaling=shares[0].scaling) for one in shares))


def one_noise(self: shared_base.Routes, who: int) -> Any:
    """Whatever the generator gives next."""
    return contextlib.nullcontext()


def shared_count(joint: Any, objective: Any, made: Any, step: int, batches: Any) -> Any:
    """Every member's loss divided by the count of all."""

    every = sum(batch.count for own in batches.values() for batch in own)
    inflated = {}
    for who, own in batches.items():
        extra = (every - sum(batch.count for batch in own)) / len(own)
        inflated[who] = [Counted(batch, batch.count + extra) for batch in own]
    return _PASSES(joint, objective, made, step, inflated)


@dataclass
class Counted:
    """A batch that gives another count."""

    batch: Any
    count: float

    def to(self, device: Any) -> Any:
        return self.batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)


_PASSES = lockstep._passes


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (shared_base.Joint, "rows", wrong_rows),
        (shared_base.Routed, "routed_site", wrong_scaling),
        (lockstep, "_passes", shared_count),
        (shared_base.Routes, "noise_of", one_noise),
    ],
)
def test_a_planted_bug_is_seen(
    tiny_base: Path,
    lone: dict[tuple[str, str], Lived],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    bug: Any,
) -> None:
    monkeypatch.setattr(where, name, bug)
    wanted, own = unlike(), dict(lone)
    if bug is one_noise:
        wanted["few"].fields["lora_dropout"] = 0.2
        own["fp32", "few"] = alone(tiny_base, "fp32", wanted["few"])
    lived = together(tiny_base, "fp32", wanted)
    assert max(apart(one, own["fp32", who]) for who, one in lived.items()) > 100 * BOUND


def test_the_base_is_dequantised_once_for_all(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch j of every member goes through the base at once: four members ask no more of it than one."""
    asked: list[Any] = []

    def counting(layer: Any, dtype: torch.dtype) -> torch.Tensor:
        asked.append(layer)
        return frozen_linear.dense_weight(layer, dtype)

    monkeypatch.setattr(lora_routed, "dense_weight", counting)
    one = Wanted({}, tiny.samples(LENGTHS), tiny.course([list(range(8))]))
    passes = len(schedule.pack(LENGTHS, 64))
    for count in (1, 4):
        asked.clear()
        joint, made = members(tiny_base, "nf4", {str(number): one for number in range(count)})
        next(run(joint, sft, made))
        assert len(asked) == passes * (2 * 14 - 3)  # the first layer's input needs no gradient


def test_a_fault_names_the_adapter_and_its_rows(tiny_base: Path) -> None:
    joint, made = members(tiny_base, "fp32", unlike())
    with torch.no_grad():
        next(value for name, value in made[1].policy.trainable().items() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ModelError, match="adapter few: the loss of step 1 is not finite") as caught:
        next(run(joint, sft, made))
    assert "rows.jsonl:" in caught.value.faults[0].where
