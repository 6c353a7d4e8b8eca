"""Is the merged folder the model that was trained? Both answer the same rows, and the answers are compared.

The live model is the adapter on the base as trained; the merged one is loaded from the disk by plain transformers.
Compared are the whole next-token distributions at the supervised positions: mean KL divergence, in nats. Of reward
models it is the rewards of texts, each taken as a normal distribution whose width is the spread of all of them: the KL
is half the square of a difference in units of that spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.kernels.cross_entropy import wide
from finetune.objectives import reward, sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy
    from finetune.objectives import Batch

MEAN_KL = {"replayed": 1e-3, "original": 0.1, "corrected": 0.1}
"""The bounds. Into the published weights of a 4-bit run the model moves by design; then only nonsense is refused."""
UNUSABLE = "config.json.unusable"
POSITIONS = 512
_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparison's figures: KL in nats over ``positions``, and how often the best token agrees. Of reward models:
    over texts, how often one after the other is ranked alike, and by how much a reward differs at most."""

    mean_kl: float
    max_kl: float
    agreement: float
    positions: int
    bound: float
    apart: float | None = None

    @property
    def holds(self) -> bool:
        return abs(self.mean_kl) <= self.bound  # a KL is not negative, save for rounding

    def to_dict(self) -> dict[str, Any]:
        told = {key: value for key, value in asdict(self).items() if value is not None}
        return told | {"holds": self.holds}


def distributions(
    policy: Policy, examples: Sequence[Example], progress: Callable[[int, int], None] = lambda done, of: None
) -> torch.Tensor:
    """Log-probabilities at the first supervised positions of the examples. → [positions, vocabulary], fp32. Of a reward
    model the reward of each text that these positions are in. → [texts, 1]

    ``progress``: batches done, of how many.
    """
    found: list[torch.Tensor] = []
    with policy.evaluating():
        batches = _batches(examples)
        for number, chosen in enumerate(batches, 1):
            batch = sft.collate(chosen).to(policy.device)
            found.append(_asked(policy, batch).cpu())
            progress(number, len(batches))
    return torch.cat(found)[:POSITIONS]


def _asked(policy: Policy, batch: Batch) -> torch.Tensor:
    if policy.scored:
        return reward.rewards(policy, batch)[:, None].float()
    hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
    return wide(policy.head(hidden[batch.predictors])).log_softmax(dim=-1)


def asked(examples: Sequence[Example]) -> list[Example]:
    """The examples whose positions are compared."""
    return [example for batch in _batches(examples) for example in batch]


def _batches(examples: Sequence[Example]) -> list[list[Example]]:
    """As many examples as the positions need, packed: a model that is read layer by layer is read once a batch."""
    batches: list[list[Example]] = []
    tokens = count = 0
    for example in (half for one in examples for half in one.halves()):
        if count >= POSITIONS:
            break
        if not batches or tokens + len(example.ids) > _TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(example)
        tokens += len(example.ids)
        count += sum(example.supervised)
    return batches


def loss(answers: torch.Tensor, examples: Sequence[Example]) -> float:
    """Mean cross-entropy, in nats, at the positions of ``distributions``, whose result ``answers`` is. Of rewards that
    of telling each text from the one after it: of pairs, whose chosen text comes first, the loss of their ranking."""
    if answers.shape[1] == 1:
        gains = answers[:-1:2, 0] - answers[1::2, 0]
        return float(torch.nn.functional.softplus(-gains).mean(dtype=torch.float64))
    targets = torch.cat([sft.collate(chosen).targets for chosen in _batches(examples)])[: len(answers)]
    return float(-answers.gather(1, targets[:, None].cpu()).mean(dtype=torch.float64))


def compare(live: torch.Tensor, merged: torch.Tensor, bound: float) -> Proof:
    """KL(live ‖ merged) per position. Both [positions, vocabulary] log-probabilities, or [texts, 1] rewards; ``bound``:
    of the mean."""
    if live.shape[1] == 1:
        return _rewards_compared(live[:, 0].double(), merged[:, 0].double(), bound)
    divergence = (live.exp() * (live - merged)).sum(dim=-1)
    mean = float(divergence.mean())
    return Proof(
        mean_kl=mean if mean == mean else float("inf"),
        max_kl=float(divergence.max()) if mean == mean else float("inf"),
        agreement=float((live.argmax(-1) == merged.argmax(-1)).float().mean()),
        positions=len(live),
        bound=bound,
    )


def _rewards_compared(live: torch.Tensor, merged: torch.Tensor, bound: float) -> Proof:
    spread = float(live.std()) or 1.0  # all alike: differences count as they are
    apart = (live - merged).abs()
    divergence = (apart / spread) ** 2 / 2
    mean, most = (float(one) if one == one else float("inf") for one in (divergence.mean(), divergence.max()))
    alike = (live[:-1] > live[1:]) == (merged[:-1] > merged[1:])
    return Proof(
        mean_kl=mean, max_kl=most, agreement=float(alike.double().mean()), positions=len(live), bound=bound,
        apart=float(apart.max()),
    )  # fmt: skip


def mark_unusable(folder: Path) -> None:
    """Take the name from the config, so that nothing loads the folder by accident."""
    (folder / "config.json").rename(folder / UNUSABLE)
