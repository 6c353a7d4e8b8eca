"""The share of held-out rows of whose options the model holds the right one most likely.

The likelihood of an option is that of the whole answer: its tokens and the stop token behind them, as the template
renders it. These are probabilities of things that exclude each other, so that lengths need no correction. Nothing is
generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune import evals
from finetune.evals import loss

if TYPE_CHECKING:
    from finetune.dataset import Question
    from finetune.model import Policy


def judge(
    policy: Policy, questions: Sequence[Question], micro_batch_tokens: int, progress: Callable[[int], None]
) -> tuple[list[float], dict[str, Any]]:
    """Share of right choices with its 95 % confidence interval; of equally likely options the first is chosen.

    Call inside ``policy.evaluating()``. Progress is told of options.
    """
    options = [option for question in questions for option in question.options]
    found = iter(loss.losses(policy, options, micro_batch_tokens, progress))
    verdicts = []
    for question in questions:
        costs = [next(found) for _ in question.options]
        verdicts.append(float(costs.index(min(costs)) == question.right))
    return verdicts, evals.share("multiple_choice", verdicts)
