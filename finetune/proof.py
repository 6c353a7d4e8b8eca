"""Is the merged folder the model that was trained? Both answer the same rows, and the answers are compared.

The live model is the adapter on the base as trained; the merged one is loaded from the disk by plain transformers.
Compared are the whole next-token distributions at the supervised positions: mean KL divergence, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.kernels.cross_entropy import wide
from finetune.objectives import sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy

MEAN_KL = {"replayed": 1e-3, "original": 0.1, "corrected": 0.1}
"""The bounds. Into the published weights of a 4-bit run the model moves by design; then only nonsense is refused."""
UNUSABLE = "config.json.unusable"
POSITIONS = 512
_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparison's figures: KL in nats over ``positions``, and how often the best token agrees."""

    mean_kl: float
    max_kl: float
    agreement: float
    positions: int
    bound: float

    @property
    def holds(self) -> bool:
        return abs(self.mean_kl) <= self.bound  # a KL is not negative, save for rounding

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def distributions(
    policy: Policy, examples: Sequence[Example], progress: Callable[[int, int], None] = lambda done, of: None
) -> torch.Tensor:
    """Log-probabilities at the first supervised positions of the examples. → [positions, vocabulary], fp32.

    ``progress``: batches done, of how many.
    """
    found: list[torch.Tensor] = []
    with policy.evaluating():
        batches = _batches(examples)
        for number, chosen in enumerate(batches, 1):
            batch = sft.collate(chosen).to(policy.device)
            hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
            logits = wide(policy.head(hidden[batch.predictors]))
            found.append(logits.log_softmax(dim=-1).cpu())
            progress(number, len(batches))
    return torch.cat(found)[:POSITIONS]


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
    """Mean cross-entropy, in nats, at the positions of ``distributions``, whose result ``answers`` is."""
    targets = torch.cat([sft.collate(chosen).targets for chosen in _batches(examples)])[: len(answers)]
    return float(-answers.gather(1, targets[:, None].cpu()).mean(dtype=torch.float64))


def compare(live: torch.Tensor, merged: torch.Tensor, bound: float) -> Proof:
    """KL(live ‖ merged) per position. Both [positions, vocabulary] log-probabilities; ``bound``: of the mean."""
    divergence = (live.exp() * (live - merged)).sum(dim=-1)
    mean = float(divergence.mean())
    return Proof(
        mean_kl=mean if mean == mean else float("inf"),
        max_kl=float(divergence.max()) if mean == mean else float("inf"),
        agreement=float((live.argmax(-1) == merged.argmax(-1)).float().mean()),
        positions=len(live),
        bound=bound,
    )


def mark_unusable(folder: Path) -> None:
    """Take the name from the config, so that nothing loads the folder by accident."""
    (folder / "config.json").rename(folder / UNUSABLE)
