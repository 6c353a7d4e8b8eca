"""Gradients: every way to cut a step gives the one gradient, and it is the library's own on padded rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import loop, schedule
from finetune.dataset import Example
from finetune.kernels import decoder_layer
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

LENGTHS = {"alike": [12] * 8, "ragged": [3, 40, 7, 22, 2, 31, 15, 9]}
# tokens of one micro-batch: all eight samples in one, in four twos, one by one, and something uneven
CUTS = {"1×8": 10_000, "8×1": 1, "4×2": 24, "uneven": 50}


def padded(policy: Policy, examples: Sequence[Example], side: str, width: int = 512) -> dict[str, torch.Tensor]:
    """The gradient by the library alone: rows padded to one width, attention mask, labels, mean over labels."""
    ids, mask, labels = (torch.full((len(examples), width), fill) for fill in (0, 0, -100))
    for row, example in enumerate(examples):
        place = slice(0, len(example.ids)) if side == "right" else slice(width - len(example.ids), width)
        ids[row, place] = torch.tensor(example.ids)
        mask[row, place] = 1
        labels[row, place] = torch.where(torch.tensor(example.supervised), torch.tensor(example.ids), -100)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    count = int((labels != -100).sum())
    output = policy.causal_lm(
        ids, attention_mask=mask, position_ids=places, labels=labels, num_items_in_batch=count, use_cache=False
    )
    loss = output.loss
    if output.logits.dtype == torch.float64:  # the library's own loss would drop to fp32
        logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
    loss.backward()
    found = {name: value.grad.clone() for name, value in policy.trainable().items()}
    policy.model.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module")
def policies(tiny_base: Path) -> dict[str, Policy]:
    return {"fp32": tiny.adapt(tiny.load(tiny_base)), "fp64": tiny.adapt(tiny.exact(tiny_base))}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp64", 1e-10)])
def test_every_cut_gives_the_gradient_of_padded_rows(
    policies: dict[str, Policy], lengths: str, precision: str, bound: float
) -> None:
    policy, examples = policies[precision], tiny.samples(LENGTHS[lengths])
    expected = [padded(policy, examples, side) for side in ("right", "left")]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    for limit in CUTS.values():
        plan = tiny.course([order], micro_batch_tokens=limit, max_grad_norm=math.inf)
        (found,) = tiny.gradients(policy, examples, plan)
        for side in expected:
            assert found.keys() == side.keys()
            assert tiny.distance(tiny.flat(found), tiny.flat(side)) < bound


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_short_last_step_is_divided_by_its_own_count(policies: dict[str, Policy], precision: str) -> None:
    policy, examples = policies[precision], tiny.samples(LENGTHS["ragged"])
    steps = schedule.steps(LENGTHS["ragged"], 0, count=None, epochs=1.0, examples=3, tokens=None)
    assert list(map(len, steps)) == [3, 3, 2]
    plan = tiny.course(steps, micro_batch_tokens=45, max_grad_norm=math.inf)
    for step, found in zip(steps, tiny.gradients(policy, examples, plan), strict=True):
        expected = padded(policy, [examples[i] for i in step], "right")
        assert tiny.distance(tiny.flat(found), tiny.flat(expected)) < (1e-5 if precision == "fp32" else 1e-10)


def test_loss_and_counts_of_a_step_do_not_depend_on_the_cut(policies: dict[str, Policy]) -> None:
    policy, examples = policies["fp64"], tiny.samples(LENGTHS["ragged"])
    seen = []
    for limit in CUTS.values():
        plan = tiny.course([range(8)], micro_batch_tokens=limit)
        (event,) = loop.run(policy, sft, examples, plan, tiny.Recorder(policy))
        seen.append(event)
    for event in seen:
        assert event.loss == pytest.approx(seen[0].loss, rel=1e-13)
        assert (event.tokens, event.samples) == (sum(LENGTHS["ragged"]), 8)
        assert event.supervised == sum(sum(example.supervised) for example in examples)
        assert event.grad_norm == pytest.approx(seen[0].grad_norm, rel=1e-12)


def test_gradient_is_clipped_as_a_whole(policies: dict[str, Policy]) -> None:
    policy, examples = policies["fp32"], tiny.samples(LENGTHS["ragged"])
    (free,) = tiny.gradients(policy, examples, tiny.course([range(8)], max_grad_norm=math.inf))
    recorder = tiny.Recorder(policy)
    (event,) = loop.run(policy, sft, examples, tiny.course([range(8)], max_grad_norm=0.01), recorder)
    norm = tiny.flat(free).double().norm()
    assert event.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert tiny.distance(tiny.flat(recorder.gradients[0]), tiny.flat(free) * (0.01 / norm)) < 1e-5


@pytest.mark.parametrize(("form", "dropout"), [("fp32", 0.0), ("nf4", 0.0), ("nf4", 0.3)])
def test_recompute_gives_the_same_gradient(
    tiny_base: Path, form: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, plan = tiny.samples(LENGTHS["ragged"]), tiny.course([range(8)], micro_batch_tokens=50)
    policy = tiny.adapt(tiny.load(tiny_base, form), lora_dropout=dropout)
    (kept,) = tiny.gradients(policy, examples, plan)
    calls = _count_layer_calls(policy, monkeypatch)
    policy.recompute_layers()
    (again,) = tiny.gradients(policy, examples, plan)
    assert tiny.distance(tiny.flat(again), tiny.flat(kept)) < 1e-6
    micro_batches = len(schedule.pack(LENGTHS["ragged"], 50))
    assert len(calls) == 2 * micro_batches  # each layer once forwards and once more for the backward pass


def _count_layer_calls(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the first layer computes, by its fused steps or by transformers' own."""
    calls: list[int] = []
    first = policy.causal_lm.model.layers[0]
    mlp, attended = first.mlp.forward, decoder_layer._attended

    def counted(x: torch.Tensor) -> Any:
        calls.append(1)
        return mlp(x)

    def counted_too(layer: Any, *rest: Any) -> torch.Tensor:
        calls.extend([1] if layer is first else [])
        return attended(layer, *rest)

    monkeypatch.setattr(first.mlp, "forward", counted)
    monkeypatch.setattr(decoder_layer, "_attended", counted_too)
    return calls


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_families(build_tiny: Callable[..., Path], tmp_path: Path, family: str) -> None:
    policy = tiny.adapt(tiny.load(build_tiny(tmp_path / family, family=family, tie_word_embeddings=True)))
    examples = tiny.samples(LENGTHS["ragged"])
    (found,) = tiny.gradients(policy, examples, tiny.course([range(8)], max_grad_norm=math.inf))
    assert tiny.distance(tiny.flat(found), tiny.flat(padded(policy, examples, "right"))) < 1e-5


