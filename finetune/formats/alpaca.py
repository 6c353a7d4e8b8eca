"""Alpaca's shape: ``{"instruction": "…", "input": "…", "output": "…"}``; ``input``, ``system``, ``history`` optional.

The input follows the instruction after an empty line. The frame that the first Alpaca put around both ("Below is an
instruction …") is left out: a chat model has its template. ``history`` is a list of earlier [question, answer] pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.conversation import Conversation, RowFault, Turn, shown, text_of

COLUMNS = "instruction and output (input, system, history if wanted)"


def matches(row: Mapping[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def read(row: Mapping[str, Any]) -> Conversation:
    for column in ("instruction", "output"):
        if column not in row:
            found = ", ".join(map(shown, row)) or "none"
            raise RowFault(column, f"is missing (found {found})", "rename or add it", code="missing_column")
    turns = []
    if system := _optional(row, "system"):
        turns.append(Turn("system", system))
    turns.extend(_history(row.get("history")))
    question = text_of(row["instruction"], "instruction")
    if given := _optional(row, "input"):
        question = f"{question}\n\n{given}"
    return (*turns, Turn("user", question), Turn("assistant", text_of(row["output"], "output")))


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
            raise RowFault(
                f"history[{index}]", f"is {shown(pair)}, not a pair", "write [question, answer]", code="wrong_type"
            )
        turns.append(Turn("user", text_of(pair[0], f"history[{index}][0]")))
        turns.append(Turn("assistant", text_of(pair[1], f"history[{index}][1]")))
    return turns
