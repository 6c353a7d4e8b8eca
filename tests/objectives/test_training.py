"""The gradient of every objective of judged answers: the plain formula's, however a step is cut, packed or padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import beginning, loop
from finetune.dataset import Example
from finetune.model import Policy
from finetune.objectives import Pairs, log_probs, reference_log_probs, sft
from finetune.objectives.kto import Kto
from tests import tiny
from tests.objectives import rows
from tests.objectives.rows import KINDS

CUTS = {"all in one": 10_000, "row by row": 1, "uneven": 70, "small": 45}


@pytest.fixture(scope="module")
def policies(tiny_base: Path) -> dict[str, Policy]:
    return {"fp32": tiny.adapt(tiny.load(tiny_base)), "fp64": tiny.adapt(tiny.exact(tiny_base))}


def padded(policy: Policy, texts: Sequence[Example]) -> torch.Tensor:
    """Each text's log-probability by the library alone: rows padded to one width, all logits, log-softmax. [texts]"""
    width = max(len(text.ids) for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    weights = torch.zeros(len(texts), width, dtype=torch.float64)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)], mask[row, : len(text.ids)] = torch.tensor(text.ids), 1
        weights[row, : len(text.ids)] = torch.tensor(text.weights, dtype=torch.float64)
    logits = policy.causal_lm(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    found = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2).double()
    return (found * weights[:, 1:]).sum(1)


def by_definition(policy: Policy, kind: str, examples: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """(mean loss, gradient) of rows that are neither packed nor cut, the reference by PEFT's own switch."""
    objective: Any = rows.make(kind)
    texts = objective.texts(examples)
    with torch.no_grad(), policy.model.disable_adapter():
        origin = padded(policy, texts).view(-1, 2)
    found = padded(policy, texts).view(-1, 2)
    if isinstance(objective, Kto):
        ratios = found - origin
        zero = ratios[:, 1].detach().mean().clamp(min=0)
        losses, _ = objective.each(ratios[:, 0], torch.tensor([bool(one.label) for one in examples]), zero)
    else:
        sizes = torch.tensor([sum(text.weights) for text in texts], dtype=torch.float64).view(-1, 2)
        losses, _ = objective.each(found, origin, sizes)
    losses.mean().backward()
    gradient = tiny.flat({name: value.grad.clone() for name, value in policy.trainable().items()})
    policy.model.zero_grad(set_to_none=True)
    return losses.mean().item(), gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp64", 1e-10)])
def test_every_cut_gives_the_gradient_of_padded_rows(
    policies: dict[str, Policy], kind: str, precision: str, bound: float
) -> None:
    policy, examples = policies[precision], rows.drawn(kind, seed=3)
    loss, gradient = by_definition(policy, kind, examples)
    if kind == "kto":  # else nothing is seen of the zero point
        objective = rows.make(kind)
        assert objective.begin(policy, objective.batches(examples, 10_000))[0].zero > 0.01
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    if kind == "kto":  # whose answer stands under whose prompt goes by the step's order
        order = list(range(len(examples)))
    for limit in CUTS.values():
        recorder = tiny.Recorder(policy)
        plan = tiny.course([order], micro_batch_tokens=limit, max_grad_norm=math.inf)
        (event,) = loop.run(policy, rows.make(kind), examples, plan, recorder)
        assert event.loss == pytest.approx(loss, rel=bound)
        assert tiny.distance(tiny.flat(recorder.gradients[0]), gradient) < bound


def test_a_pair_is_one_row_and_all_its_tokens_count(policies: dict[str, Policy]) -> None:
    examples = rows.drawn("dpo sigmoid")
    for limit in CUTS.values():
        batches = rows.make("dpo sigmoid").batches(examples, limit)
        for batch in batches:
            assert len(batch.bounds) - 1 == 2 * len(batch.rows)  # chosen and rejected of each, side by side
            assert batch.tokens <= limit or len(batch.rows) == 1
        plan = tiny.course([range(len(examples))], micro_batch_tokens=limit)
        (event,) = loop.run(policies["fp32"], rows.make("dpo sigmoid"), examples, plan, tiny.Recorder(policies["fp32"]))
        assert event.samples == len(examples)
        assert event.tokens == sum(len(example.ids) for example in examples)
        assert event.supervised == sum(sum(example.supervised) for example in examples)


def test_figures_do_not_depend_on_the_cut(policies: dict[str, Policy]) -> None:
    for kind in ("dpo sigmoid", "kto"):
        seen = []
        for limit in CUTS.values():
            plan = tiny.course([range(7)], micro_batch_tokens=limit)
            (event,) = loop.run(
                policies["fp64"], rows.make(kind), rows.drawn(kind), plan, tiny.Recorder(policies["fp64"])
            )
            seen.append(event.figures)
        for figures in seen:
            assert figures == pytest.approx(seen[0], rel=1e-9)
            margin = figures["rewards/chosen"] - figures["rewards/rejected"]
            assert figures["rewards/margins"] == pytest.approx(margin)


@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_a_fresh_adapter_begins_at_the_reference(tiny_base: Path, form: str) -> None:
    """Dropout is of the policy alone: with B = 0 there is nothing that it could change."""
    policy = tiny.adapt(tiny.load(tiny_base, form), wake=False, lora_dropout=0.5)
    optimizer, plan = tiny.adamw(policy), tiny.course([range(7)] * 12, peak_rate=0.01)
    events = list(loop.run(policy, rows.make("dpo sigmoid"), rows.drawn("dpo sigmoid"), plan, optimizer))
    assert events[0].loss == pytest.approx(math.log(2), rel=1e-12)
    assert events[0].figures["rewards/accuracies"] == 0.5
    assert events[-1].loss < 0.5
    assert events[-1].figures["rewards/accuracies"] > 0.9


def test_the_reference_is_the_base_and_stays_it(tiny_base: Path) -> None:
    bare, policy = tiny.load(tiny_base), tiny.adapt(tiny.load(tiny_base))
    (batch,) = rows.make("dpo sigmoid").batches(rows.drawn("dpo sigmoid"), 10_000)
    before = tiny.weights(policy)
    with torch.no_grad():
        base, adapted = log_probs(bare, batch), log_probs(policy, batch)
    policy.model.train()
    found = reference_log_probs(policy, batch)
    assert torch.equal(found, base)
    assert not torch.allclose(found, adapted)
    assert policy.model.training
    assert tiny.same(tiny.weights(policy), before)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}])
