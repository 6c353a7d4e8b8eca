"""Preference pairs: a prompt with a ``chosen`` and a ``rejected`` ending.

Read are the layouts that TRL (prompt beside endings, or whole conversations that share their beginning), axolotl
(``messages`` or ``chosen_messages``), LLaMA-Factory (beside ``conversations`` or ``instruction``) and ms-swift
(``messages`` with the better ending, beside ``rejected_response`` or ``rejected_messages``) write. An ending is a text,
a message, or a list of messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune import messages
from finetune.conversation import Conversation, RowFault, Turn, as_context, shown, text_of

COLUMNS = "chosen and rejected (beside prompt, messages, conversations or instruction, or with the prompt in both)"
CHOSEN = ("chosen", "chosen_messages")
REJECTED = ("rejected", "rejected_messages", "rejected_response")
PROMPTS = ("prompt", "messages", "conversations", "instruction", "question")
_BESIDE = ("input", "history", "system", "tools")


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    chosen, rejected = _first(row, CHOSEN), _first(row, REJECTED)
    if _ends_in_messages(row):
        return {"messages": "prompt and the better ending", rejected: "the worse ending"}
    if not chosen or not rejected:
        return {}
    found = {chosen: "the better ending", rejected: "the worse ending"}
    if prompt := _first(row, PROMPTS):
        found[prompt] = "prompt"
    return found | {name: "prompt" for name in _BESIDE if name in row}


def read(row: Mapping[str, Any]) -> Conversation:
    asked: tuple[Turn, ...] = ()
    if _ends_in_messages(row):
        chosen, rejected = _both(row)
    else:
        chosen, rejected = _ending(row, CHOSEN), _ending(row, REJECTED)
        asked = _asked(row)
    whole = chosen[0].role in ("system", "user")
    if whole != (rejected[0].role in ("system", "user")):
        raise RowFault("rejected", "begins with another role than chosen", "write both alike", code="turn_order")
    if whole:
        common = _common(chosen, rejected)
        if asked and _bare(asked) not in (_bare(common), _bare(common[-len(asked) :]), _bare(chosen)):
            what = "is not what the chosen conversation begins with"
            raise RowFault(_first(row, PROMPTS), what, "drop it, or the prompt in chosen", code="prompt_differs")
        asked, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
        if not chosen or not rejected:
            what = "is the chosen conversation, or its beginning: there is nothing to prefer"
            raise RowFault("rejected", what, "drop the row", code="same_answers")
    if not asked:
        raise RowFault("prompt", "is missing", "add what was asked as 'prompt'", code="missing_column")
    context = as_context(asked)
    return Conversation((*context, *chosen), messages.tools_of(row), rejected=(*context, *rejected))


def _ends_in_messages(row: Mapping[str, Any]) -> bool:
    """ms-swift's layout: the better ending is the last message."""
    return not _first(row, CHOSEN) and "messages" in row and _first(row, REJECTED) in REJECTED[1:]


def _both(row: Mapping[str, Any]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """The better and the worse conversation, each whole."""
    better = messages.turns_of(row, "messages")
    if better[-1].role != "assistant":
        raise RowFault("messages", "do not end with an answer", "end them with the better one", code="turn_order")
    worse = _ending(row, REJECTED)
    return better, worse if worse[0].role in ("system", "user") else (*better[:-1], *worse)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), "")


def _ending(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Turn, ...]:
    name = _first(row, names)
    if not name:
        found = ", ".join(map(shown, row)) or "none"
        raise RowFault(names[0], f"is missing (found {found})", "rename or add it", code="missing_column")
    value = row[name]
    if isinstance(value, Mapping):
        return (messages.turn_of(value, name),)
    return messages.listed(value, name) if isinstance(value, list) else (Turn("assistant", text_of(value, name)),)


def _asked(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """What stands before both endings, from the column that has it."""
    name = _first(row, PROMPTS)
    if name == "instruction":
        return messages.question_of(row)
    if not name or row[name] is None:
        return ()
    if name in ("messages", "conversations") or isinstance(row[name], list):
        return messages.turns_of(row, name)
    system = (Turn("system", text_of(row["system"], "system")),) if row.get("system") else ()
    return *system, Turn("user", text_of(row[name], name))


def _common(one: tuple[Turn, ...], two: tuple[Turn, ...]) -> tuple[Turn, ...]:
    length = 0
    while length < min(len(one), len(two)) and one[length] == two[length]:
        length += 1
    return one[:length]


def _bare(turns: tuple[Turn, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]
