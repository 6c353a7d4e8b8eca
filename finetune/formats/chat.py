"""OpenAI's chat shape: ``{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}``.

A content may be a list of text parts. ``weight: 0`` on an assistant message keeps it as context only, as OpenAI's
fine-tuning files do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.conversation import TOOL_CALLS, Conversation, RowFault, Turn, nearest, role_of, shown, text_of

COLUMNS = "messages"
# Keys that change what the model is to say. Reading past one would train on something other than the row.
UNREAD = ("reasoning_content", "reasoning", "thinking", "audio", "refusal")


def matches(row: Mapping[str, Any]) -> bool:
    return "messages" in row


def read(row: Mapping[str, Any]) -> Conversation:
    if "messages" not in row:
        raise RowFault(
            "messages", "is missing", f"found the columns {', '.join(map(shown, row)) or 'none'}", code="missing_column"
        )
    messages = row["messages"]
    if not isinstance(messages, list):
        raise RowFault(
            "messages", f"is {shown(messages)}, not a list", 'write [{"role": …, "content": …}, …]', code="wrong_type"
        )
    if not messages:
        raise RowFault("messages", "is empty", "drop the row", code="no_turns")
    if row.get("tools") or row.get("functions"):
        raise RowFault("tools", TOOL_CALLS, "drop the row", code="tool_calls")
    return tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(messages))


def _turn(message: object, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RowFault(
            place, f"is {shown(message)}, not a message", 'write {"role": …, "content": …}', code="wrong_type"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RowFault(f"{place}.{key}", TOOL_CALLS, "drop the row", code="tool_calls")
    for key in UNREAD:
        if message.get(key):
            raise RowFault(
                f"{place}.{key}", "is not read", "move the text into content, or remove the key", code="unread_column"
            )
    for key in ("role", "content"):
        if key not in message:
            found = ", ".join(map(shown, message)) or "no key"
            raise RowFault(
                f"{place}.{key}", f"is missing (found {found})", _renamed(key, message), code="missing_column"
            )
    role = role_of(message["role"], f"{place}.role")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowFault(f"{place}.weight", f"is {shown(weight)}", "use 0 (context only) or 1 (train)", code="bad_weight")
    return Turn(role, text_of(message["content"], f"{place}.content"), train=weight != 0)


def _renamed(key: str, message: Mapping[Any, Any]) -> str:
    """Which of the message's own keys looks like the missing one."""
    for found in message:
        if isinstance(found, str) and nearest(found, (key,)).startswith("did you mean"):
            return f"rename {found!r} to {key!r}"
    return f"add {key!r}"
