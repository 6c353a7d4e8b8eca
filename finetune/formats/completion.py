"""A prompt and its completion: ``{"prompt": "…", "completion": "…"}``, read as one user turn and one answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.conversation import Conversation, RowFault, Turn, shown, text_of

COLUMNS = "prompt and completion"


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def read(row: Mapping[str, Any]) -> Conversation:
    for column in ("prompt", "completion"):
        if column not in row:
            found = ", ".join(map(shown, row)) or "none"
            fix = "plain text does not say which part is the answer; split it into prompt and completion"
            raise RowFault(
                column,
                f"is missing (found {found})",
                fix if "text" in row else "rename or add it",
                code="missing_column",
            )
        if isinstance(row[column], list) and any(isinstance(item, Mapping) and "role" in item for item in row[column]):
            raise RowFault(
                column,
                "is a list of messages",
                "join prompt and completion into one 'messages' column",
                code="wrong_type",
            )
    return Turn("user", text_of(row["prompt"], "prompt")), Turn("assistant", text_of(row["completion"], "completion"))
