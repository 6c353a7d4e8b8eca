"""Odds ratio preference optimisation: learn the chosen answer, and make its odds better than the rejected one's.

J. Hong, N. Lee and J. Thorne, *ORPO: Monolithic Preference Optimization without Reference Model*, 2024, equations 6 and
7. The likelihood of a text is the mean over its tokens there; prompts are not in the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune.objectives import Pairs

_CERTAIN = -1e-8
"""The log-probability per token beyond which a text counts as certain: its odds would be infinite."""


@dataclass(frozen=True, kw_only=True)
class Orpo(Pairs):
    """``beta``: the weight of the odds ratio, the paper's lambda."""

    beta: float

    def each(
        self, found: torch.Tensor, origin: torch.Tensor | None, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means = found / sizes
        odds = means - _log_of_rest(means)
        losses = -means[:, 0] - self.beta * logsigmoid(odds[:, 0] - odds[:, 1])
        return losses, self.beta * means.detach()


def _log_of_rest(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - p) from log p, exact at both ends (M. Mächler, *Accurately Computing log(1 - exp(-|a|))*, 2012)."""
    log_p = log_p.clamp(max=_CERTAIN)
    near = torch.log(-torch.expm1(log_p))
    far = torch.log1p(-torch.exp(log_p))
    return torch.where(log_p > -math.log(2), near, far)


def make(**settings: Any) -> Orpo:
    return Orpo(**settings)
