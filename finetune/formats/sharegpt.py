"""ShareGPT's shape: ``{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``.

``system`` may stand as a column of its own or as the first item. The first Qwen's own fine-tuning files have this
shape with the roles ``user`` and ``assistant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.conversation import TOOL_CALLS, Conversation, RowFault, Turn, role_of, shown, text_of

COLUMNS = "conversations (and system if wanted)"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def matches(row: Mapping[str, Any]) -> bool:
    return "conversations" in row


def read(row: Mapping[str, Any]) -> Conversation:
    if "conversations" not in row:
        raise RowFault(
            "conversations",
            "is missing",
            f"found the columns {', '.join(map(shown, row)) or 'none'}",
            code="missing_column",
        )
    items = row["conversations"]
    if not isinstance(items, list):
        raise RowFault(
            "conversations", f"is {shown(items)}, not a list", 'write [{"from": …, "value": …}, …]', code="wrong_type"
        )
    if not items:
        raise RowFault("conversations", "is empty", "drop the row", code="no_turns")
    if row.get("tools"):
        raise RowFault("tools", TOOL_CALLS, "drop the row", code="tool_calls")
    turns = tuple(_turn(item, f"conversations[{index}]") for index, item in enumerate(items))
    if row.get("system") is None or row["system"] == "":
        return turns
    return Turn("system", text_of(row["system"], "system")), *turns


def _turn(item: object, place: str) -> Turn:
    if not isinstance(item, Mapping):
        raise RowFault(place, f"is {shown(item)}, not an item", 'write {"from": …, "value": …}', code="wrong_type")
    for key in ("from", "value"):
        if key not in item:
            found = ", ".join(map(shown, item)) or "no key"
            fix = "rename the column to 'messages'" if "role" in item else f"add {key!r}"
            raise RowFault(f"{place}.{key}", f"is missing (found {found})", fix, code="missing_column")
    if item["from"] == "function_call":
        raise RowFault(f"{place}.from", TOOL_CALLS, "drop the row", code="tool_calls")
    return Turn(role_of(item["from"], f"{place}.from", ROLES), text_of(item["value"], f"{place}.value"))
