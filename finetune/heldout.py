"""Rows as what a model is judged by: samples for the loss, questions for its answers, options for its choices.

A metric under which a row's own answer is wrong says nothing of a model: such rows are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune import dataset, datashow, evals
from finetune.conversation import TEXT, Turn, as_context, shown
from finetune.dataset import Example, Faults, Question, Row
from finetune.errors import DataError, Fault
from finetune.evaluate import HeldOut
from finetune.renderer import Renderer
from finetune.window import Fitted

_OWN_ANSWER = ("regex", "json_schema")
"""Metrics that can refuse the right answer."""


def make(fitted: Fitted, renderer: Renderer, metrics: Sequence[str], asked: Mapping[str, Any]) -> HeldOut:
    """What the rows are to the ``metrics``; ``asked`` as of ``evaluate.How``.

    Raises:
        DataError: rows whose own answer a metric would call wrong, or that offer no options.
    """
    questions: tuple[Question, ...] = ()
    if any(metric in evals.ROWWISE for metric in metrics):
        questions = tuple(question(row, renderer) for row in fitted.rows)
        if "multiple_choice" in metrics:
            questions = _with_options(fitted.rows, questions, renderer, asked["multiple_choice"])
        _refuse_wrong(questions, metrics, asked)
    several = renderer.train_on == "all" and "loss" in metrics
    return HeldOut(
        examples=fitted.examples, questions=questions, roles=tuple(_roles(fitted, renderer)) if several else ()
    )


def question(row: Row, renderer: Renderer) -> Question:
    """The row's last answer asked for, with all that stands before it. Raises DataError where it asks nothing."""
    asked = renderer.question(row)
    turns = row.conversation.turns
    last = max(at for at, turn in enumerate(turns) if turn.role == "assistant")
    return replace(
        asked,
        content=dataset.content(row.conversation),
        asked=tuple((turn.role, turn.content) for turn in turns[:last]),
    )


def _with_options(
    rows: Sequence[Row], questions: Sequence[Question], renderer: Renderer, options: Sequence[str] | str
) -> tuple[Question, ...]:
    """The questions with their options as samples, each of them an answer in place of the right one.

    ``options``: the same for all rows, or the name of the rows' column that holds them.
    """
    alone = Renderer(
        renderer.tokenizer, renderer.stop_token, piecewise=renderer.piecewise, train_on="last",
        thinking=renderer.thinking, literals=renderer.literals,
    )  # fmt: skip
    faults, made = Faults("evaluate.multiple_choice"), []
    for row, question in zip(rows, questions, strict=True):
        offered: Any = row.kept if isinstance(options, str) else list(options)
        try:
            offered = _offered(offered, row.where)
            right = [text.strip() for text in offered].index(question.answer.strip())
        except ValueError:
            what = f"the right answer {shown(question.answer)} is none of its options"
            faults.put(Fault(what, row.where, "add it to them: evaluate.multiple_choice"))
            continue
        except DataError as error:
            faults.put(error.faults[0])
            continue
        samples = [_answered(row, text, alone) for text in offered]
        made.append(replace(question, options=tuple(samples), right=right))
        faults.rows += 1
    faults.raise_if_any()
    return tuple(made)


def _offered(value: Any, where: str) -> list[str]:
    """Options as texts. Raises DataError."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one.strip() for one in value):
        what = f"options must be a list of two texts or more; found {shown(value)}"
        raise DataError(what, where, "mend the column that evaluate.multiple_choice names")
    if len({one.strip() for one in value}) < len(value):
        raise DataError("an option comes twice", where, "keep one")
    return value


def _answered(row: Row, text: str, renderer: Renderer) -> Example:
    turns = row.conversation.turns
    last = max(at for at, turn in enumerate(turns) if turn.role == "assistant")
    talk = replace(row.conversation, turns=(*as_context(turns[:last]), Turn("assistant", text)), rejected=())
    (example,) = renderer.examples(replace(row, conversation=talk))
    return example


def _refuse_wrong(questions: Sequence[Question], metrics: Sequence[str], asked: Mapping[str, Any]) -> None:
    expected = [question.answer for question in questions]
    for metric in (one for one in _OWN_ANSWER if one in metrics):
        faults = Faults(f"evaluate.{metric}")
        for question, right in zip(
            questions, evals.get(metric).judge(questions, expected, asked[metric])[0], strict=True
        ):
            faults.rows += 1
            if not right:
                what = f"{metric} calls this row's own answer wrong: {shown(question.answer)}"
                faults.put(Fault(what, question.where, f"mend the row, or evaluate.{metric}"))
        faults.raise_if_any()


def _roles(fitted: Fitted, renderer: Renderer) -> Iterator[tuple[str, ...]]:
    """Of each sample whose words its supervised tokens are; the template's frame around a turn counts as its turn's.

    Nothing at all where one of them cannot be told, as of a template that changes earlier turns.
    """
    rows = {row.where: row for row in fitted.rows}
    found = [_roles_of(example, rows.get(example.where), renderer) for example in fitted.examples]
    if all(roles is not None for roles in found):
        yield from (roles for roles in found if roles is not None)


def _roles_of(example: Example, row: Row | None, renderer: Renderer) -> tuple[str, ...] | None:
    if row is None or row.conversation.turns[0].role == TEXT:
        return (TEXT,) * sum(example.supervised)
    pieces = datashow.shown(example, (), renderer).pieces
    whole = "".join(piece.text for piece in pieces)
    ends = []
    for number, turn in enumerate(row.conversation.turns, 1):
        try:
            begun = renderer.normal(renderer.text(row.conversation.upto(number), row.where, prompt=False))
        except DataError:
            return None
        if not whole.startswith(begun.rstrip("\n")):  # what the template writes after the last stop token is not kept
            return None
        ends.append((len(begun), turn.role))
    roles, at, token = [], 0, 0
    for piece in pieces:
        owner = next((role for end, role in ends if at < end), ends[-1][1])
        roles += [owner for weight in example.weights[token : token + len(piece.ids)] if weight > 0]
        at, token = at + len(piece.text), token + len(piece.ids)
    return tuple(roles)
