from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.dataset import Example
from finetune.evals import loss
from finetune.model import Policy
from tests import tiny

LENGTHS = [3, 40, 7, 22, 2, 31, 15, 9]


def plain(policy: Policy, examples: list[Example]) -> tuple[float, int]:
    """Mean over all supervised tokens by the library's own loss, row by row."""
    total, count = 0.0, 0
    for example in examples:
        labels = torch.where(torch.tensor(example.supervised), torch.tensor(example.ids), -100)[None]
        value = policy.causal_lm(torch.tensor([example.ids]), labels=labels).loss
        supervised = sum(example.supervised)
        total += value.item() * supervised
        count += supervised
    return total / count, count


def measured(
    policy: Policy, examples: list[Example], limit: int, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    return loss.score(examples, loss.by_token(policy, examples, limit, progress))


@pytest.mark.parametrize("limit", [1, 50, 10_000])
@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_equals_the_plain_loss_however_it_is_packed(tiny_base: Path, form: str, limit: int) -> None:
    policy, examples = tiny.adapt(tiny.load(tiny_base, form)), tiny.samples(LENGTHS)
    steps: list[int] = []
    with policy.evaluating():
        found = measured(policy, examples, limit, steps.append)
        mean, count = plain(policy, examples)
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["supervised_tokens"] == count
    assert sum(steps) == len(LENGTHS)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("limit", [1, 50, 10_000])
def test_each_row_has_the_loss_that_it_has_alone(tiny_base: Path, limit: int, kernels: bool) -> None:
    policy = replace(tiny.load(tiny_base), kernels=kernels)
    examples = tiny.samples(LENGTHS)
    examples[3] = replace(examples[3], weights=tuple(weight / 2 for weight in examples[3].weights))
    with policy.evaluating():
        found = loss.losses(policy, examples, limit, lambda _: None)
        alone = [plain(policy, [example]) for example in examples]
    expected = [mean * count for mean, count in alone]
    expected[3] /= 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_token_counts_as_much_as_any_other(tiny_base: Path) -> None:
    """The mean is over tokens, not over rows or batches."""
    policy = tiny.load(tiny_base)
    long, short = tiny.samples([60, 4])
    with policy.evaluating():
        parts = [measured(policy, [example], 1) for example in (long, short)]
        whole = measured(policy, [long, short], 1)
    weighted = sum(part["loss"] * part["supervised_tokens"] for part in parts)
    assert whole["loss"] == pytest.approx(weighted / whole["supervised_tokens"], rel=1e-7)
    assert whole["loss"] != pytest.approx(sum(part["loss"] for part in parts) / 2, rel=1e-3)


def test_perplexity_of_a_hopeless_model_is_still_a_number(tiny_base: Path) -> None:
    policy = tiny.load(tiny_base)
    policy.head.weight.data *= 10_000
    with policy.evaluating():
        found = measured(policy, tiny.samples([9]), 64)
    assert found["loss"] > 710
    assert math.isfinite(found["perplexity"])
