"""Prompt and completion: ``{"prompt": "…", "completion": "…"}``, each a text or a list of messages.

Only the completion is trained: answers inside a prompt are context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune import messages
from finetune.conversation import Conversation, RowFault, Turn, as_context, shown, text_of

COLUMNS = "prompt and completion (and tools if wanted)"
_MEANING = {"prompt": "user turn", "completion": "assistant turn", "tools": "tools"}


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    fits = "prompt" in row and "completion" in row
    return {name: what for name, what in _MEANING.items() if name in row} if fits else {}


def read(row: Mapping[str, Any]) -> Conversation:
    for column in ("prompt", "completion"):
        if column not in row:
            found = ", ".join(map(shown, row)) or "none"
            fix = "for plain text set data.format: text" if "text" in row else "rename or add it"
            raise RowFault(column, f"is missing (found {found})", fix, code="missing_column")
    asked = _turns(row["prompt"], "prompt", "user")
    answer = _turns(row["completion"], "completion", "assistant")
    return Conversation((*as_context(asked), *answer), messages.tools_of(row))


def _turns(value: object, column: str, role: str) -> tuple[Turn, ...]:
    """A list of messages, or a text (also as a list of text parts) as one turn."""
    if isinstance(value, list) and any(isinstance(item, Mapping) and {"role", "from"} & set(item) for item in value):
        return messages.listed(value, column)
    return (Turn(role, text_of(value, column)),)
