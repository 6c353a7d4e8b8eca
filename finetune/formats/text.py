"""Plain text: ``{"text": "…"}``. Every token of it is trained, outside any chat template, and the end after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.conversation import TEXT, Conversation, RowFault, Turn, shown, text_of

COLUMNS = "text"


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    return {"text": "plain text, all of it trained"} if "text" in row else {}


def read(row: Mapping[str, Any]) -> Conversation:
    if "text" not in row:
        found = ", ".join(map(shown, row)) or "none"
        raise RowFault("text", f"is missing (found {found})", "rename or add it", code="missing_column")
    return Conversation((Turn(TEXT, text_of(row["text"], "text")),))
