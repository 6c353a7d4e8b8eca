"""Simple preference optimisation: the mean log-probability per token is the reward, and the chosen needs a margin.

Y. Meng, M. Xia and D. Chen, *SimPO: Simple Preference Optimization with a Reference-Free Reward*, 2024, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune.objectives import Pairs


@dataclass(frozen=True, kw_only=True)
class Simpo(Pairs):
    """``beta`` scales the reward, ``gamma`` is the margin that is wanted between the two."""

    beta: float
    gamma: float

    def each(
        self, found: torch.Tensor, origin: torch.Tensor | None, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = self.beta * found / sizes
        return -logsigmoid(rewards[:, 0] - rewards[:, 1] - self.gamma), rewards.detach()


def make(**settings: Any) -> Simpo:
    return Simpo(**settings)
