"""Alpaca's shape: ``{"instruction": "…", "input": "…", "output": "…"}``; all but the first and last are optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune import messages
from finetune.conversation import Conversation, RowFault, Turn, shown, text_of

COLUMNS = "instruction and output (input, system, history if wanted)"
_MEANING = {
    "instruction": "user turn", "input": "user turn", "output": "assistant turn", "system": "system turn",
    "history": "earlier turns",
}  # fmt: skip


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    fits = "instruction" in row and "output" in row
    return {name: what for name, what in _MEANING.items() if name in row} if fits else {}


def read(row: Mapping[str, Any]) -> Conversation:
    question = messages.question_of(row)
    if "output" not in row:
        found = ", ".join(map(shown, row))
        raise RowFault("output", f"is missing (found {found})", "rename or add it", code="missing_column")
    return Conversation((*question, Turn("assistant", text_of(row["output"], "output"))))
