"""Mean KL divergence from the teacher's distribution to the model's, in nats per supervised token of held-out rows.

Over what the teacher's record of these rows tells apart: its likeliest tokens, and all others as one. Putting outcomes
together can only lower a KL divergence, so that this is never more than that over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune import schedule
from finetune.objectives import collate, distill

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


def judge(
    policy: Policy, examples: Sequence[Example], taught: Any, micro_batch_tokens: int, progress: Callable[[int], None]
) -> dict[str, float]:
    """The mean over all tokens by their weights. Call inside ``policy.evaluating()``. ``taught``: a ``Taught``."""
    sums, counts = [], []
    for pack in schedule.pack([len(example.ids) for example in examples], micro_batch_tokens):
        batch = collate([examples[i] for i in pack])
        found = distill.kl(policy, batch.to(policy.device), taught.of(batch), taught.temperature)
        sums.append(float((found if batch.scales is None else found * batch.scales).sum()))
        counts.append(batch.count)
        progress(len(pack))
    return {"teacher_kl": math.fsum(sums) / math.fsum(counts)}
