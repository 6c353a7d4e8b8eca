"""Mean cross-entropy, in nats per supervised token, over held-out rows; perplexity is its exponential."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from finetune import schedule
from finetune.objectives import sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


def losses(
    policy: Policy, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[int], None]
) -> list[float]:
    """Each sample's loss, summed over its weighted tokens. Call inside ``policy.evaluating()``."""
    return [math.fsum(one) for one in by_token(policy, examples, micro_batch_tokens, progress)]


def by_token(
    policy: Policy, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[int], None]
) -> list[list[float]]:
    """Of each sample the weighted losses of its supervised tokens, in their order.

    Packed like training, so that memory stays within the plan. Call inside ``policy.evaluating()``.
    """
    found: list[list[float]] = [[] for _ in examples]
    for pack in schedule.pack([len(example.ids) for example in examples], micro_batch_tokens):
        batch = sft.collate([examples[i] for i in pack]).to(policy.device)
        values = sft.token_losses(policy, batch).tolist()
        for place, value in zip(sft.row_of(batch).tolist(), values, strict=True):
            found[pack[place]].append(value)
        progress(len(pack))
    return found


def score(
    examples: Sequence[Example], found: Sequence[Sequence[float]], roles: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """The mean over all tokens; of several sources each one's too, and of several ``roles`` (each token's of each
    sample) each one's."""
    weights = _weights(examples)
    mean = _mean(zip(weights, found, strict=True))
    sources: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        sources.setdefault(example.where.partition("#")[0].rpartition(":")[0], []).append(index)
    scores: dict[str, Any] = {
        "loss": mean, "perplexity": math.exp(min(mean, 700.0)),
        "supervised_tokens": sum(sum(example.supervised) for example in examples),
    }  # fmt: skip
    if len(sources) > 1:
        scores["loss_by_source"] = {
            name: _mean((weights[index], found[index]) for index in own) for name, own in sources.items()
        }
    said: dict[str, list[tuple[float, float]]] = {}
    for whose, scales, values in zip(roles, weights, found, strict=False):
        for role, scale, value in zip(whose, scales, values, strict=True):
            said.setdefault(role, []).append((scale, value))
    if len(said) > 1:
        scores["loss_by_role"] = {
            role: math.fsum(value for _, value in own) / math.fsum(scale for scale, _ in own)
            for role, own in said.items()
        }
    return scores


def _weights(examples: Sequence[Example]) -> list[list[float]]:
    return [[weight for weight in example.weights if weight > 0] for example in examples]


def _mean(parts: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Of the parts' (weights, losses)."""
    parts = list(parts)
    return math.fsum(math.fsum(losses) for _, losses in parts) / math.fsum(math.fsum(scales) for scales, _ in parts)
