"""Supervised fine-tuning: next-token cross-entropy over the answers only.

Returns a sum and a count; the loop divides once by the count of the whole step, so that any split of a step into
micro-batches gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.kernels import cross_entropy

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed samples. ids, positions: [1, tokens]; bounds: samples' starts and the end.

    ``predictors`` are the positions whose hidden state predicts a supervised token, ``targets`` those tokens: [n].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    rows: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def count(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        move = {name: getattr(self, name).to(device) for name in ("ids", "positions", "predictors", "targets")}
        return Batch(bounds=self.bounds, rows=self.rows, **move)


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Summed loss over ``count`` supervised tokens; the sum carries the graph."""

    total: torch.Tensor
    count: int


def collate(examples: Sequence[Example]) -> Batch:
    """Lay samples one after the other; positions restart, and no sample's first token is ever a target."""
    bounds, predictors, targets = [0], [], []
    for example in examples:
        answer = torch.tensor(example.supervised).nonzero().squeeze(1)
        predictors.append(answer - 1 + bounds[-1])
        targets.append(torch.tensor(example.ids)[answer])
        bounds.append(bounds[-1] + len(example.ids))
    return Batch(
        ids=torch.tensor([token for example in examples for token in example.ids])[None],
        positions=torch.cat([torch.arange(len(example.ids)) for example in examples])[None],
        bounds=tuple(bounds),
        predictors=torch.cat(predictors),
        targets=torch.cat(targets),
        rows=tuple(example.where for example in examples),
    )


def loss(policy: Policy, batch: Batch) -> StepLoss:
    hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
    total = cross_entropy.summed(hidden[batch.predictors], policy.head, batch.targets)
    return StepLoss(total=total, count=batch.count)
