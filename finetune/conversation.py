"""A conversation, the one shape that every data format is read into, and the checks that each must pass.

A fault here knows the row's column but not the file or the line; whoever reads the file adds those.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"
"""The role of plain text: one turn that stands alone, outside any template."""
# Words of other data sets that no spelling distance leads from.
SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
# A block of thinking with the white space behind it, up to its last newline: there no tokenizer joins two pieces.
THINKING = re.compile(r"\s*<think>.*?</think>(?:\s*\n)?", re.DOTALL)
_LONG_WORD = re.compile(r"[A-Za-z0-9_+/=-]{18,}")


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls, with its arguments by name."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one side says. ``weight`` scales an assistant turn's tokens in the loss; 0 makes it context only.

    ``thinking`` is reasoning that the row keeps beside the content; ``calls`` are the tools that the turn asks for.
    """

    role: str
    content: str
    weight: float = 1.0
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()

    def says(self) -> str:
        """All that it says, thinking and calls as well, for comparing rows."""
        if not self.thinking and not self.calls:
            return self.content
        calls = (f"{call.name} {json.dumps(call.arguments, default=str, sort_keys=True)}" for call in self.calls)
        return "\2".join((self.content, self.thinking, *calls))

    @property
    def answers(self) -> bool:
        """Whether the turn is in the loss."""
        return self.role in ("assistant", TEXT) and self.weight > 0


@dataclass(frozen=True)
class Conversation:
    """What a row says. ``tools``: JSON descriptions of the functions that may be called.

    A preference row has the same beginning with another ending as ``rejected``; a KTO row says with ``label`` whether
    its ending is wanted.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Turn, ...] = ()
    label: bool | None = None

    @property
    def ranked(self) -> bool:
        """Whether the row judges answers instead of showing one."""
        return bool(self.rejected) or self.label is not None

    def endings(self) -> tuple[tuple[Turn, ...], ...]:
        """The turns, and those of a preference row's other ending."""
        return (self.turns, self.rejected) if self.rejected else (self.turns,)

    def every_turn(self) -> tuple[Turn, ...]:
        """The turns, and those of the rejected ending that are not among them."""
        return *self.turns, *(turn for turn in self.rejected if turn not in self.turns)

    def described(self) -> str:
        """The tools as text, for comparing rows; empty where there are none."""
        return f"\3{json.dumps(self.tools, default=str, sort_keys=True)}" if self.tools else ""

    def upto(self, end: int) -> Conversation:
        """Its first ``end`` turns."""
        return replace(self, turns=self.turns[:end])


def without_thinking(text: str) -> str:
    """An answer without the block of thinking that it opens with."""
    block = THINKING.match(text)
    return text[block.end() :] if block else text


def as_context(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The same turns with no answer in the loss."""
    return tuple(replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in turns)


class RowFault(Exception):  # noqa: N818 - it becomes a Fault of a DataError once file and line are known
    """One row that cannot be used: in which column, what is wrong, what to do about it; ``code`` names its kind."""

    def __init__(self, column: str, what: str, fix: str = "", *, code: str) -> None:
        self.column, self.what, self.fix, self.code = column, what, fix, code
        super().__init__(f"{column}: {what}; {fix}" if fix else f"{column}: {what}")


def shown(value: object, limit: int = 40) -> str:
    """A value of the row, short and with control signs escaped, fit for a terminal; what may be a key is cut."""
    text = _LONG_WORD.sub(lambda word: f"{word.group()[:4]}…", repr(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def nearest(word: str, legal: Collection[str]) -> str:
    """The advice for a misspelt word: the legal one that it resembles, or all of them."""
    lowered = word.strip().lower()
    close = difflib.get_close_matches(lowered, legal, n=1, cutoff=0.6)
    guess = SYNONYMS[lowered] if SYNONYMS.get(lowered) in legal else next(iter(close), None)
    return f"did you mean {guess!r}?" if guess else f"use one of {', '.join(legal)}"


def text_of(value: object, column: str) -> str:
    """The text of a content: a string, or a list of ``{"type": "text", "text": …}`` parts joined as they stand."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RowFault(column, "is null", 'give a text; an empty one is ""', code="null_content")
    if not isinstance(value, list):
        raise RowFault(
            column, f"is {type(value).__name__} {shown(value)}, not a text", "put it in quotes", code="wrong_type"
        )
    pieces = []
    for index, part in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(part, Mapping):
            raise RowFault(
                place, f"is {shown(part)}, not a part", 'write {"type": "text", "text": …}', code="wrong_type"
            )
        if part.get("type") != "text":
            raise RowFault(
                place,
                f"is a part of type {shown(part.get('type'))}",
                "only text is trained; drop the row",
                code="not_text",
            )
        if not isinstance(part.get("text"), str):
            raise RowFault(
                f"{place}.text", f"is {shown(part.get('text'))}, not a text", "give the part a text", code="wrong_type"
            )
        pieces.append(part["text"])
    return "".join(pieces)


def role_of(value: object, column: str, legal: Mapping[str, str] | None = None) -> str:
    """The role that a row names; ``legal`` maps a format's own words to ours."""
    words = {role: role for role in ROLES} if legal is None else legal
    if not isinstance(value, str):
        raise RowFault(column, f"is {shown(value)}, not a role", f"use one of {', '.join(words)}", code="wrong_type")
    if value not in words:
        raise RowFault(column, f"unknown role {shown(value)}", nearest(value, words), code="unknown_role")
    return words[value]


def strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
