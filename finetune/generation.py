"""Answers of a model to many prompts, in batches of like length. For evaluations, and for ``finetune predict``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.dataset import Question
    from finetune.model import Policy


def batches(lengths: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Positions of prompts of like length, so that little padding is computed; the shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[low : low + batch_rows] for low in range(0, len(order), batch_rows)]


def greedy(
    policy: Policy, questions: Sequence[Question], max_new_tokens: int, batch_rows: int, progress: Callable[[int], None]
) -> list[str]:
    """Greedy answers in the order of the questions. Call inside ``policy.evaluating()``."""
    found = [""] * len(questions)
    for chosen in batches([len(question.prompt) for question in questions], batch_rows):
        produced = policy.generate([questions[i].prompt for i in chosen], max_new_tokens)
        for index, ids in zip(chosen, produced, strict=True):
            found[index] = text(policy, ids)
        progress(len(chosen))
    return found


def text(policy: Policy, ids: Sequence[int]) -> str:
    return str(policy.tokenizer.decode(ids, skip_special_tokens=True))
