"""Distillation: TRL's loss and gradient, the same however a step is cut; its teacher is one more view of the base."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import loop, objectives, shared_base, taught, teacher
from finetune.dataset import Example
from finetune.errors import ModelError
from finetune.model import Policy
from finetune.objectives import Objective, collate
from finetune.objectives.distill import Distill
from finetune.taught import Facts
from finetune.teacher import Live, Stored
from tests import tiny
from tests.objectives import rows

TRL: dict[str, Any] = json.loads((rows.VECTORS.parent / "distill" / "trl.json").read_text(encoding="utf-8"))
PLAIN: dict[str, Any] = {"divergence": "forward_kl", "beta": None, "temperature": 1.0, "alpha": 0.0}
KINDS = {
    "forward_kl": PLAIN,
    "reverse_kl": PLAIN | {"divergence": "reverse_kl"},
    "jsd": PLAIN | {"divergence": "jsd", "beta": 0.5},
    "forward_kl warm": PLAIN | {"temperature": 2.0},
    "reverse_kl cool": PLAIN | {"divergence": "reverse_kl", "temperature": 0.7},
    "jsd uneven": PLAIN | {"divergence": "jsd", "beta": 0.1, "temperature": 0.9},
}
MIXED = PLAIN | {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "alpha": 0.25}
LENGTHS = (9, 17, 5, 30, 12, 22, 8)
CUTS = {"all in one": 10_000, "row by row": 1, "uneven": 50, "small": 31}


def make(kind: dict[str, Any]) -> Objective:
    return objectives.get("distill", kind | {"teacher": "somewhere", "teacher_weights": "auto"})


def taught_by(base: Policy, *, awake: bool = True, **fields: Any) -> Policy:
    """A student with a fresh adapter, and a teacher with a larger one over the same base."""
    view = shared_base.view(base)
    speaker = tiny.adapt(view, seed=5, **({"r": 8, "lora_alpha": 16} | fields)) if awake else view
    speaker.model.requires_grad_(False)
    return replace(tiny.adapt(base, wake=False), teacher=Live(policy=speaker))


def weighted(examples: Sequence[Example]) -> list[Example]:
    """The samples with weights that differ."""
    return [
        replace(one, weights=tuple(weight * (1 + 0.5 * (at % 2)) for weight in one.weights))
        for at, one in enumerate(examples)
    ]


def logits(policy: Policy, examples: Sequence[Example]) -> torch.Tensor:
    """By the library alone: rows padded to one width. → [rows, width, vocabulary]"""
    width = max(len(one.ids) for one in examples)
    ids, mask = torch.zeros(len(examples), width, dtype=torch.long), torch.zeros(len(examples), width, dtype=torch.long)
    for row, one in enumerate(examples):
        ids[row, : len(one.ids)], mask[row, : len(one.ids)] = torch.tensor(one.ids), 1
    found: torch.Tensor = policy.causal_lm(ids, attention_mask=mask, use_cache=False).logits
    return found


def by_definition(policy: Policy, kind: dict[str, Any], examples: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """(mean loss, gradient) of rows that are neither packed nor cut, in probabilities as the papers write them."""
    t, beta = kind["temperature"], kind["beta"]
    with torch.no_grad():
        p = (logits(policy.teacher.policy, examples) / t).softmax(-1)
    ours = logits(policy, examples)
    q = (ours / t).softmax(-1)
    if kind["divergence"] == "forward_kl":
        apart = (p * (p / q).log()).sum(-1)
    elif kind["divergence"] == "reverse_kl":
        apart = (q * (q / p).log()).sum(-1)
    else:
        m = (1 - beta) * q + beta * p
        apart = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    total, count = torch.zeros(()), 0.0
    for row, one in enumerate(examples):
        for place, weight in enumerate(one.weights):
            if weight:
                entropy = -ours[row, place - 1].log_softmax(-1)[one.ids[place]]
                total = total + weight * (kind["alpha"] * entropy + (1 - kind["alpha"]) * apart[row, place - 1])
                count += weight
    loss = total / count
    loss.backward()
    gradient = tiny.flat({name: value.grad.clone() for name, value in policy.trainable().items()})
    policy.model.zero_grad(set_to_none=True)
    return loss.item(), gradient


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_are_trls(name: str, build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "base")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == TRL["base"]
    policy = taught_by(tiny.load(folder), awake=False)
    rows.script().wake(policy.model)
    made = [rows.example(row["prompt_ids"], row["chosen_ids"], f"r:{at}") for at, row in enumerate(TRL["rows"])]
    result = make(KINDS[name]).loss(policy, collate(made))
    (result.total / result.count).backward()
    norm = tiny.flat({key: value.grad for key, value in policy.trainable().items()}).double().norm()
    assert result.total.item() / result.count == pytest.approx(TRL["model"][name]["loss"], rel=1e-5)
    assert float(norm) == pytest.approx(TRL["model"][name]["gradient"], rel=1e-4)


@pytest.mark.parametrize("kind", [*KINDS.values(), MIXED], ids=[*KINDS, "mixed"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("fp64", 1e-10)])
def test_every_cut_gives_the_gradient_of_padded_rows(
    tiny_base: Path, kind: dict[str, Any], precision: str, bound: float
) -> None:
    policy = taught_by(tiny.load(tiny_base) if precision == "fp32" else tiny.exact(tiny_base))
    tiny_awake(policy)
    examples = weighted(tiny.samples(LENGTHS))
    loss, gradient = by_definition(policy, kind, examples)
    figures = []
    for limit in CUTS.values():
        recorder = tiny.Recorder(policy)
        plan = tiny.course([range(len(examples))], micro_batch_tokens=limit, max_grad_norm=math.inf)
        (event,) = loop.run(policy, make(kind), examples, plan, recorder)
        assert event.loss == pytest.approx(loss, rel=bound)
        assert tiny.distance(tiny.flat(recorder.gradients[0]), gradient) < bound
        figures.append(event.figures)
    for one in figures:
        assert one == pytest.approx(figures[0], rel=bound)
        mean = kind["alpha"] * one["cross_entropy"] + (1 - kind["alpha"]) * one["divergence"]
        assert mean == pytest.approx(loss, rel=bound)


def tiny_awake(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)


def test_kernels_off_is_the_same(tiny_base: Path) -> None:
    seen = []
    for kernels in (True, False):
        policy = replace(taught_by(tiny.load(tiny_base)), kernels=kernels)
        plan = tiny.course([range(7)])
        (event,) = loop.run(policy, make(MIXED), tiny.samples(LENGTHS), plan, tiny.Recorder(policy))
        seen.append((event.loss, event.grad_norm))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_the_base_is_there_once_and_the_teacher_stays_itself(tiny_base: Path, form: str) -> None:
    """What it says is what a model of its own would say, before and after the student's steps."""
    alone = tiny.adapt(tiny.load(tiny_base, form), seed=5, r=8, lora_alpha=16)
    policy = taught_by(tiny.load(tiny_base, form))
    held = {one.data_ptr() for one in (*policy.model.parameters(), *policy.model.buffers()) if not one.requires_grad}
    speaker = policy.teacher.policy.model
    own = [name for name, one in (*speaker.named_parameters(), *speaker.named_buffers()) if one.data_ptr() not in held]
    assert own
    assert all("lora_" in name for name in own)
    batch = collate(tiny.samples(LENGTHS))
    with torch.no_grad(), alone.evaluating():
        expected = alone.hidden(batch.ids, batch.positions, batch.bounds)[0][batch.predictors]
    assert torch.equal(policy.teacher.tell(batch).hidden, expected)
    plan = tiny.course([range(7)] * 12, peak_rate=0.01)
    events = list(loop.run(policy, make(PLAIN), tiny.samples(LENGTHS), plan, tiny.adamw(policy)))
    assert events[-1].loss < 0.5 * events[0].loss
    assert torch.equal(policy.teacher.tell(batch).hidden, expected)
    assert not any(one.requires_grad for one in speaker.parameters())


