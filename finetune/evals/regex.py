"""The share of held-out rows whose greedy answer has a match of ``evaluate.regex``.

Where the pattern has groups, what they catch in the answer must also be what they catch in the right one: so the final
number of a long answer is compared. A search that takes more than a second is stopped, and the answer is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune import evals, pattern
from finetune.conversation import without_thinking

if TYPE_CHECKING:
    from finetune.dataset import Question


def judge(questions: Sequence[Question], given: Sequence[str], asked: str) -> tuple[list[float], dict[str, Any]]:
    """Share of matching answers with its 95 % confidence interval; ``regex_stopped`` searches, if there were any."""
    wanted = pattern.compiled(asked)
    verdicts, stopped = [], 0
    for question, answer in zip(questions, given, strict=True):
        try:
            verdicts.append(float(_matches(wanted, question.answer, without_thinking(answer))))
        except TimeoutError:
            verdicts.append(0.0)
            stopped += 1
    return verdicts, evals.share("regex", verdicts) | ({"regex_stopped": stopped} if stopped else {})


def _matches(wanted: Any, expected: str, given: str) -> bool:
    found = pattern.search(wanted, given)
    if found is None or not wanted.groups:
        return found is not None
    right = pattern.search(wanted, expected)
    return right is not None and found.groups() == right.groups()
