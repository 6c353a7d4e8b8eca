"""A conversation, the one shape that every data format is read into, and the checks that each must pass.

A fault here knows the row's column but not the file or the line; whoever reads the file adds those.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"
"""The role of plain text: one turn that stands alone, outside any template."""
# Which roles may come next. A tool's answer belongs to the assistant that asked, and the assistant goes on from it.
NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
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
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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
    """A value of the row, short and with control signs escaped, fit for a terminal."""
    text = repr(value)
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


def check(conversation: Conversation, special_tokens: Collection[str] = (), literals: Collection[str] = ()) -> None:
    """Raise RowFault on the first thing that would train something other than what the row means.

    ``special_tokens`` are the tokenizer's own: as text inside a content they would become control tokens, and a
    user's words could then open a turn of another role. ``literals`` are those that a content may hold as mere text.
    """
    allowed = tuple(token for token in special_tokens if token not in literals)
    turns = conversation.turns
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES and (turn.role != TEXT or len(turns) > 1):
            what = f"unknown role {shown(turn.role)}"
            raise RowFault(f"turn {number}", what, nearest(str(turn.role), ROLES), code="unknown_role")
        _check_turn(turn, f"turn {number} ({turn.role})", allowed, special_tokens)
    _check_order(turns)
    if conversation.rejected:
        _check_rejected(conversation, allowed, special_tokens)
    for index, tool in enumerate(conversation.tools):
        for text in _strings(tool):
            _check_text(text, f"tools[{index}]", special_tokens)


def _check_rejected(conversation: Conversation, special_tokens: Collection[str], everywhere: Collection[str]) -> None:
    """The other ending must be a conversation too, and another one."""
    if conversation.rejected == conversation.turns:
        what = "is the chosen answer too: there is nothing to prefer"
        raise RowFault("rejected", what, "drop the row", code="same_answers")
    for number, turn in enumerate(conversation.rejected, 1):
        _check_turn(turn, f"rejected turn {number} ({turn.role})", special_tokens, everywhere)
    _check_order(conversation.rejected)


def _check_turn(turn: Turn, place: str, special_tokens: Collection[str], everywhere: Collection[str]) -> None:
    """``everywhere``: texts that its tool calls must not hold either."""
    content: object = turn.content  # a caller may have got past the type
    if not isinstance(content, str):
        text_of(content, place)
        raise RowFault(place, "content is a list of parts", "read it with text_of first", code="wrong_type")
    _check_text(content, place, special_tokens)
    if turn.thinking:
        _check_text(turn.thinking, f"{place} thinking", special_tokens)
    for call in turn.calls:
        for text in (call.name, *_strings(call.arguments)):
            _check_text(text, f"{place} tool call", everywhere)
    if turn.role in ("assistant", TEXT) and not turn.calls and not content.strip():
        fix = "the model would learn to say nothing; drop the row or answer it"
        raise RowFault(place, "the answer is empty", fix, code="empty_answer")


def _check_text(text: str, place: str, special_tokens: Collection[str]) -> None:
    if "\0" in text:
        what = f"has a NUL character at {text.index(chr(0))}"
        raise RowFault(place, what, "remove it; the file may be damaged", code="nul")
    if not text.isascii() and (found := LONE_SURROGATE.search(text)):
        what = f"has half a surrogate pair ({shown(found.group())}) at {found.start()}"
        raise RowFault(place, what, "it is no text; write the whole character", code="lone_surrogate")
    if special_tokens and (token := _find_any(text, tuple(special_tokens))):
        what = f"holds the special token {token.group()!r} as text at {token.start()}"
        fix = "it would act as a control token; remove it, or declare it in data.literal_tokens"
        raise RowFault(place, what, fix, code="special_token")


def _find_any(text: str, tokens: tuple[str, ...]) -> re.Match[str] | None:
    """The first of these texts that stands in ``text``."""
    sign, pattern = _any_of(tokens)
    return pattern.search(text) if sign in text else None  # looking for one character is far cheaper


@functools.lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> tuple[str, re.Pattern[str]]:
    """(a character that each of them has, or none; what finds any of them, longer ones first so that a whole one is
    named)."""
    found = sorted(filter(None, tokens), key=len, reverse=True)
    shared = set.intersection(*map(set, found)) if found else set()
    return min(shared, default=""), re.compile("|".join(map(re.escape, found)) or "(?!)")


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _check_order(turns: tuple[Turn, ...]) -> None:
    if len(turns) == 1 and turns[0].role == TEXT:
        return
    if not any(turn.role == "assistant" for turn in turns):
        found = ", ".join(turn.role for turn in turns) or "no turn at all"
        fix = "there is nothing to learn; add the answer"
        raise RowFault("turns", f"no assistant turn ({found})", fix, code="no_assistant")
    before = ""
    for number, turn in enumerate(turns, 1):
        if turn.role not in NEXT[before]:
            place = f"turn {number} ({turn.role})"
            raise RowFault(place, _misplaced(turn.role, before), _placed(turn.role), code="turn_order")
        before = turn.role
    if before != "assistant":
        place = f"turn {len(turns)} ({before})"
        raise RowFault(place, "nothing answers it", "drop it or add the answer", code="unanswered")
    if not any(turn.answers for turn in turns):
        what = "no assistant turn is trained (all have weight 0)"
        raise RowFault("turns", what, "drop the row or a weight", code="nothing_trained")


def _misplaced(role: str, before: str) -> str:
    if role == "system":
        return "a system turn must come first"
    if not before:
        return f"the conversation opens with the {role}"
    if role == before:
        return f"two {role} turns running"
    return f"comes right after the {before} turn"


def _placed(role: str) -> str:
    return {
        "system": "move it to the front, or merge it into the first one",
        "user": "join it with the turn before, or add the answer that is missing between them",
        "assistant": "each answer needs a user turn before it; join two answers into one",
        "tool": "a tool turn follows the assistant turn that asked for it",
    }[role]
