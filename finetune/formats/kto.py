"""KTO's shape: a conversation and whether its ending is wanted, as ``label`` (TRL) or ``kto_tag`` (LLaMA-Factory).

The conversation stands as prompt and completion, messages, conversations, or instruction and output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.conversation import Conversation, RowFault, as_context, shown
from finetune.formats import alpaca, chat, completion, sharegpt

COLUMNS = "label (true or false) beside prompt and completion, messages, conversations, or instruction and output"
LABELS = ("label", "kto_tag")


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    label = next((name for name in LABELS if isinstance(row.get(name), bool)), None)
    if label is None:
        return {}
    found = max((shape.columns(row) for shape in (completion, chat, sharegpt, alpaca)), key=len)
    return {**found, label: "whether the answer is wanted"} if found else {}


def read(row: Mapping[str, Any]) -> Conversation:
    label = next((name for name in LABELS if name in row), None)
    if label is None:
        found = ", ".join(map(shown, row)) or "none"
        raise RowFault("label", f"is missing (found {found})", "add true or false", code="missing_column")
    if not isinstance(row[label], bool):
        raise RowFault(label, f"is {shown(row[label])}", "write true or false", code="wrong_type")
    shape = max((completion, chat, sharegpt, alpaca), key=lambda one: len(one.columns(row)))
    made: Conversation = shape.read(row)
    last = max((i for i, turn in enumerate(made.turns) if turn.role == "assistant"), default=0)
    return replace(made, turns=(*as_context(made.turns[:last]), *made.turns[last:]), label=row[label])
