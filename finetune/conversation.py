"""A conversation, the one shape that every data format is read into, and the checks that each must pass.

A fault here knows the row's column but not the file or the line; whoever reads the file adds those.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")
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
TOOL_CALLS = "tool calls are not trained yet"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """What one side says; ``train`` is False where an assistant's words are context only."""

    role: str
    content: str
    train: bool = True


Conversation = tuple[Turn, ...]


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


def check(conversation: Conversation, special_tokens: Collection[str] = ()) -> None:
    """Raise RowFault on the first thing that would train something other than what the row means.

    ``special_tokens`` are the tokenizer's own: as text inside a content they would become control tokens, and a
    user's words could then open a turn of another role.
    """
    for number, turn in enumerate(conversation, 1):
        if turn.role not in ROLES:
            raise RowFault(
                f"turn {number}",
                f"unknown role {shown(turn.role)}",
                nearest(str(turn.role), ROLES),
                code="unknown_role",
            )
        _check_content(turn, f"turn {number} ({turn.role})", special_tokens)
    _check_order(conversation)


def _check_content(turn: Turn, place: str, special_tokens: Collection[str]) -> None:
    content: object = turn.content  # a caller may have got past the type
    if not isinstance(content, str):
        text_of(content, place)
        raise RowFault(place, "content is a list of parts", "read it with text_of first", code="wrong_type")
    if "\0" in content:
        raise RowFault(
            place, f"has a NUL character at {content.index(chr(0))}", "remove it; the file may be damaged", code="nul"
        )
    if found := LONE_SURROGATE.search(content):
        what = f"has half a surrogate pair ({shown(found.group())}) at {found.start()}"
        raise RowFault(place, what, "it is no text; write the whole character", code="lone_surrogate")
    for token in special_tokens:
        if token and token in content:
            what = f"holds the special token {token!r} as text at {content.index(token)}"
            raise RowFault(
                place, what, "it would act as a control token; remove it or spell it differently", code="special_token"
            )
    if turn.role == "assistant" and not content.strip():
        raise RowFault(
            place,
            "the answer is empty",
            "the model would learn to say nothing; drop the row or answer it",
            code="empty_answer",
        )


def _check_order(conversation: Conversation) -> None:
    if not any(turn.role == "assistant" for turn in conversation):
        found = ", ".join(turn.role for turn in conversation) or "no turn at all"
        raise RowFault(
            "turns", f"no assistant turn ({found})", "there is nothing to learn; add the answer", code="no_assistant"
        )
    before = ""
    for number, turn in enumerate(conversation, 1):
        if turn.role not in NEXT[before]:
            raise RowFault(
                f"turn {number} ({turn.role})", _misplaced(turn.role, before), _placed(turn.role), code="turn_order"
            )
        before = turn.role
    if before != "assistant":
        raise RowFault(
            f"turn {len(conversation)} ({before})", "nothing answers it", "drop it or add the answer", code="unanswered"
        )
    if not any(turn.role == "assistant" and turn.train for turn in conversation):
        raise RowFault(
            "turns",
            "no assistant turn is trained (all have weight 0)",
            "drop the row or a weight",
            code="nothing_trained",
        )


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
