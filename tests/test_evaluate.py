from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune import evaluate
from finetune.dataset import Question
from finetune.evaluate import HeldOut, How, Judged
from finetune.model import Policy
from tests import tiny

LENGTHS = [3, 20, 7, 12]
BOTH = ("loss", "exact_match")


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    examples = tiny.samples(LENGTHS)
    questions = [Question(prompt=example.ids, answer="never this", where=example.where) for example in examples]
    return HeldOut(examples=tuple(examples), questions=tuple(questions))


def judge(policy: Policy, held_out: HeldOut, metrics: Sequence[str] = BOTH, **settings: Any) -> Judged:
    how = How(metrics=metrics, max_new_tokens=6, batch_rows=3, micro_batch_tokens=32)
    settings.setdefault("progress", lambda *_: None)
    return evaluate.judge(policy, held_out, how, **settings)


@pytest.fixture(scope="module", params=["bf16", "nf4", "int8"])
def policy(request: pytest.FixtureRequest, tiny_base: Path) -> Policy:
    return tiny.adapt(tiny.load(tiny_base, request.param, "bf16"), lora_dropout=0.4)


def test_two_evaluations_are_equal_to_the_bit(policy: Policy, held_out: HeldOut) -> None:
    first = judge(policy, held_out)
    assert judge(policy, held_out) == first
    tiny.gradient_of(policy, held_out.examples)
    assert judge(policy, held_out) == first


def test_the_adapter_counts_and_can_be_left_out(policy: Policy, held_out: HeldOut, tiny_base: Path) -> None:
    adapted, bare = judge(policy, held_out), judge(policy, held_out, adapter=False)
    assert adapted.scores["loss"] != bare.scores["loss"]
    assert adapted.answers != bare.answers
    assert judge(policy, held_out) == adapted


def test_without_adapter_is_the_base(tiny_base: Path, held_out: HeldOut) -> None:
    expected = judge(tiny.load(tiny_base, "nf4", "bf16"), held_out)
    policy = tiny.adapt(tiny.load(tiny_base, "nf4", "bf16"))
    assert judge(policy, held_out, adapter=False) == expected
    assert judge(tiny.load(tiny_base, "nf4", "bf16"), held_out, adapter=False) == expected


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(policy: Policy, held_out: HeldOut, adapter: bool, training: bool) -> None:
    policy.model.train(training)
    modes = [module.training for module in policy.model.modules()]
    trainable = sorted(policy.trainable())
    attention = policy.causal_lm.config._attn_implementation
    judge(policy, held_out, adapter=adapter)
    assert [module.training for module in policy.model.modules()] == modes == [training] * len(modes)
    assert sorted(policy.trainable()) == trainable
    assert trainable
    assert policy.causal_lm.config._attn_implementation == attention
    policy.model.train()


def test_a_fault_inside_leaves_the_model_as_it_was(policy: Policy) -> None:
    policy.model.train()
    with pytest.raises(IndexError), policy.evaluating(adapter=False):
        tiny.gradient_of(policy, tiny.samples([3], vocab=10**6))
    assert all(module.training for module in policy.model.modules())
    assert policy.trainable()
    assert any(value.any() for value in tiny.gradient_of(policy, tiny.samples([5, 6])).values())


def test_no_dropout_inside_and_dropout_outside(policy: Policy) -> None:
    from finetune.objectives import sft

    policy.model.train()
    batch = sft.collate(tiny.samples([9]))
    assert len({sft.loss(policy, batch).total.item() for _ in range(3)}) == 3
    with policy.evaluating():
        inside = [sft.loss(policy, batch).total for _ in range(3)]
    assert len({value.item() for value in inside}) == 1
    assert not any(value.requires_grad for value in inside)


@pytest.mark.parametrize(
    ("metrics", "keys", "answered"),
    [
        (("loss",), {"rows", "loss", "perplexity", "supervised_tokens"}, 0),
        (("exact_match",), {"rows", "exact_match", "confidence_interval"}, 4),
        (BOTH, {"rows", "loss", "perplexity", "supervised_tokens", "exact_match", "confidence_interval"}, 4),
    ],
)
def test_only_the_chosen_evaluations_run(
    policy: Policy, held_out: HeldOut, metrics: tuple[str, ...], keys: set[str], answered: int
) -> None:
    told: list[tuple[str, int, int]] = []
    found = judge(policy, held_out, metrics, progress=lambda *what: told.append(what))
    assert set(found.scores) == keys
    assert found.scores["rows"] == 4
    assert len(found.answers) == answered
    assert {name for name, _, _ in told} == {"loss": {"loss"}, "exact_match": {"answers"}}.get(
        metrics[0] if len(metrics) == 1 else "", {"loss", "answers"}
    )
    for name in {name for name, _, _ in told}:
        counts = [done for what, done, of in told if what == name and of == 4]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 4)
