from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, Turn
from finetune.formats import chat

ANSWER = {"role": "assistant", "content": "b"}


def read(*messages: Any, **columns: Any) -> tuple[Turn, ...]:
    return chat.read({"messages": list(messages)} | columns)


def test_reads_roles_text_parts_and_weights() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    conversation = read(
        {"role": "system", "content": "s", "name": None, "tool_calls": None},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "x", "weight": 0},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "y", "weight": 1},
        source="kept out",
    )
    assert conversation == (
        Turn("system", "s"),
        Turn("user", "ab"),
        Turn("assistant", "x", train=False),
        Turn("user", ""),
        Turn("assistant", "y"),
    )


@pytest.mark.parametrize(
    ("row", "column", "what"),
    [
        ({"message": []}, "messages", "is missing"),
        ({"messages": None}, "messages", "is None, not a list"),
        ({"messages": "[]"}, "messages", "not a list"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": ["hi"]}, "messages[0]", "not a message"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "user", "contnet": "a"}]}, "messages[0].content", "rename 'contnet' to 'content'"),
        ({"messages": [{"from": "user", "value": "a"}]}, "messages[0].role", "found 'from', 'value'"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role", "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "int 5"),
        ({"messages": [ANSWER | {"weight": 0.5}]}, "messages[0].weight", "is 0.5"),
        ({"messages": [ANSWER | {"weight": True}]}, "messages[0].weight", "is True"),
        ({"messages": [ANSWER | {"reasoning_content": "hm"}]}, "messages[0].reasoning_content", "is not read"),
        ({"messages": [ANSWER | {"content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls", "not trained yet"),
        ({"messages": [ANSWER | {"function_call": {"name": "f"}}]}, "messages[0].function_call", "not trained yet"),
        ({"messages": [ANSWER], "tools": [{}]}, "tools", "tool calls are not trained yet"),
    ],
)
def test_refuses(row: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        chat.read(row)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix


def test_matches_by_column_alone() -> None:
    assert chat.matches({"messages": None})
    assert not chat.matches({"conversations": []})
