"""Lists of messages, as the field writes them, → turns: the one reader that every chat-like format shares.

A message is ``{"role", "content"}`` (OpenAI) or ``{"from", "value"}`` (ShareGPT), whatever column it stands in. Keys
that would change what is trained are read or refused, never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.conversation import RowFault, ToolCall, Turn, nearest, role_of, shown, text_of

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
CALL = "function_call"
THINKING = ("reasoning_content", "reasoning", "thinking")
UNREAD = ("audio", "refusal")
"""Keys that change what the model is to say. Reading past one would train on something other than the row."""
KNOWN = {
    "role", "content", "from", "value", "weight", "train", "tool_calls", "function_call", *THINKING, *UNREAD,
}  # fmt: skip
"""Keys that mean something here; another that looks like one of them is a slip that would change what is trained."""
_HARMLESS = {"tool_call_id", "name", "id", "context"}
"""… but for these, which others write beside them."""
_LEAST_WEIGHT, _MOST_WEIGHT = 0.001, 100.0


def turns_of(row: Mapping[str, Any], column: str) -> tuple[Turn, ...]:
    """The turns of a column that holds a list of messages, a ``system`` column before them. Raises RowFault."""
    if column not in row:
        found = f"found the columns {', '.join(map(shown, row)) or 'none'}"
        raise RowFault(column, "is missing", found, code="missing_column")
    turns = listed(row[column], column)
    if row.get("system") in (None, ""):
        return turns
    if turns[0].role == "system":
        raise RowFault("system", "stands beside a system turn", "keep one of the two", code="turn_order")
    return Turn("system", text_of(row["system"], "system")), *turns


def listed(messages: object, column: str) -> tuple[Turn, ...]:
    """A list of messages as turns; in a CSV cell it is JSON text. Raises RowFault."""
    if isinstance(messages, str) and messages.lstrip().startswith("[{"):
        messages = _json(messages, column, "broken_json")
    if not isinstance(messages, list):
        fix = 'write [{"role": …, "content": …}, …]'
        raise RowFault(column, f"is {shown(messages)}, not a list", fix, code="wrong_type")
    if not messages:
        raise RowFault(column, "is empty", "drop the row", code="no_turns")
    return tuple(turn_of(message, f"{column}[{index}]") for index, message in enumerate(messages))


def turn_of(message: object, place: str) -> Turn:
    """One message as a turn. Raises RowFault."""
    if type(message) is dict and len(message) == 2:  # as nearly all are: a role, a text, and nothing to judge
        word, content = message.get("role"), message.get("content")
        if type(word) is str and type(content) is str and word in ROLES and word != CALL:
            return Turn(ROLES[word], content)
    if not isinstance(message, Mapping):
        fix = 'write {"role": …, "content": …}'
        raise RowFault(place, f"is {shown(message)}, not a message", fix, code="wrong_type")
    names = ("from", "value") if "from" in message or "value" in message else ("role", "content")
    calls = _calls(message, place)
    for key in names:
        if key not in message and not (key == "content" and calls):
            found = ", ".join(map(shown, message)) or "no key"
            what = f"is missing (found {found})"
            raise RowFault(f"{place}.{key}", what, _renamed(key, message), code="missing_column")
    _refuse_slips(message, place)
    word, content = message[names[0]], message.get(names[1])
    role = role_of(word, f"{place}.{names[0]}", ROLES)
    if word == CALL:
        calls, content = _written_calls(content, f"{place}.{names[1]}"), ""
    if calls and role != "assistant":
        raise RowFault(f"{place}.tool_calls", f"on a {role} turn", "only the assistant calls tools", code="tool_calls")
    text = "" if content is None and calls else text_of(content, f"{place}.{names[1]}")
    return Turn(role, text, _weight(message, role, place), _thinking(message, role, text, place), calls)


def _refuse_slips(message: Mapping[Any, Any], place: str) -> None:
    for key in message.keys() - KNOWN - _HARMLESS:
        if isinstance(key, str) and (advice := nearest(key, KNOWN)).startswith("did you mean"):
            raise RowFault(f"{place}.{shown(key)}", "is not read", advice, code="unread_column")


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The row's ``tools``: a list of descriptions, or that list as JSON text. Raises RowFault."""
    value = row.get("tools") or row.get("functions")
    if isinstance(value, str):
        value = _json(value, "tools", "tools")
    if not value:
        return ()
    if not isinstance(value, list):
        raise RowFault("tools", f"is {shown(value)}, not a list", "write a list of descriptions", code="tools")
    found = []
    for index, tool in enumerate(value):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            fix = 'write {"type": "function", "function": {"name": …, "parameters": …}}'
            raise RowFault(f"tools[{index}]", f"is {shown(tool)}: no name", fix, code="tools")
        found.append({"type": "function", "function": inner})
    return tuple(found)


