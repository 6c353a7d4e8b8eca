"""Rows that are to be answered: in any format that trains, with or without an answer of their own, as prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from finetune import gather
from finetune.conversation import RowFault
from finetune.dataset import Faults, Read, Reader, Source
from finetune.errors import DataError
from finetune.renderer import Renderer

Made = TypeVar("Made")
_PLACEHOLDER = "."
"""Stands for the answer of a row that has none, so that it reads as a whole conversation; no model sees it."""
_ANSWERS = {"instruction": "output", "prompt": "completion"}
"""A format's question → the column of its answer."""
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ANSWERING = ("assistant", "gpt", "function_call")


def prompts(source: Source, renderer: Renderer, *, room: int, column: str) -> list[tuple[int, ...]]:
    """Each row's prompt as ids; a row's own last answer is not part of it.

    Args:
        room: the most tokens of a prompt.
        column: where the answer will go, which no row may have.

    Raises:
        DataError: every row that cannot be asked, by its place.
    """

    def prompt(read: Read) -> tuple[int, ...]:
        asked = _prompt(read, renderer)
        if len(asked) > room:
            what = f"its prompt has {len(asked)} tokens; the model's positions leave room for {room} and the answer"
            raise DataError(what, read.where, "shorten it, or lower --max-new-tokens")
        return asked

    return of_each(_Asking(source, gather.special_tokens(renderer), renderer.literals), column, prompt)


def of_each(rows: Reader, column: str, make: Callable[[Read], Made]) -> list[Made]:
    """What is made of each row that can be read. ``column``: where the result will go, which no row may have.

    Raises:
        DataError: every row of which nothing can be made, by its place.
    """
    faults, found = Faults(rows.source.path), []
    for read in rows:
        faults.rows += 1
        try:
            if column in read.columns:
                raise DataError(f"has a column {column!r} already", read.where, "name another one: --column")
            if isinstance(read.found, RowFault):
                raise read.found
            found.append(make(read))
        except RowFault as fault:
            faults.add(read.where, fault)
        except DataError as error:
            faults.put(error.faults[0])
    faults.raise_if_any()
    return found


def _prompt(read: Read, renderer: Renderer) -> tuple[int, ...]:
    assert not isinstance(read.found, RowFault)
    last = max((at for at, turn in enumerate(read.found.turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise DataError("plain text asks nothing", read.where, "write it as a prompt or as messages")
    return renderer.prompt(read.found.upto(last), read.where)


class _Asking(Reader):
    """Reads rows that may have no answer yet."""

    def renamed(self, row: dict[str, object]) -> dict[str, object]:
        ours = self.source.columns
        absent = {ours[answer]: None for answer in _ANSWERS.values() if answer in ours and ours[answer] not in row}
        return answered(super().renamed(row | absent))


def answered(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a placeholder where its last answer is missing or empty."""
    made = dict(row)
    for question, answer in _ANSWERS.items():
        if question in row and not row.get(answer) and "chosen" not in row:
            made[answer] = _PLACEHOLDER
    for column, (role, text) in _TURNS.items():
        turns = row.get(column)
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
            continue
        who = next((key for key in (role, "role", "from") if key in turns[-1]), role)
        words = next((key for key in (text, "content", "value") if key in turns[-1]), text)
        if turns[-1].get(who) not in _ANSWERING:
            made[column] = [*turns, {who: "gpt" if who == "from" else "assistant", words: _PLACEHOLDER}]
    return made
