"""Supervised fine-tuning: next-token cross-entropy over the answers only, each turn with its weight.

Returns a sum and a count; the loop divides once by the count of the whole step, so that any split of a step into
micro-batches gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from finetune.kernels import cross_entropy

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed samples. ids, positions: [1, tokens]; bounds: samples' starts and the end.

    ``predictors`` are the positions whose hidden state predicts a supervised token, ``targets`` those tokens,
    ``scales`` their weights in the loss: [n]. Without scales every weight is 1.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    scales: torch.Tensor | None
    rows: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def supervised(self) -> int:
        return len(self.targets)

    @property
    def count(self) -> float:
        """What the summed loss is divided by: the sum of the weights, which is the number of tokens where all are 1."""
        return len(self.targets) if self.scales is None else float(self.scales.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Batch:
        return replace(
            self, ids=self.ids.to(device), positions=self.positions.to(device), predictors=self.predictors.to(device),
            targets=self.targets.to(device), scales=None if self.scales is None else self.scales.to(device),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Weighted loss, summed; ``count`` is the sum of the weights. The sum carries the graph."""

    total: torch.Tensor
    count: float


def collate(examples: Sequence[Example]) -> Batch:
    """Lay samples one after the other; positions restart, and no sample's first token is ever a target."""
    bounds, predictors, targets, scales = [0], [], [], []
    for example in examples:
        weights = torch.tensor(example.weights)
        answer = weights.nonzero().squeeze(1)
        predictors.append(answer - 1 + bounds[-1])
        targets.append(torch.tensor(example.ids)[answer])
        scales.append(weights[answer])
        bounds.append(bounds[-1] + len(example.ids))
    weighted = torch.cat(scales)
    return Batch(
        ids=torch.tensor([token for example in examples for token in example.ids])[None],
        positions=torch.cat([torch.arange(len(example.ids)) for example in examples])[None],
        bounds=tuple(bounds),
        predictors=torch.cat(predictors),
        targets=torch.cat(targets),
        scales=None if bool((weighted == 1).all()) else weighted,
        rows=tuple(example.where for example in examples),
    )


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
