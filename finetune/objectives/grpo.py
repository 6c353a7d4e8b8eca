"""Group relative policy optimisation: the model answers each prompt several times, and what earned more is to gain.

Sources: Z. Shao et al., *DeepSeekMath*, 2024 (equations 3 and 4; the KL estimate is J. Schulman's k3, *Approximating KL
Divergence*, 2020); Q. Yu et al., *DAPO*, 2025 (the mean over the step's tokens, the higher clip, answers cut off left
out); Z. Liu et al., *Understanding R1-Zero-Like Training*, 2025 (Dr. GRPO: a constant instead of an answer's length);
DeepSeek-AI, *DeepSeek-V3.2*, 2025 (the KL estimate weighted by the ratio, whose gradient is then unbiased).
The names are those of TRL's GRPOTrainer, and so are the values.

A step's answers are sampled before its first gradient, in ``begin``: from the weights that the step finds, with noise
that belongs to the step's number. So a step that is taken once more, after a kill, is the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from finetune.kernels import log_probabilities
from finetune.objectives import Batch, Each, StepLoss, Tallies, collate, one_by_one, packs

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy

_LEAST_DEVIATION = 1e-4
"""Added to the standard deviation that advantages are divided by, as in TRL."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer. ``example``: prompt and answer, which alone is supervised. ``ended``: by a stop token; else
    it was cut off. ``rewards``: what it earned, by the reward's name, weights applied."""

    example: Example
    ended: bool
    rewards: Mapping[str, float]

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())

    @property
    def tokens(self) -> int:
        return sum(self.example.supervised)


class Sampler(Protocol):
    """Who answers and judges."""

    completions: int
    max_new_tokens: int
    temperature: float

    def __call__(self, policy: Policy, examples: Sequence[Example], seed: int) -> list[Completion]:
        """``completions`` to each example's prompt, those of one prompt side by side."""


