"""Mean cross-entropy, in nats per supervised token, over held-out rows; perplexity is its exponential."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune import schedule
from finetune.objectives import sft

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


def measure(
    policy: Policy, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[int], None]
) -> dict[str, float]:
    """Packed like training, so that memory stays within the plan. Call inside ``policy.evaluating()``."""
    total, count = 0.0, 0
    for pack in schedule.pack([len(example.ids) for example in examples], micro_batch_tokens):
        result = sft.loss(policy, sft.collate([examples[i] for i in pack]).to(policy.device))
        total += result.total.item()
        count += result.count
        progress(len(pack))
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "supervised_tokens": count}