def question_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Alpaca's question: ``instruction`` and ``input`` with an empty line between them, after ``system``, ``history``.

    The frame that the first Alpaca put around both is left out: a chat model has its template. ``history`` is a list of
    earlier [question, answer] pairs.
    """
    if "instruction" not in row:
        found = ", ".join(map(shown, row)) or "none"
        raise RowFault("instruction", f"is missing (found {found})", "rename or add it", code="missing_column")
    turns = []
    if system := _optional(row, "system"):
        turns.append(Turn("system", system))
    turns.extend(_history(row.get("history")))
    question = text_of(row["instruction"], "instruction")
    if given := _optional(row, "input"):
        question = f"{question}\n\n{given}"
    return *turns, Turn("user", question)


def _optional(row: Mapping[str, Any], column: str) -> str:
    """The text of a column that may be absent or null."""
    return "" if row.get(column) is None else text_of(row[column], column)


def _history(pairs: object) -> list[Turn]:
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        raise RowFault("history", f"is {shown(pairs)}, not a list", "write [[question, answer], …]", code="wrong_type")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"is {shown(pair)}, not a pair"
            raise RowFault(f"history[{index}]", what, "write [question, answer]", code="wrong_type")
        turns.append(Turn("user", text_of(pair[0], f"history[{index}][0]")))
        turns.append(Turn("assistant", text_of(pair[1], f"history[{index}][1]")))
    return turns


def _weight(message: Mapping[Any, Any], role: str, place: str) -> float:
    """``weight`` (a number) and ``train`` (true or false): how much the turn counts in the loss."""
    weight, train = message.get("weight"), message.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowFault(f"{place}.train", f"is {shown(train)}", "use true or false", code="bad_weight")
    if weight is not None:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST_WEIGHT):
            fix = f"use 0 (context only), 1 (train), or a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
            raise RowFault(f"{place}.weight", f"is {shown(weight)}", fix, code="bad_weight")
        if train is not None and train != (weight > 0):
            raise RowFault(
                f"{place}.weight", f"is {shown(weight)} beside train: {train}", "keep one", code="bad_weight"
            )
    if role != "assistant":
        if train or weight:
            key = "train" if train else "weight"
            fix = "only assistant turns are trained; remove it, or set data.train_on"
            raise RowFault(f"{place}.{key}", f"on a {role} turn", fix, code="bad_weight")
        return 1.0
    return float(weight) if weight is not None else 0.0 if train is False else 1.0


def _thinking(message: Mapping[Any, Any], role: str, content: str, place: str) -> str:
    for key in UNREAD:
        if message.get(key):
            fix = "move the text into content, or remove the key"
            raise RowFault(f"{place}.{key}", "is not read", fix, code="unread_column")
    given = [key for key in THINKING if message.get(key)]
    if not given:
        return ""
    where = f"{place}.{given[0]}"
    if role != "assistant" or len(given) > 1 or "<think>" in content:
        why = f"on a {role} turn" if role != "assistant" else "the turn's thinking is given twice"
        raise RowFault(where, why, "keep the assistant's thinking in one place", code="unread_column")
    return text_of(message[given[0]], where)


def _calls(message: Mapping[Any, Any], place: str) -> tuple[ToolCall, ...]:
    """OpenAI's ``tool_calls``, or the ``function_call`` that came before them."""
    given = message.get("tool_calls") or ([message[CALL]] if message.get(CALL) else [])
    if not isinstance(given, list):
        fix = 'write [{"function": {"name": …, "arguments": …}}]'
        raise RowFault(f"{place}.tool_calls", f"is {shown(given)}, not a list", fix, code="tool_calls")
    return tuple(_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(given))


def _written_calls(value: object, place: str) -> tuple[ToolCall, ...]:
    """ShareGPT's ``function_call``: the call, or a list of calls, as JSON text."""
    found = _json(value, place) if isinstance(value, str) else value
    calls = tuple(_call(call, place) for call in (found if isinstance(found, list) else [found]))
    if not calls:
        raise RowFault(place, "calls nothing", "name the function", code="tool_calls")
    return calls


def _call(call: object, place: str) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        fix = 'write {"name": …, "arguments": {…}}'
        raise RowFault(place, f"is {shown(call)}, not a call", fix, code="tool_calls")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as JSON text; a template writes JSON itself
        arguments = _json(arguments or "{}", f"{place}.arguments")
    if not isinstance(arguments, Mapping):
        what = f"is {shown(arguments)}, not an object"
        raise RowFault(f"{place}.arguments", what, "write them by name", code="tool_calls")
    return ToolCall(inner["name"], arguments)


def _json(text: str, place: str, code: str = "tool_calls") -> Any:
    """JSON inside a text, as strictly as a row's own. Raises RowFault."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RowFault(place, f"is not valid JSON: {error}", "mend it", code=code) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _renamed(key: str, message: Mapping[Any, Any]) -> str:
    """Which of the message's own keys looks like the missing one."""
    for found in message:
        if isinstance(found, str) and nearest(found, (key,)).startswith("did you mean"):
            return f"rename {found!r} to {key!r}"
    return f"add {key!r}"
