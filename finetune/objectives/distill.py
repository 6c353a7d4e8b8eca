"""Distillation: the model is to have the teacher's distribution of every answer's tokens, not only its own row's token.

The teacher is the policy's companion: either another model, whose hidden states are made in the step, or what one said
once of these very rows (``finetune teach``). Formulas and sources are in ``kernels/divergence.py``; R. Agarwal et al.,
2024, call this supervised distillation: the answers are the rows', none are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.kernels import divergence
from finetune.kernels.divergence import Aim, Top
from finetune.objectives import Batch, Each, StepLoss, one_by_one, sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The loss is the weighted mean over the step's supervised tokens, as that of ``sft``."""

    aim: Aim

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        return sft.batches(examples, limit)

    def begin(self, policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
        return batches

    def loss(self, policy: Policy, batch: Batch) -> StepLoss:
        told = policy.teacher.tell(batch)
        hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
        of = divergence.losses if policy.kernels else divergence.plain
        found = of(hidden[batch.predictors], policy.head, batch.targets, told, self.aim)
        sums = [(one if batch.scales is None else one * batch.scales).sum(dtype=torch.float64) for one in found]
        count = batch.count
        said = dict(zip(("cross_entropy", "divergence"), torch.stack(sums[1:]).tolist(), strict=True))
        return StepLoss(
            total=sums[0].to(found.mixed.dtype), count=count,
            tallies={name: (value, count) for name, value in said.items()},
        )  # fmt: skip


def kl(policy: Policy, batch: Batch, told: Top, temperature: float) -> torch.Tensor:
    """KL from the teacher to the model at each supervised token, in the order of ``batch.predictors``: fp64 on the CPU,
    without a graph."""
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
        return divergence.kl(hidden[batch.predictors], policy.head, told.to(hidden.device), temperature).cpu()


def make(divergence: str, beta: float | None, temperature: float, alpha: float, **_: Any) -> Distill:
    """Who teaches, and in which form, is known to the policy."""
    return Distill(aim=Aim(divergence=divergence, beta=beta, temperature=temperature, alpha=alpha))
