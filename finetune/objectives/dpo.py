"""Direct preference optimisation: the chosen text is to gain on the rejected one, seen from a reference policy.

Sources: R. Rafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*, 2023
(equation 7); M. Azar et al., *A General Theoretical Paradigm to Understand Learning from Human Preferences*, 2023
(IPO, equation 17; its authors take means over tokens); Y. Zhao et al., *SLiC-HF*, 2023 (hinge); E. Mitchell, *A note
on DPO with noisy preferences*, 2023 (label smoothing); S. Ray Chowdhury et al., *Provably Robust DPO*, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from finetune.objectives import Pairs


@dataclass(frozen=True, kw_only=True)
class Dpo(Pairs):
    """``loss_kind``: sigmoid, ipo, hinge or robust. ``label_smoothing``: the share of pairs believed to be swapped."""

    loss_kind: str
    beta: float
    label_smoothing: float
    length_normalised: bool
    referred = True

    def each(
        self, found: torch.Tensor, origin: torch.Tensor | None, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert origin is not None
        ratios = found - origin
        scores = ratios / sizes if self.length_normalised else ratios
        margin = scores[:, 0] - scores[:, 1]
        return self._of(margin), self.beta * ratios.detach()

    def _of(self, margin: torch.Tensor) -> torch.Tensor:
        if self.loss_kind == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        logit, swapped = self.beta * margin, self.label_smoothing
        if self.loss_kind == "hinge":
            return torch.relu(1 - logit)
        if self.loss_kind == "robust":
            return (swapped * logsigmoid(-logit) - (1 - swapped) * logsigmoid(logit)) / (1 - 2 * swapped)
        return -(1 - swapped) * logsigmoid(logit) - swapped * logsigmoid(-logit)


def make(loss: str, **settings: Any) -> Dpo:
    return Dpo(loss_kind=loss, **settings)
