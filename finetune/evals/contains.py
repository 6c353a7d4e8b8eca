"""The share of held-out rows whose greedy answer holds the right one, character for character, among other words.

Outer white space of the right answer and a block of thinking before the given one do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune import evals
from finetune.conversation import without_thinking

if TYPE_CHECKING:
    from finetune.dataset import Question


def judge(questions: Sequence[Question], given: Sequence[str], asked: Any = None) -> tuple[list[float], dict[str, Any]]:
    """Share of answers that hold the right one, with its 95 % confidence interval."""
    verdicts = [
        float(question.answer.strip() in without_thinking(answer))
        for question, answer in zip(questions, given, strict=True)
    ]
    return verdicts, evals.share("contains", verdicts)
