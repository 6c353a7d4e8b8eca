"""Rows longer than the window: rows in = rows trained + rows named, whatever the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import prepare, window
from finetune.conversation import Conversation, Turn
from finetune.dataset import Row
from finetune.errors import DataError
from finetune.renderer import Renderer
from finetune.window import Window
from tests.runs import OUTPUT, chat, train, write_rows

POLICIES = ("drop", "truncate_turns", "split")


@pytest.fixture
def renderer(work: Path) -> Renderer:
    return prepare.open_renderer(Path("r.yaml"), ())[1]


def row(*lengths: int, system: str = "", where: str = "x:1") -> Row:
    """Exchanges whose turns have these many characters."""
    turns = [Turn("system", system)] if system else []
    for number, length in enumerate(lengths):
        turns += [Turn("user", f"{number}" * length), Turn("assistant", chr(97 + number) * length)]
    return Row(conversation=Conversation(tuple(turns)), where=where)


ROWS = [
    row(4), row(120), row(4, 4), row(30, 4, 4), row(4, 120, 4), row(20, 20, 20, system="s"), row(120, 120),
    row(4, 30, 30),
]  # fmt: skip
WINDOW = 110


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_in_are_rows_trained_and_rows_named(policy: str, renderer: Renderer) -> None:
    rows = [Row(conversation=one.conversation, where=f"x:{n}") for n, one in enumerate(ROWS, 1)]
    fitted = window.fit(rows, Window(renderer=renderer, max_length=WINDOW, policy=policy))
    as_they_stand = {one.where for one in fitted.rows} & {one.where for one in rows} - {
        one.where for one in fitted.named
    }
    assert as_they_stand | {one.where for one in fitted.named} == {one.where for one in rows}
    assert fitted.named
    stop = renderer.tokenizer.convert_tokens_to_ids(renderer.stop_token)
    for example in fitted.examples:
        assert len(example.ids) <= WINDOW
        assert example.ids[-1] == stop
        assert example.supervised[-1]
    trained = {one.where.partition("#")[0] for one in fitted.rows}
    assert {one.where for one in fitted.named if one.done == "left out"} == {one.where for one in rows} - trained


def test_refused_is_the_default_and_names_each_row(renderer: Renderer) -> None:
    with pytest.raises(DataError) as caught:
        window.fit(
            [row(4), row(120, where="x:7"), row(120, 4, where="x:9")], Window(renderer=renderer, max_length=WINDOW)
        )
    assert [fault.where for fault in caught.value.faults] == ["x:7", "x:9"]
    assert all("more than train.max_length 110" in fault.what for fault in caught.value.faults)


def test_cutting_takes_whole_turns_from_the_front_and_keeps_the_system(renderer: Renderer) -> None:
    fitted = window.fit(
        [row(60, 4, 4, system="be")], Window(renderer=renderer, max_length=WINDOW, policy="truncate_turns")
    )
    (kept,) = fitted.rows
    assert (
        kept.conversation.turns
        == row(60, 4, 4, system="be").conversation.turns[:1] + row(60, 4, 4).conversation.turns[2:]
    )
    (named,) = fitted.named
    assert (named.done, named.detail) == ("cut", "the first 2 turns are left out")


def test_splitting_keeps_every_exchange_that_fits(renderer: Renderer) -> None:
    given = row(10, 10, 120, 10, 10, system="s")
    fitted = window.fit([given], Window(renderer=renderer, max_length=WINDOW, policy="split"))
    assert [one.where for one in fitted.rows] == [f"x:1#{n}" for n in range(1, len(fitted.rows) + 1)]
    answers = [turn.content for one in fitted.rows for turn in one.conversation.turns if turn.role == "assistant"]
    assert answers == [
        turn.content for turn in given.conversation.turns if turn.role == "assistant" and len(turn.content) < 99
    ]
    assert all(one.conversation.turns[0] == Turn("system", "s") for one in fitted.rows)
    assert fitted.named[0].done == "split"
    assert "2 turns are left out" in fitted.named[0].detail


def test_nothing_left_is_an_error(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="no row fits"):
        window.fit([row(120)], Window(renderer=renderer, max_length=WINDOW, policy="drop"))


def test_a_run_names_its_rows_in_its_folder(work: Path) -> None:
    rows = [chat(f"What is {n}?", f"{n}") for n in range(12)]
    write_rows(Path("train.jsonl"), [*rows, chat("long " * 100, "x")])
    assert train("train.steps=1", "evaluate.metrics=[loss]").code == 3
    said = train("train.steps=1", "evaluate.metrics=[loss]", "data.over_length=drop")
    assert said.code == 0, said.err
    assert "1 rows of the training data are left out (data.over_length)" in said.out
    (named,) = [json.loads(line) for line in (OUTPUT / "rows.jsonl").read_text().splitlines()]
    assert (named["where"], named["done"]) == ("train.jsonl:13", "left out")
    changed = train("train.steps=1", "evaluate.metrics=[loss]", "data.over_length=split")
    assert changed.code == 2
    assert "data.over_length" in changed.err


def test_splitting_keeps_the_context_that_fits(renderer: Renderer) -> None:
    """An answer of weight 0 is what the next one builds on."""
    turns = [Turn("user", "q1"), Turn("assistant", "context", 0.0), Turn("user", "q2"), Turn("assistant", "two")]
    more = [Turn("user", "q3"), Turn("assistant", "three")]
    whole = Row(conversation=Conversation((*turns, *more)), where="x:1")
    longest = len(renderer.examples(whole)[0].ids) - 1
    fitted = window.fit([whole], Window(renderer=renderer, max_length=longest, policy="split"))
    assert [one.conversation.turns for one in fitted.rows] == [tuple(turns), tuple(more)]
    assert "0 turns are left out" in fitted.named[0].detail
    untrained = [Turn("user", "q4"), Turn("assistant", "unsaid", 0.0)]
    row = Row(conversation=Conversation((*turns, *untrained * 9, *more)), where="x:1")
    fitted = window.fit([row], Window(renderer=renderer, max_length=longest, policy="split"))
    assert all(any(turn.answers for turn in one.conversation.turns) for one in fitted.rows)
