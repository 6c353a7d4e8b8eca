"""A reward model: a score head says of each whole text how good it is, and the chosen text of a pair is to have more.

Sources: R. Bradley and M. Terry, *Rank Analysis of Incomplete Block Designs*, 1952; L. Ouyang et al., *Training
Language Models to Follow Instructions with Human Feedback*, 2022 (equation 1); H. Touvron et al., *Llama 2*, 2023
(equation 2, the margin); J. Eisenstein et al., *Helping or Herding?*, 2023 (section 2, rewards kept around zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

from finetune.objectives import Batch, Pairs

if TYPE_CHECKING:
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class Reward(Pairs):
    """``margin``: by how much the chosen text's reward is to be more. ``centre_rewards_coefficient``: the weight of the
    square of both rewards' sum, which keeps them around zero: differences alone leave that open."""

    margin: float
    centre_rewards_coefficient: float
    scored = True

    def read(self, policy: Policy, batch: Batch) -> torch.Tensor:
        return rewards(policy, batch)

    def each(
        self, found: torch.Tensor, origin: torch.Tensor | None, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = -logsigmoid(found[:, 0] - found[:, 1] - self.margin)
        return losses + self.centre_rewards_coefficient * found.sum(dim=1) ** 2, found.detach()


def rewards(policy: Policy, batch: Batch) -> torch.Tensor:
    """Each text's reward, read at its last token as transformers' classifiers do: [texts], fp64, with a graph."""
    hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
    last = torch.tensor(batch.bounds[1:], device=hidden.device) - 1
    return policy.rate(hidden[last]).double()


def make(**settings: Any) -> Reward:
    return Reward(**settings)