def test_adapter_on_the_head(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), target_modules=["q_proj", "lm_head"])
    examples = tiny.samples(LENGTHS["ragged"])
    (found,) = tiny.gradients(policy, examples, tiny.course([range(8)], max_grad_norm=math.inf))
    assert any("lm_head" in name for name in found)
    assert tiny.distance(tiny.flat(found), tiny.flat(padded(policy, examples, "right"))) < 1e-5


@pytest.mark.parametrize("form", ["bf16", "nf4", "int8"])
def test_small_rates_move_every_weight(tiny_base: Path, form: str) -> None:
    """Masters in bf16 would round nearly all of these updates away."""
    policy = tiny.adapt(tiny.load(tiny_base, form, "bf16"), wake=False)
    assert {value.dtype for value in policy.trainable().values()} == {torch.float32}
    before, optimizer = tiny.weights(policy), tiny.adamw(policy, 0.0)
    plan = tiny.course([(i % 8, (i + 3) % 8) for i in range(20)], peak_rate=1e-5)
    assert len(list(loop.run(policy, sft, tiny.samples(LENGTHS["ragged"]), plan, optimizer))) == 20
    after = tiny.weights(policy)
    moved = torch.cat([(after[name] != before[name]).reshape(-1) for name in after if "lora_A" in name])
    assert moved.double().mean() >= 0.99
    assert all(entry.dtype == torch.float32 for state in optimizer.state.values() for entry in state.values())


def test_a_weight_scales_its_tokens_and_the_divisor(policies: dict[str, Policy]) -> None:
    """Σ w·loss / Σ w: weight 2 is the sample twice, one weight for all changes nothing, and any cut gives the same."""
    policy = policies["fp64"]
    one, two = tiny.samples([9, 14])

    def weighted(example: Example, weight: float) -> Example:
        return replace(example, weights=tuple(weight * value for value in example.weights))

    doubled = tiny.gradient_of(policy, [weighted(one, 2.0), two])
    assert tiny.distance(tiny.flat(doubled), tiny.flat(tiny.gradient_of(policy, [one, one, two]))) < 1e-10
    plain = tiny.gradient_of(policy, [one, two])
    evenly = tiny.gradient_of(policy, [weighted(one, 0.25), weighted(two, 0.25)])
    assert tiny.distance(tiny.flat(evenly), tiny.flat(plain)) < 1e-10
    assert tiny.distance(tiny.flat(doubled), tiny.flat(plain)) > 1e-3
    samples = [weighted(one, 0.5), two]
    (apart,) = tiny.gradients(policy, samples, tiny.course([[0, 1]], micro_batch_tokens=1, max_grad_norm=math.inf))
    assert tiny.distance(tiny.flat(apart), tiny.flat(tiny.gradient_of(policy, samples))) < 1e-10
