"""OpenAI's chat shape: ``{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}``.

A content may be a list of text parts. ``weight: 0`` (or ``train: false``) keeps an assistant message as context only;
another weight scales its tokens in the loss. ``tools`` describes the functions that ``tool_calls`` may name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune import messages
from finetune.conversation import Conversation

COLUMNS = "messages (and system, tools if wanted)"
_MEANING = {"messages": "turns", "system": "system turn", "tools": "tools", "functions": "tools"}


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: what for name, what in _MEANING.items() if name in row} if "messages" in row else {}


def read(row: Mapping[str, Any]) -> Conversation:
    return Conversation(messages.turns_of(row, "messages"), messages.tools_of(row))
