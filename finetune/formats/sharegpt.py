"""ShareGPT's shape: ``{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``.

``system`` may stand as a column of its own or as the first item. ``function_call`` is an assistant's call as JSON text,
``observation`` what the tool answered, ``tools`` the functions there are. The first Qwen's own fine-tuning files have
this shape with the roles ``user`` and ``assistant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune import messages
from finetune.conversation import Conversation

COLUMNS = "conversations (and system, tools if wanted)"
_MEANING = {"conversations": "turns", "system": "system turn", "tools": "tools"}


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: what for name, what in _MEANING.items() if name in row} if "conversations" in row else {}


def read(row: Mapping[str, Any]) -> Conversation:
    return Conversation(messages.turns_of(row, "conversations"), messages.tools_of(row))
