"""The share of held-out rows whose greedy answer is right, character for character.

Outer white space and a block of thinking before the answer do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.bootstrap import wilson
from finetune.conversation import without_thinking

if TYPE_CHECKING:
    from finetune.dataset import Question


def judge(questions: Sequence[Question], given: Sequence[str], asked: Any = None) -> tuple[list[float], dict[str, Any]]:
    """Share of exact answers with its 95 % confidence interval."""
    verdicts = [float(is_right(question.answer, answer)) for question, answer in zip(questions, given, strict=True)]
    right = math.fsum(verdicts)
    low, high = wilson(int(right), len(verdicts))
    return verdicts, {"exact_match": right / len(verdicts), "confidence_interval": [low, high]}


def is_right(expected: str, given: str) -> bool:
    return expected.strip() == without_thinking(given).strip()
