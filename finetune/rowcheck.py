"""What must hold of a conversation, or it would train something other than what its row means."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection

from finetune.conversation import (
    ROLES,
    TEXT,
    Conversation,
    RowFault,
    Turn,
    nearest,
    shown,
    strings,
    text_of,
    without_thinking,
)

# Which roles may come next. A tool's answer belongs to the assistant that asked, and the assistant goes on from it.
NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_BLANK = re.compile(r"[\s\u00ad\u115f\u1160\u200b-\u200f\u2060-\u2064\u3164\ufeff]*")
"""What shows nothing: white space, and characters without a shape."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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
        for text in strings(tool):
            _check_text(text, f"tools[{index}]", special_tokens, _NOWHERE)


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
        for text in (call.name, *strings(call.arguments)):
            _check_text(text, f"{place} tool call", everywhere, _NOWHERE)
    if turn.role == "assistant" and ("think>" in turn.content or "think>" in turn.thinking):
        _check_thinking(turn, place)
    if turn.role == "user" and is_blank(turn.content):
        fix = "the answer would be learned from nothing; add the question or drop the row"
        raise RowFault(place, "the question is empty", fix, code="empty_question")
    if turn.role in ("assistant", TEXT) and not turn.calls and is_blank(turn.content):
        fix = "the model would learn to say nothing; drop the row or answer it"
        raise RowFault(place, "the answer is empty", fix, code="empty_answer")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return _BLANK.fullmatch(text) is not None


def _check_thinking(turn: Turn, place: str) -> None:
    """Templates cut an answer at its tags of thinking: what stands before, between or after others would be lost."""
    rest = without_thinking(turn.content) + turn.thinking
    if "<think>" in rest or "</think>" in rest:
        fix = "write one <think>…</think> at the start of the answer, and no such tag elsewhere"
        raise RowFault(place, "has tags of thinking that are not one block at its start", fix, code="thinking")


_DECLARE = "it would act as a control token; remove it, or declare it in data.literal_tokens"
_NOWHERE = "it would act as a control token; remove it (tool calls and tools can hold none)"


def _check_text(text: str, place: str, special_tokens: Collection[str], fix: str = _DECLARE) -> None:
    if "\0" in text:
        what = f"has a NUL character at {text.index(chr(0))}"
        raise RowFault(place, what, "remove it; the file may be damaged", code="nul")
    if not text.isascii() and (found := LONE_SURROGATE.search(text)):
        what = f"has half a surrogate pair ({shown(found.group())}) at {found.start()}"
        raise RowFault(place, what, "it is no text; write the whole character", code="lone_surrogate")
    if special_tokens and (token := _find_any(text, tuple(special_tokens))):
        what = f"holds the special token {token.group()!r} as text at {token.start()}"
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


@functools.lru_cache(maxsize=1024)
def _in_order(roles: tuple[str, ...]) -> bool:
    """Whether these roles may follow each other so, up to an answer."""
    before = ("", *roles)
    return roles[-1:] == ("assistant",) and all(
        after in NEXT.get(role, ()) for role, after in zip(before, roles, strict=False)
    )


def _check_order(turns: tuple[Turn, ...]) -> None:
    if _in_order(tuple([turn.role for turn in turns])) and turns[-1].answers:
        return
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
