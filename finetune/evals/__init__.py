"""How a result is judged, one file each; the file's name is the word in ``evaluate.metrics``.

A metric of answers has ``judge(questions, given, asked)``: each row's verdict (1 right, 0 wrong, or a number of which
more is better), and what is to be told of all rows, as numbers by name.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from finetune import bootstrap

if TYPE_CHECKING:
    from finetune.dataset import Question

ANSWERED = ("exact_match", "contains", "regex", "json_schema", "command", "unit_test")
"""Metrics of answers that the model writes: without one of them none are written."""
ROWWISE = (*ANSWERED, "multiple_choice")
"""Metrics that say something of each row's answer; of all of them more is better."""
RANKED = ("preference_accuracy", "reward_accuracy", "reward_margin")
"""What ``loss`` measures beside itself where rows judge answers (preference.py); of these too more is better."""
TAUGHT = ("teacher_kl",)
"""What it measures beside itself where a teacher said something of the rows (teacher_kl.py)."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", *TAUGHT})
"""Of every other score more is better."""


class Metric(Protocol):
    """What a file of this folder offers that judges answers."""

    def judge(
        self, questions: Sequence[Question], given: Sequence[str], asked: Any
    ) -> tuple[list[float], dict[str, Any]]:
        """Each row's verdict, and the scores. ``asked``: what the recipe says under the metric's own name."""


def get(name: str) -> Metric:
    return cast(Metric, importlib.import_module(f"{__name__}.{name}"))


def share(name: str, verdicts: Sequence[float]) -> dict[str, Any]:
    """The share of rows that are right, with its 95 % confidence interval."""
    low, high = bootstrap.wilson(round(math.fsum(verdicts)), len(verdicts))
    return {name: math.fsum(verdicts) / len(verdicts), f"{name}_interval": [low, high]}


def gain(metric: str, one: float, other: float) -> float:
    """By how much ``one`` is better than ``other``; negative where it is worse."""
    return other - one if metric in LOWER_IS_BETTER else one - other
