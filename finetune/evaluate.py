"""Run the chosen evaluations on held-out rows and return numbers (and the answers behind them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.evals import exact_match, loss

if TYPE_CHECKING:
    from finetune.dataset import Example, Question
    from finetune.model import Policy


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rows that judge a run: as samples (for the loss) and, where answers are asked for, as questions."""

    examples: tuple[Example, ...]
    questions: tuple[Question, ...]

    @property
    def rows(self) -> int:
        """How many rows there are: one may have given several samples."""
        return len({example.where for example in self.examples})


@dataclass(frozen=True, kw_only=True)
class How:
    """Which evaluations, and within which bounds."""

    metrics: Sequence[str]
    max_new_tokens: int
    batch_rows: int
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Numbers by name; behind them each question's answer, and each sample's summed loss, where they were asked for."""

    scores: dict[str, Any]
    answers: list[str]
    losses: list[float] = field(default_factory=list)


def judge(
    policy: Policy, held_out: HeldOut, how: How, *, adapter: bool = True, progress: Callable[[str, int, int], None]
) -> Judged:
    """Evaluate the policy, or with ``adapter=False`` its bare base. ``progress`` gets (what, done, of)."""
    scores: dict[str, Any] = {"rows": held_out.rows}
    answers: list[str] = []
    losses: list[float] = []
    with policy.evaluating(adapter=adapter):
        if "loss" in how.metrics:
            tick = _counter("loss", len(held_out.examples), progress)
            losses = loss.losses(policy, held_out.examples, how.micro_batch_tokens, tick)
            scores |= loss.score(held_out.examples, losses)
        if "exact_match" in how.metrics:
            tick = _counter("answers", len(held_out.questions), progress)
            answers = exact_match.answers(policy, held_out.questions, how.max_new_tokens, how.batch_rows, tick)
            scores |= exact_match.score(held_out.questions, answers)
    return Judged(scores=scores, answers=answers, losses=losses)


def _counter(what: str, of: int, progress: Callable[[str, int, int], None]) -> Callable[[int], None]:
    done = 0
    progress(what, 0, of)

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, of)

    return tick
