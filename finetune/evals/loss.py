"""Mean cross-entropy, in nats per supervised token, over held-out rows; perplexity is its exponential."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune import schedule
from finetune.objectives import sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


def measure(
    policy: Policy, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Packed like training, so that memory stays within the plan; of several sources, each one's loss too.

    Call inside ``policy.evaluating()``.
    """
    sources: dict[str, list[Example]] = {}
    for example in examples:
        sources.setdefault(example.where.partition("#")[0].rpartition(":")[0], []).append(example)
    total, count, supervised = 0.0, 0.0, 0
    by_source = {}
    for name, own in sources.items():
        part, weight, tokens = _summed(policy, own, micro_batch_tokens, progress)
        total, count, supervised = total + part, count + weight, supervised + tokens
        by_source[name] = part / weight
    mean = total / count
    found = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "supervised_tokens": supervised}
    return found | ({"loss_by_source": by_source} if len(by_source) > 1 else {})


def _summed(
    policy: Policy, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[int], None]
) -> tuple[float, float, int]:
    """(summed loss, summed weights, supervised tokens)."""
    total, count, supervised = 0.0, 0.0, 0
    for pack in schedule.pack([len(example.ids) for example in examples], micro_batch_tokens):
        batch = sft.collate([examples[i] for i in pack]).to(policy.device)
        result = sft.loss(policy, batch)
        total += result.total.item()
        count += result.count
        supervised += batch.supervised
        progress(len(pack))
    return total, count, supervised
