"""Kahneman-Tversky optimisation: wanted answers are to gain, unwanted ones to lose, measured from a zero point.

K. Ethayarajh et al., *KTO: Model Alignment as Prospect Theoretic Optimization*, 2024, equations 7 and 8. The zero point
is an estimate of the KL divergence from the reference: each answer of a step under the prompt of the row after it, the
mean over the step, never below zero. It belongs to the whole step, so that it is made before the first gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.objectives import (
    Batch,
    Each,
    StepLoss,
    Tallies,
    collate,
    log_probs,
    one_by_one,
    packs,
    reference_log_probs,
)

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class Kto:
    """``longest``: tokens of a sample; what an answer has beyond them under another prompt is cut."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    longest: int
    paired = False
    scored = False

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        others = self._mismatched(examples)
        return [
            replace(
                collate([examples[i] for i in pack]), by_row=True,
                wanted=torch.tensor([bool(examples[i].label) for i in pack]),
                beside=collate([others[i] for i in pack]),
            )
            for pack in packs(examples, limit)
        ]  # fmt: skip

    def begin(self, policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
        def divergence(batch: Batch) -> float:
            assert batch.beside is not None
            beside = batch.beside.to(policy.device)
            with policy.evaluating():
                ahead = log_probs(policy, beside)
            return float((ahead - reference_log_probs(policy, beside)).sum())

        zero = max(0.0, sum(each(batches, divergence)) / sum(len(batch.rows) for batch in batches))
        return [replace(batch, zero=zero, beside=None) for batch in batches]

    def read(self, policy: Policy, batch: Batch) -> torch.Tensor:
        return log_probs(policy, batch)

    def loss(self, policy: Policy, batch: Batch) -> StepLoss:
        assert batch.wanted is not None
        origin = reference_log_probs(policy, batch)
        found = log_probs(policy, batch)
        losses, rewards = self.each(found - origin, batch.wanted, batch.zero)
        return StepLoss(total=losses.sum(), count=batch.count, tallies=_told(found, rewards, batch.wanted, batch.zero))

    def each(
        self, ratios: torch.Tensor, wanted: torch.Tensor, zero: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, reward) of each row, from how far the policy's log-probability is above the reference's: [rows]."""
        sign = wanted.double() * 2 - 1
        weight = torch.where(wanted, self.desirable_weight, self.undesirable_weight)
        return weight * (1 - torch.sigmoid(self.beta * sign * (ratios - zero))), self.beta * ratios.detach()

    def texts(self, examples: Sequence[Example]) -> list[Example]:
        return [one for both in zip(examples, self._mismatched(examples), strict=True) for one in both]

    def judge(
        self, examples: Sequence[Example], found: torch.Tensor, origin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if origin is None:
            return None
        ratios = found - origin
        wanted = torch.tensor([bool(example.label) for example in examples])
        return self.each(ratios[:, 0], wanted, ratios[:, 1].mean().clamp(min=0))

    def _mismatched(self, examples: Sequence[Example]) -> list[Example]:
        """Each row's prompt with the answer of the row before it; the first one's with that of the last."""
        found = []
        for index, example in enumerate(examples):
            other = examples[index - 1]
            cut, start = _answer(example), _answer(other)
            ids, weights = example.ids[:cut] + other.ids[start:], example.weights[:cut] + other.weights[start:]
            found.append(replace(example, ids=ids[: self.longest], weights=weights[: self.longest]))
        return found


def _answer(example: Example) -> int:
    """Where the answer begins."""
    return next(place for place, weight in enumerate(example.weights) if weight > 0)


def _told(found: torch.Tensor, rewards: torch.Tensor, wanted: torch.Tensor, zero: float) -> Tallies:
    tallies: Tallies = {"kl": (zero * len(rewards), len(rewards))}
    for name, chosen in (("chosen", wanted), ("rejected", ~wanted)):
        tallies[f"rewards/{name}"] = float(rewards[chosen].sum()), int(chosen.sum())
        tallies[f"logps/{name}"] = float(found.detach()[chosen].sum()), int(chosen.sum())
    return tallies


def make(**settings: Any) -> Kto:
    return Kto(**settings)
