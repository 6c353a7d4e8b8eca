"""Supervised fine-tuning: next-token cross-entropy over the answers only, each turn with its weight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from finetune.kernels import cross_entropy
from finetune.objectives import Batch, Each, Objective, StepLoss, collate, one_by_one, packs

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy

__all__ = ["Batch", "StepLoss", "batches", "begin", "collate", "loss", "make"]


def make() -> Objective:
    """It has no settings: this file is the objective."""
    return cast(Objective, sys.modules[__name__])


def batches(examples: Sequence[Example], limit: int) -> list[Batch]:
    return [collate([examples[i] for i in pack]) for pack in packs(examples, limit)]


def begin(policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
    return batches


def token_losses(policy: Policy, batch: Batch) -> torch.Tensor:
    """Each supervised token's weighted loss, in the order of ``batch.predictors``: fp64 on the CPU, without a graph."""
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
        found = cross_entropy.losses(hidden[batch.predictors], policy.head, batch.targets).double()
        return (found if batch.scales is None else found * batch.scales).cpu()


def row_of(batch: Batch) -> torch.Tensor:
    """Which sample of the batch each of ``batch.predictors`` belongs to."""
    return torch.bucketize(batch.predictors.cpu(), torch.tensor(batch.bounds[1:]), right=True)


def loss(policy: Policy, batch: Batch) -> StepLoss:
    hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
    states = hidden[batch.predictors]
    if policy.kernels:
        total = cross_entropy.summed(states, policy.head, batch.targets, batch.scales)
    else:
        total = cross_entropy.plain(states, policy.head, batch.targets, batch.scales)
    return StepLoss(total=total, count=batch.count)
