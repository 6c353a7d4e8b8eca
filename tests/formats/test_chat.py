from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import Conversation, RowFault, ToolCall, Turn
from finetune.formats import chat

ANSWER = {"role": "assistant", "content": "b"}
CALL = {"function": {"name": "f", "arguments": '{"x": 1}'}}


def read(*messages: Any, **columns: Any) -> Conversation:
    return chat.read({"messages": list(messages)} | columns)


def test_reads_roles_text_parts_and_weights() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    conversation = read(
        {"role": "developer", "content": "s", "name": None, "tool_calls": None},
        {"role": "user", "content": parts, "weight": 0},
        {"role": "assistant", "content": "x", "weight": 0},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "y", "weight": 0.5},
        {"role": "user", "content": "z", "train": False},
        {"role": "assistant", "content": "x", "train": False},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "y", "train": True},
        source="kept out",
    )
    assert [(turn.role, turn.content, turn.weight) for turn in conversation.turns] == [
        ("system", "s", 1.0), ("user", "ab", 1.0), ("assistant", "x", 0.0), ("user", "", 1.0), ("assistant", "y", 0.5),
        ("user", "z", 1.0), ("assistant", "x", 0.0), ("user", "", 1.0), ("assistant", "y", 1.0),
    ]  # fmt: skip


def test_reads_tool_calls_and_tools() -> None:
    described = {"name": "f", "parameters": {}}
    conversation = read(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "7"},
        ANSWER,
        tools=[described],
    )
    call = Turn("assistant", "", calls=(ToolCall("f", {"x": 1}),))
    assert conversation.turns[1:] == (call, Turn("tool", "1"), Turn("assistant", "b"))
    assert conversation.tools == ({"type": "function", "function": described},)
    again = read(tools='[{"type": "function", "function": {"name": "f", "parameters": {}}}]', *[ANSWER])  # noqa: B026
    assert again.tools == conversation.tools


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reads_thinking(key: str) -> None:
    assert read(ANSWER | {key: "hm"}).turns == (Turn("assistant", "b", thinking="hm"),)


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
        ({"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role", "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "int 5"),
        ({"messages": [ANSWER | {"weight": -1}]}, "messages[0].weight", "is -1"),
        ({"messages": [ANSWER | {"weight": 1e400}]}, "messages[0].weight", "is inf"),
        ({"messages": [ANSWER | {"weight": True}]}, "messages[0].weight", "is True"),
        ({"messages": [ANSWER | {"weight": 1e-300}]}, "messages[0].weight", "a number from 0.001"),
        ({"messages": [ANSWER | {"wieght": 0}]}, "messages[0].'wieght'", "did you mean 'weight'"),
        ({"messages": [ANSWER | {"Train": False}]}, "messages[0].'Train'", "did you mean 'train'"),
        ({"messages": [ANSWER | {"tool_call": [{"name": "f"}]}]}, "messages[0].'tool_call'", "'tool_calls'"),
        ({"messages": [ANSWER], "tools": [{"name": ""}]}, "tools[0]", "no name"),
        (
            {"messages": [ANSWER | {"function_call": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]},
            "messages[0].tool_calls[0].arguments", "occurs twice",
        ),
        (
            {"messages": [ANSWER | {"function_call": {"name": "f", "arguments": '{"a": NaN}'}}]},
            "messages[0].tool_calls[0].arguments", "NaN is not a JSON number",
        ),
        ({"messages": [ANSWER | {"train": 1}]}, "messages[0].train", "is 1"),
        ({"messages": [ANSWER | {"train": True, "weight": 0}]}, "messages[0].weight", "beside train: True"),
        ({"messages": [{"role": "user", "content": "a", "train": True}]}, "messages[0].train", "on a user turn"),
        ({"messages": [ANSWER | {"refusal": "no"}]}, "messages[0].refusal", "is not read"),
        ({"messages": [{"role": "user", "content": "a", "thinking": "x"}]}, "messages[0].thinking", "on a user turn"),
        ({"messages": [ANSWER | {"thinking": "x", "reasoning": "y"}]}, "messages[0].reasoning", "given twice"),
        ({"messages": [ANSWER | {"content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls[0]", "not a call"),
        ({"messages": [ANSWER | {"tool_calls": {}, "content": None}]}, "messages[0].content", "is null"),
        ({"messages": [ANSWER | {"tool_calls": "f"}]}, "messages[0].tool_calls", "not a list"),
        (
            {"messages": [ANSWER | {"function_call": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].arguments", "not valid JSON",
        ),
        (
            {"messages": [ANSWER | {"function_call": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].arguments", "not an object",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "on a user"),
        ({"messages": [ANSWER], "tools": [{}]}, "tools[0]", "no name"),
        ({"messages": [ANSWER], "tools": {"a": 1}}, "tools", "not a list"),
        ({"messages": [ANSWER], "tools": "[{"}, "tools", "not valid JSON"),
        ({"messages": [ANSWER], "system": 4}, "system", "int 4"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "system", "beside a system turn"),
    ],
)  # fmt: skip
def test_refuses(row: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        chat.read(row)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix


def test_says_what_it_reads() -> None:
    assert chat.columns({"messages": None, "tools": 1, "id": 3}) == {"messages": "turns", "tools": "tools"}
    assert chat.columns({"conversations": []}) == {}
