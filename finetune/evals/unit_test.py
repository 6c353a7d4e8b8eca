"""The share of held-out rows whose greedy answer passes a test: a command that tries each answer out, in a cage.

On its standard input it finds one JSON object: ``prompt`` (the last thing that was asked), ``messages`` (all turns
before the answer), ``reference`` (the row's own answer) and ``completion``. It ends with code 0 where the completion is
right, with any other where it is wrong; or with code 0 and a number alone on its standard output, of which more is
better. What stops it (``cage.Limits``) makes the answer wrong. It is started without a shell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune import cage, evals
from finetune.conversation import without_thinking

if TYPE_CHECKING:
    from finetune.dataset import Question

Asked = tuple[Sequence[str], float, float, int]
"""The command's words; seconds, GB of memory and processes for one answer."""
_LARGEST = 1e6
"""A number beyond it is none: an answer that runs in the command's own process can print what it likes."""


def judge(questions: Sequence[Question], given: Sequence[str], asked: Asked) -> tuple[list[float], dict[str, Any]]:
    """Each row's verdict; their share or mean, and how many tests were stopped, if any were.

    Raises:
        EnvironmentFault: the command cannot be started, or not be held here.
    """
    words, seconds, memory, processes = asked
    limits = cage.Limits(seconds=seconds, memory=memory, processes=processes)
    inputs = [_told(question, answer) for question, answer in zip(questions, given, strict=True)]
    ended = cage.run_each(words, inputs, limits, "unit_test")
    verdicts = [_verdict(one) for one in ended]
    stopped = sum(one.code is None for one in ended)
    more = {"unit_test_stopped": stopped} if stopped else {}
    if set(verdicts) <= {0.0, 1.0}:
        return verdicts, evals.share("unit_test", verdicts) | more
    return verdicts, {"unit_test": math.fsum(verdicts) / len(verdicts)} | more


def _told(question: Question, answer: str) -> bytes:
    told = {
        "prompt": question.asked[-1][1] if question.asked else "",
        "messages": [{"role": role, "content": content} for role, content in question.asked],
        "reference": question.answer,
        "completion": without_thinking(answer),
    }
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")


def _verdict(ended: cage.Ended) -> float:
    if ended.code != 0:
        return 0.0
    try:
        found = float(ended.said.decode().strip())
    except ValueError:
        return 1.0
    return found if abs(found) <= _LARGEST else 0.0
