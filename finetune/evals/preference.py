"""How well a model tells a better answer from a worse one, on held-out rows that judge answers.

``preference_accuracy``: the share of pairs whose chosen text the model itself finds more probable, which any model has.
``reward_accuracy``: the share whose chosen text gained more on the reference than the rejected one did; of rows with
labels, the share of all couples of a wanted and an unwanted one (the area under the curve). Ties are half right: the
reference itself has 0.5. ``reward_margin``: by how much, on average. Of a reward model these two are of the rewards
that its score head gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune import schedule
from finetune.bootstrap import wilson
from finetune.objectives import Ranking, better, collate

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy


def read(
    objective: Ranking, policy: Policy, texts: Sequence[Example], micro_batch_tokens: int,
    progress: Callable[[int], None],
) -> list[float]:  # fmt: skip
    """What the objective makes of each text: its log-probability, or its reward. Inside ``policy.evaluating()``."""
    found = [0.0] * len(texts)
    for pack in schedule.pack([len(text.ids) for text in texts], micro_batch_tokens):
        batch = collate([texts[i] for i in pack]).to(policy.device)
        for index, value in zip(pack, objective.read(policy, batch).tolist(), strict=True):
            found[index] = value
        progress(len(pack))
    return found


def score(
    objective: Ranking, examples: Sequence[Example], found: Sequence[float], origin: Sequence[float] | None
) -> tuple[list[float], dict[str, Any]]:
    """(each row's loss, the scores) from what was read of its texts, in the model and in the reference.

    Without those of the reference only what needs none is told.
    """
    ours, theirs = _by_row(found), None if origin is None else _by_row(origin)
    scores: dict[str, Any] = {}
    if objective.paired and not objective.scored:
        scores |= _share("preference_accuracy", better(ours[:, 0], ours[:, 1]))
    judged = objective.judge(examples, ours, theirs)
    if judged is None:
        return [], scores
    losses, rewards = judged
    scores["loss"] = math.fsum(losses.tolist()) / len(losses)
    if objective.paired:
        scores |= _share("reward_accuracy", better(rewards[:, 0], rewards[:, 1]))
        scores["reward_margin"] = float((rewards[:, 0] - rewards[:, 1]).mean())
    else:
        scores |= _of_labels(rewards, torch.tensor([bool(example.label) for example in examples]))
    return losses.tolist(), scores


def _by_row(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 2)


def _share(name: str, right: torch.Tensor) -> dict[str, Any]:
    """A share of rows with its 95 % confidence interval."""
    return {name: float(right.mean()), f"{name}_interval": list(wilson(float(right.sum()), len(right)))}


def _of_labels(rewards: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    good, bad = rewards[wanted], rewards[~wanted]
    if not len(good) or not len(bad):
        return {}
    couples = better(good[:, None], bad[None, :])
    return {"reward_accuracy": float(couples.mean()), "reward_margin": float(good.mean() - bad.mean())}
