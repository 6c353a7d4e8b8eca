"""Log-probabilities of whole answers: what preference objectives compare. Head and softmax in chunks, with gradient.

A sample's log-probability is the sum over its supervised tokens; a pair's margin is a small difference of such sums, so
that they are added in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from finetune.kernels import cross_entropy


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, spans: Sequence[int],
    scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """By the definition, all logits at once. hidden: [n, hidden]; targets, scales: [n]; spans: its parts → [samples]"""
    found = cross_entropy.wide(linear(hidden, weight)).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    return _sums(found, spans, scales)


def plain(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, spans: Sequence[int],
    scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``by_sample`` with all logits at once and torch's own gradient."""
    losses = torch.nn.functional.cross_entropy(cross_entropy.wide(head(hidden)), targets, reduction="none")
    return _sums(-losses, spans, scales)


def by_sample(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, spans: Sequence[int],
    scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Each sample's log-probability, in fp64.

    hidden: [n, hidden], targets, scales: [n] (None: 1); ``spans``: how many of the n are each sample's, in order.
    """
    return _sums(-cross_entropy.losses(hidden, head, targets), spans, scales)


def by_token(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, *, fused: bool = True) -> torch.Tensor:
    """Each token's log-probability, in fp64. hidden: [n, hidden], targets: [n] → [n]; not ``fused``: as ``plain``."""
    if fused:
        return -cross_entropy.losses(hidden, head, targets).double()
    return -torch.nn.functional.cross_entropy(cross_entropy.wide(head(hidden)), targets, reduction="none").double()


def _sums(found: torch.Tensor, spans: Sequence[int], scales: torch.Tensor | None) -> torch.Tensor:
    """Added sample by sample: an indexed addition has no fixed order on a card, and so no fixed bits."""
    wide = found.double() if scales is None else found.double() * scales
    return torch.stack([part.sum() for part in torch.split(wide, list(spans))])