def test_the_reference_may_be_the_adapter_that_one_begins_with(tiny_base: Path, fields: dict[str, Any]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), **fields)
    policy = replace(policy, start=tiny.weights(policy))
    examples = rows.drawn("dpo sigmoid")
    (batch,) = rows.make("dpo sigmoid").batches(examples, 10_000)
    with torch.no_grad():
        began = log_probs(policy, batch)
    plan = tiny.course([range(7)] * 4, peak_rate=0.01)
    events = list(loop.run(policy, rows.make("dpo sigmoid"), examples, plan, tiny.adamw(policy)))
    assert events[0].loss == pytest.approx(math.log(2), rel=1e-12)
    assert events[-1].loss < events[0].loss
    assert torch.equal(reference_log_probs(policy, batch), began)
    with torch.no_grad():
        assert not torch.allclose(log_probs(policy, batch), began)


def test_the_reference_has_no_dropout(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), lora_dropout=0.5)
    policy = replace(policy, start=tiny.weights(policy))
    (batch,) = rows.make("dpo sigmoid").batches(rows.drawn("dpo sigmoid"), 10_000)
    policy.model.train()
    assert torch.equal(reference_log_probs(policy, batch), reference_log_probs(policy, batch))
    with torch.no_grad():
        assert not torch.equal(log_probs(policy, batch), log_probs(policy, batch))


def test_a_fault_inside_puts_the_weights_back(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    before, zeros = tiny.weights(policy), {name: torch.zeros_like(v) for name, v in policy.trainable().items()}
    places = {name: value.data_ptr() for name, value in policy.trainable().items()}

    def fail() -> None:
        with beginning.as_found(policy.model, zeros):
            assert all(not value.any() for value in policy.trainable().values())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert tiny.same(tiny.weights(policy), before)
    assert {name: value.data_ptr() for name, value in policy.trainable().items()} == places


@pytest.mark.parametrize("kind", ["dpo sigmoid", "orpo", "kto"])
def test_kernels_off_is_the_same(tiny_base: Path, kind: str) -> None:
    seen = []
    for kernels in (True, False):
        policy = replace(tiny.adapt(tiny.load(tiny_base)), kernels=kernels)
        (event,) = loop.run(policy, rows.make(kind), rows.drawn(kind), tiny.course([range(7)]), tiny.Recorder(policy))
        seen.append((event.loss, event.grad_norm))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_a_certain_answer_leaves_orpo_finite() -> None:
    objective = rows.make("orpo")
    assert isinstance(objective, Pairs)
    found = torch.tensor([[0.0, -3.0], [-1e-12, -1e-12], [-90.0, 0.0]], dtype=torch.float64, requires_grad=True)
    losses, _ = objective.each(found, None, torch.ones(3, 2, dtype=torch.float64))
    (slope,) = torch.autograd.grad(losses.sum(), found)
    assert losses.isfinite().all()
    assert slope.isfinite().all()


def test_supervised_training_is_untouched() -> None:
    (batch,) = sft.batches(tiny.samples([5, 9]), 10_000)
    assert not batch.by_row
    assert batch.count == batch.supervised
