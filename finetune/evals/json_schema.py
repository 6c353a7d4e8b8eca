"""The share of held-out rows whose greedy answer is JSON that fits the schema in ``evaluate.json_schema``.

The whole answer must be JSON (RFC 8259: no NaN, nothing around it), after a block of thinking if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import answer_schema, evals
from finetune.conversation import without_thinking
from finetune.errors import EnvironmentFault

if TYPE_CHECKING:
    from finetune.dataset import Question


def judge(questions: Sequence[Question], given: Sequence[str], asked: str) -> tuple[list[float], dict[str, Any]]:
    """Share of fitting answers with its 95 % confidence interval; ``json_schema_stopped`` searches for a pattern.

    Raises:
        EnvironmentFault: the schema is no longer there, or no longer one.
    """
    try:
        schema = answer_schema.load(Path(asked))
    except ValueError as error:
        raise EnvironmentFault(f"this schema {error}", asked, "put it back") from None
    verdicts, stopped = [], 0
    for _, answer in zip(questions, given, strict=True):
        try:
            verdicts.append(float(answer_schema.holds(schema, without_thinking(answer))))
        except TimeoutError:
            verdicts.append(0.0)
            stopped += 1
    return verdicts, evals.share("json_schema", verdicts) | ({"json_schema_stopped": stopped} if stopped else {})
