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
    """Each sample's loss, summed over its weighted tokens. Packed like training, so that memory stays within the plan.

    Call inside ``policy.evaluating()``.
    """
    found = [0.0] * len(examples)
    for pack in schedule.pack([len(example.ids) for example in examples], micro_batch_tokens):
        batch = sft.collate([examples[i] for i in pack]).to(policy.device)
        for index, total in zip(pack, sft.row_losses(policy, batch), strict=True):
            found[index] = total
        progress(len(pack))
    return found


def score(examples: Sequence[Example], found: Sequence[float]) -> dict[str, Any]:
    """The mean over all tokens; of several sources, each one's too."""
    sources: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        sources.setdefault(example.where.partition("#")[0].rpartition(":")[0], []).append(index)
    mean = _mean(examples, found, range(len(examples)))
    supervised = sum(sum(example.supervised) for example in examples)
    scores = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "supervised_tokens": supervised}
    by_source = {name: _mean(examples, found, own) for name, own in sources.items()}
    return scores | ({"loss_by_source": by_source} if len(by_source) > 1 else {})


def _mean(examples: Sequence[Example], found: Sequence[float], chosen: Iterable[int]) -> float:
    chosen = list(chosen)
    return math.fsum(found[i] for i in chosen) / math.fsum(weight for i in chosen for weight in examples[i].weights)
