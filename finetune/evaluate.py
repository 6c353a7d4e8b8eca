"""Run the chosen evaluations on held-out rows and return numbers (and the answers and verdicts behind them)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune import evals, generation
from finetune.evals import loss, multiple_choice, preference, teacher_kl
from finetune.taught import Taught

if TYPE_CHECKING:
    from finetune.dataset import Example, Question
    from finetune.model import Policy


Origin = Sequence[float] | Taught
"""What rows are compared with: the reference's log-probabilities of their texts, or what a teacher said of them."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rows that judge a run: as samples (for the loss) and, where answers are judged, as questions.

    ``roles``: of each sample the roles of its supervised tokens, where they may be several.
    """

    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    roles: tuple[tuple[str, ...], ...] = ()

    @property
    def rows(self) -> int:
        """How many rows there are: one may have given several samples."""
        return len({example.where for example in self.examples})


@dataclass(frozen=True, kw_only=True)
class How:
    """Which evaluations, and within which bounds. ``asked``: what some of them need, by their names."""

    metrics: Sequence[str]
    max_new_tokens: int
    batch_rows: int
    micro_batch_tokens: int
    asked: Mapping[str, Any] = field(default_factory=dict)
    objective: Any = None
    """The run's, where its loss is not that of the answers' tokens: as ``objectives.Ranking``."""
    taught: str = ""
    """A digest of what a teacher said of the rows, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Numbers by name; behind them each question's answer, each sample's summed loss, and by metric each question's
    verdict, where they were asked for."""

    scores: dict[str, Any]
    answers: list[str]
    losses: list[float] = field(default_factory=list)
    verdicts: dict[str, list[float]] = field(default_factory=dict)
    log_probs: list[float] = field(default_factory=list)
    """Of both texts of each row that judges answers; empty of a reward model."""
    measured: str = ""
    """What the losses are of, where that is not cross-entropy."""


def judge(
    policy: Policy, held_out: HeldOut, how: How, *, adapter: bool = True, progress: Callable[[str, int, int], None],
    origin: Origin | None = None,
) -> Judged:  # fmt: skip
    """Evaluate the policy, or with ``adapter=False`` the model as its run found it. ``progress`` gets (what, done, of).

    ``origin``: what the rows are compared with, where that is known.
    """
    scores: dict[str, Any] = {"rows": held_out.rows}
    given: list[str] = []
    losses: list[list[float]] = []
    verdicts: dict[str, list[float]] = {}
    questions = held_out.questions
    log_probs: list[float] = []
    with policy.evaluating(adapter=adapter):
        if "loss" in how.metrics and how.objective is not None and not isinstance(origin, Taught):
            losses, log_probs, found = _ranked(policy, held_out, how, adapter, progress, origin)
            scores |= found
        elif "loss" in how.metrics:
            tick = _counter("loss", len(held_out.examples), progress)
            losses = loss.by_token(policy, held_out.examples, how.micro_batch_tokens, tick)
            scores |= loss.score(held_out.examples, losses, held_out.roles)
        if "loss" in how.metrics and isinstance(origin, Taught):
            tick = _counter("teacher", len(held_out.examples), progress)
            scores |= teacher_kl.judge(policy, held_out.examples, origin, how.micro_batch_tokens, tick)
        if "multiple_choice" in how.metrics:
            tick = _counter("options", sum(len(question.options) for question in questions), progress)
            verdicts["multiple_choice"], found = multiple_choice.judge(policy, questions, how.micro_batch_tokens, tick)
            scores |= found
        if asked := [metric for metric in how.metrics if metric in evals.ANSWERED]:
            tick = _counter("answers", len(questions), progress)
            given = generation.greedy(policy, questions, how.max_new_tokens, how.batch_rows, tick)
    for metric in asked:
        rows, found = evals.get(metric).judge(questions, given, how.asked.get(metric))
        scores |= found
        verdicts |= {metric: rows} if rows else {}
    measured = repr(how.objective) if how.objective is not None else ""
    return Judged(
        scores=scores, answers=given, losses=[math.fsum(one) for one in losses], verdicts=verdicts,
        log_probs=log_probs, measured=measured,
    )  # fmt: skip


def _ranked(
    policy: Policy, held_out: HeldOut, how: How, adapter: bool, progress: Callable[[str, int, int], None],
    origin: Sequence[float] | None,
) -> tuple[list[list[float]], list[float], dict[str, Any]]:  # fmt: skip
    """(losses, log-probabilities, scores) of rows that judge answers. A merged model has no reference of its own."""
    texts = how.objective.texts(held_out.examples)
    tick = _counter("preferences", len(texts), progress)
    found = preference.read(how.objective, policy, texts, how.micro_batch_tokens, tick)
    if how.objective.scored:
        losses, scores = preference.score(how.objective, held_out.examples, found, None)
        return [[one] for one in losses], [], scores
    if origin is None and not adapter:
        origin = found
    elif origin is None and policy.adapted:
        tick = _counter("reference", len(texts), progress)
        with policy.evaluating(adapter=False):
            origin = preference.read(how.objective, policy, texts, how.micro_batch_tokens, tick)
    losses, scores = preference.score(how.objective, held_out.examples, found, origin)
    return [[one] for one in losses], found, scores


def _counter(what: str, of: int, progress: Callable[[str, int, int], None]) -> Callable[[int], None]:
    done = 0
    progress(what, 0, of)

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, of)

    return tick