def test_a_teacher_has_no_dropout(tiny_base: Path) -> None:
    policy = taught_by(tiny.load(tiny_base), lora_dropout=0.5)
    policy.teacher.policy.model.train()
    batch = collate(tiny.samples(LENGTHS))
    assert torch.equal(policy.teacher.tell(batch).hidden, policy.teacher.tell(batch).hidden)


def test_a_student_of_itself_has_nothing_to_learn(tiny_base: Path) -> None:
    policy = taught_by(tiny.load(tiny_base), awake=False)
    result = make(PLAIN).loss(policy, collate(tiny.samples(LENGTHS)))
    result.total.backward()
    assert abs(result.total.item()) < 1e-5
    assert tiny.flat({name: value.grad for name, value in policy.trainable().items()}).norm() < 1e-5


def facts(**changes: Any) -> Facts:
    plain: dict[str, Any] = {
        "teacher": {"a": "1"}, "name": "t", "vocabulary": "v", "temperature": 1.0, "top_k": 16, "width": 262,
    }  # fmt: skip
    return Facts(**(plain | changes))


def record(policy: Policy, out: Path, examples: Sequence[Example], **changes: Any) -> taught.Taught:
    return teacher.write(out, facts(**changes), examples, lambda: policy.teacher, 40, lambda *_: None)


def test_what_was_written_down_teaches_the_same(tiny_base: Path, tmp_path: Path) -> None:
    """All tokens: the live teacher's gradient. A few: near it. In another order and packing than it was asked."""
    policy, examples = taught_by(tiny.load(tiny_base)), weighted(tiny.samples(LENGTHS))
    tiny_awake(policy)
    height = policy.head.weight.shape[0]
    plan = tiny.course([[3, 1, 6, 0, 2, 5, 4]], micro_batch_tokens=64, max_grad_norm=math.inf)

    def gradient(speaker: Any) -> torch.Tensor:
        recorder = tiny.Recorder(policy)
        list(loop.run(replace(policy, teacher=speaker), make(MIXED), examples, plan, recorder))
        return tiny.flat(recorder.gradients[0])

    live = gradient(policy.teacher)
    apart = []
    for count in (height, 64, 4):
        said = record(policy, tmp_path / f"top{count}", examples, top_k=count, width=height, temperature=1.5)
        assert said.samples == len(examples)
        apart.append(tiny.distance(gradient(Stored(record=said)), live))
    assert apart[0] < 2e-5
    assert apart[0] < apart[1] < apart[2]


def test_a_row_that_was_not_asked_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    policy, examples = taught_by(tiny.load(tiny_base)), tiny.samples(LENGTHS)
    said = record(policy, tmp_path / "said", examples[:-1])
    assert said.missing(examples) == [examples[-1].where]
    with pytest.raises(ModelError, match="says nothing of this row"):
        said.of(collate(examples[-2:]))
    other = replace(examples[0], weights=(0.0, *examples[1].weights[1 : len(examples[0].ids)]))
    assert said.missing([replace(examples[0], where="elsewhere:9")]) == []
    assert said.missing([other]) == ([other.where] if other.supervised != examples[0].supervised else [])


def test_the_loss_is_the_objectives_alone() -> None:
    """Nothing that is not its own comes from the recipe."""
    made = make(MIXED)
    assert isinstance(made, Distill)
    assert (made.aim.alpha, made.aim.beta, made.aim.temperature) == (0.25, 0.3, 1.5)
