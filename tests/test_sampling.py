from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from finetune.sampling import GREEDY, Sampling
from tests import tiny


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("temperature", (-0.1, 2.1, math.nan, math.inf)),
        ("top_p", (-0.1, 1.1, math.nan)),
        ("top_k", (-1,)),
        ("seed", (2**63, -(2**63) - 1)),
    ],
)
def test_settings_out_of_range_are_named(setting: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{setting} is {value}: give "):
            Sampling(**{setting: value})


def test_without_temperature_nothing_is_drawn() -> None:
    assert GREEDY.processors([0]) is None
    assert Sampling(temperature=1e-6, top_p=0.5, seed=1).processors([0]) is None


def drawn(sampling: Sampling, logits: list[float], count: int) -> list[int]:
    """The tokens of so many draws, each with a number of its own."""
    import torch

    scores = torch.tensor([logits]).repeat(count, 1)
    processors = sampling.processors(range(count))
    chosen: list[int] = processors(torch.zeros(count, 1, dtype=torch.long), scores).argmax(-1).tolist()
    return chosen


def test_draws_have_the_softmax_distribution() -> None:
    """Chi-squared with 3 degrees of freedom: beyond 21.1 once in 10,000 seeds."""
    logits, count, temperature = [2.0, 1.0, 0.5, -1.0], 20_000, 0.7
    weights = [math.exp(logit / temperature) for logit in logits]
    expected = [count * weight / sum(weights) for weight in weights]
    found = drawn(Sampling(temperature=temperature, seed=5), logits, count)
    observed = [found.count(token) for token in range(4)]
    assert sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) < 21.1


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = [3.0, 2.9, 2.8, 0.0]
    assert set(drawn(Sampling(temperature=2.0, top_k=2, seed=1), logits, 500)) == {0, 1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.5, seed=1), logits, 500)) == {0, 1}
    assert set(drawn(Sampling(temperature=2.0, top_p=0.0, seed=1), logits, 500)) == {0}
    assert set(drawn(Sampling(temperature=2.0, seed=1), logits, 500)) == {0, 1, 2, 3}


def test_an_answer_depends_on_its_seed_and_number_alone(tiny_base: Path) -> None:
    """Not on the prompts beside it, its place among them or the global generator; and that one stays as it was."""
    import torch

    policy = tiny.load(tiny_base)
    prompts = [example.ids for example in tiny.samples([4, 11, 6])]
    sampling = Sampling(temperature=1.0, seed=7)
    with policy.evaluating():
        together = policy.generate(prompts, 8, sampling=sampling)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        turned = policy.generate(prompts[::-1], 8, sampling=sampling, numbers=[2, 1, 0])
        alone = [policy.generate([p], 8, sampling=sampling, numbers=[n])[0] for n, p in enumerate(prompts)]
        assert torch.equal(before, torch.get_rng_state())
        other = policy.generate(prompts, 8, sampling=dataclasses.replace(sampling, seed=8))
        free = [policy.generate(prompts[:1], 8, sampling=Sampling(temperature=1.0)) for _ in range(2)]
    assert together == turned[::-1] == alone
    assert together != other
    assert free[0] != free[1]
