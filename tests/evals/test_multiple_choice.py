"""The likeliest option, against likelihoods that transformers itself gives."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.dataset import Example, Question
from finetune.evals import multiple_choice
from finetune.model import Policy
from tests import tiny


def plain(policy: Policy, option: Example) -> float:
    """Summed log-probability of the supervised tokens."""
    logits = policy.causal_lm(torch.tensor([option.ids])).logits[0].log_softmax(dim=-1)
    return sum(float(logits[at - 1, token]) for at, token in enumerate(option.ids) if option.weights[at] > 0)


def test_the_likeliest_option_is_chosen(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    samples = tiny.samples([5, 9, 6, 12, 7, 5, 30, 4, 8])
    groups = [samples[0:2], samples[2:5], samples[5:9]]
    with policy.evaluating():
        likely = [[plain(policy, option) for option in group] for group in groups]
        best = [values.index(max(values)) for values in likely]
        rights = [best[0], (best[1] + 1) % 3, best[2]]
        asked = [
            Question(prompt=(1,), answer="", where=f"r:{n}", options=tuple(group), right=right)
            for n, (group, right) in enumerate(zip(groups, rights, strict=True))
        ]
        steps: list[int] = []
        verdicts, scores = multiple_choice.judge(policy, asked, 24, steps.append)
    assert verdicts == [1, 0, 1]
    assert scores["multiple_choice"] == 2 / 3
    assert sum(steps) == 9