@dataclass(frozen=True, kw_only=True)
class Asked(Batch):
    """A step's prompts, before they are answered. ``limit``: tokens of a micro-batch."""

    examples: tuple[Example, ...]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Answered(Batch):
    """Completions with their advantages. ``counts``: 0 where a completion is left out of the loss: [samples].

    ``old``, ``origin``: the tokens' log-probabilities by the policy that sampled them and by the reference: [n], where
    they are needed. ``divisor``: what the step's sum is divided by, in its first batch; ``told``: figures of the step.
    """

    advantages: torch.Tensor
    counts: torch.Tensor
    old: torch.Tensor | None = None
    origin: torch.Tensor | None = None
    divisor: float = 0.0
    told: Tallies = field(default_factory=dict)

    @property
    def count(self) -> float:
        return self.divisor

    def to(self, device: torch.device) -> Answered:
        found = super().to(device)
        assert isinstance(found, Answered)
        return replace(
            found, advantages=self.advantages.to(device), counts=self.counts.to(device),
            old=None if self.old is None else self.old.to(device),
            origin=None if self.origin is None else self.origin.to(device),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """``loss_kind``: grpo, dr_grpo or dapo. ``corrected``: the KL divergence is weighted by the ratio, which makes its
    gradient that of the reverse KL. ``updates``: how many are made from one step's completions."""

    sample: Sampler
    loss_kind: str
    beta: float
    epsilon: float
    epsilon_high: float
    scale_rewards: str
    mask_truncated: bool
    corrected: bool
    updates: int = 1

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        shown = collate(examples)
        return [
            Asked(
                ids=shown.ids, positions=shown.positions, bounds=shown.bounds, predictors=shown.predictors,
                targets=shown.targets, scales=shown.scales, spans=shown.spans, rows=shown.rows,
                examples=tuple(examples), limit=limit,
            )
        ]  # fmt: skip

    def begin(self, policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
        (asked,) = batches
        assert isinstance(asked, Asked)
        seed = int(torch.randint(2**62, ()))  # the loop has seeded torch for this step
        found = self.sample(policy, asked.examples, seed)
        return [*self.judged(policy, found, asked.limit)]

    def judged(self, policy: Policy, found: Sequence[Completion], limit: int) -> list[Answered]:
        """The micro-batches of a step whose completions are known. Without a graph.

        A completion that neither has an advantage nor is held to the reference moves nothing: it counts in the
        divisor and does not go through the model. One always does, so that the step has a gradient.
        """
        advantages = self.advantages([one.reward for one in found])
        counts = [float(one.ended or not self.mask_truncated) for one in found]
        live = [i for i, one in enumerate(counts) if one and (self.beta or advantages[i])] or [0]
        packed = packs([found[i].example for i in live], limit)
        made = []
        for number, pack in enumerate([live[at] for at in pack] for pack in packed):
            chosen = collate([found[i].example for i in pack])
            answered = Answered(
                ids=chosen.ids, positions=chosen.positions, bounds=chosen.bounds, predictors=chosen.predictors,
                targets=chosen.targets, scales=chosen.scales, spans=chosen.spans, rows=chosen.rows,
                advantages=advantages[pack], counts=torch.tensor([counts[i] for i in pack], dtype=torch.float64),
                divisor=0.0 if number else self._divisor(found, counts), told={} if number else self._told(found),
            )  # fmt: skip
            made.append(self._looked_at(policy, answered))
        return made

    def advantages(self, rewards: Sequence[float]) -> torch.Tensor:
        """How far each reward is above the mean of its group, in standard deviations: [completions], fp64."""
        groups = torch.tensor(rewards, dtype=torch.float64).view(-1, self.sample.completions)
        above = groups - groups.mean(dim=1, keepdim=True)
        above[_alike(groups)] = 0.0  # a mean of equal numbers may round to another one
        if self.scale_rewards == "group":
            above = above / (groups.std(dim=1, keepdim=True) + _LEAST_DEVIATION)
        elif self.scale_rewards == "batch":
            above = above / (groups.std() + _LEAST_DEVIATION)
        return above.flatten()

    def loss(self, policy: Policy, batch: Batch) -> StepLoss:
        assert isinstance(batch, Answered)
        found = self.log_probs(policy, batch)
        spans = torch.tensor(batch.spans, device=found.device)
        advantages, counts = (one.repeat_interleave(spans) for one in (batch.advantages, batch.counts))
        ratio = torch.exp(found - (found.detach() if batch.old is None else batch.old))
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        each = -torch.minimum(ratio * advantages, clipped * advantages)
        past = ((ratio < 1 - self.epsilon) & (advantages < 0)) | ((ratio > 1 + self.epsilon_high) & (advantages > 0))
        tokens = float(counts.sum())
        told: Tallies = {"clip_ratio/region_mean": (float((past * counts).sum()), tokens)}
        if batch.origin is not None:
            below = batch.origin - found
            divergence = torch.exp(below) - below - 1
            if self.corrected:
                divergence = divergence * ratio
            each = each + self.beta * divergence
            told["kl"] = float((divergence.detach() * counts).sum()), tokens
        parts = torch.split(each * counts, list(batch.spans))
        sums = [part.mean() if self.loss_kind == "grpo" else part.sum() for part in parts]
        return StepLoss(total=torch.stack(sums).sum(), count=batch.count, tallies=batch.told | told)

    def log_probs(self, policy: Policy, batch: Batch) -> torch.Tensor:
        """Each sampled token's log-probability at the temperature that it was drawn with: [n], fp64, with a graph."""
        hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0][batch.predictors]
        # Logits are linear in the hidden states: dividing these divides those, and no kernel need know of it.
        drawn = hidden if self.sample.temperature == 1 else hidden / self.sample.temperature
        return log_probabilities.by_token(drawn, policy.head, batch.targets, fused=policy.kernels)

    def _looked_at(self, policy: Policy, batch: Answered) -> Answered:
        """With what later updates and the KL divergence are measured from."""
        here = batch.to(policy.device)
        if self.updates > 1:
            with policy.evaluating():
                batch = replace(batch, old=self.log_probs(policy, here).cpu())
        if self.beta:
            with policy.evaluating(adapter=False):
                batch = replace(batch, origin=self.log_probs(policy, here).cpu())
        return batch

    def _divisor(self, found: Sequence[Completion], counts: Sequence[float]) -> float:
        """What the step's sum is divided by; completions that are left out of the loss count as completions."""
        if self.loss_kind == "dapo":
            return max(1.0, sum(one.tokens * count for one, count in zip(found, counts, strict=True)))
        return float(len(found) * (self.sample.max_new_tokens if self.loss_kind == "dr_grpo" else 1))

    def _told(self, found: Sequence[Completion]) -> Tallies:
        """The figures of a step's completions, under TRL's names."""
        rows = len(found)
        earned = torch.tensor([one.reward for one in found], dtype=torch.float64)
        groups = earned.view(-1, self.sample.completions)
        told: Tallies = {
            "reward": (float(earned.sum()), rows),
            "reward_std": (float(groups.std(dim=1).sum()), len(groups)),
            "frac_reward_zero_std": (float(_alike(groups).sum()), len(groups)),
            "completions/mean_length": (float(sum(one.tokens for one in found)), rows),
            "completions/clipped_ratio": (float(sum(not one.ended for one in found)), rows),
        }
        for name in found[0].rewards:
            told[f"rewards/{name}/mean"] = sum(one.rewards[name] for one in found), rows
        return told


def _alike(groups: torch.Tensor) -> torch.Tensor:
    """Which groups have one reward for all: [groups]."""
    return (groups == groups[:, :1]).all(dim=1)


def make(
    sample: Sampler, loss: str, beta: float, epsilon: float, epsilon_high: float | None, scale_rewards: str,
    iterations: int, mask_truncated_completions: bool, use_bias_correction_kl: bool,
) -> Grpo:  # fmt: skip
    return Grpo(
        sample=sample, loss_kind=loss, beta=beta, epsilon=epsilon, scale_rewards=scale_rewards, updates=iterations,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high, mask_truncated=mask_truncated_completions,
        corrected=use_bias_correction_kl,
    )  # fmt: skip
