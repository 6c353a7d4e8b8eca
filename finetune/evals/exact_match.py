"""The share of held-out rows whose greedy answer is right, character for character.

Outer white space and a block of thinking before the answer do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.conversation import without_thinking

if TYPE_CHECKING:
    from finetune.dataset import Question
    from finetune.model import Policy


def answers(
    policy: Policy, questions: Sequence[Question], max_new_tokens: int, batch_rows: int, progress: Callable[[int], None]
) -> list[str]:
    """Greedy answers in the order of the questions. Call inside ``policy.evaluating()``.

    Questions of like length share a batch, so that little padding is computed.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    found = [""] * len(questions)
    for low in range(0, len(order), batch_rows):
        chosen = order[low : low + batch_rows]
        produced = policy.generate([questions[i].prompt for i in chosen], max_new_tokens)
        for index, ids in zip(chosen, produced, strict=True):
            found[index] = policy.tokenizer.decode(ids, skip_special_tokens=True)
        progress(len(chosen))
    return found


def score(questions: Sequence[Question], given: Sequence[str]) -> dict[str, Any]:
    """Share of exact answers with its 95 % confidence interval."""
    right = sum(is_right(question.answer, answer) for question, answer in zip(questions, given, strict=True))
    low, high = wilson(right, len(questions))
    return {"exact_match": right / len(questions), "rows": len(questions), "confidence_interval": [low, high]}


def is_right(expected: str, given: str) -> bool:
    return expected.strip() == without_thinking(given).strip()


def wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a binomial share (Wilson 1927): sound at 0 and 1, where the normal one is not."""
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - half), min(1.0, middle + half)
