from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, ToolCall, Turn
from finetune.formats import sharegpt


def row(*pairs: tuple[Any, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]} | columns


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("user", "assistant")])
def test_reads_both_sets_of_names(asks: str, answers: str) -> None:
    expected = (Turn("user", "a"), Turn("assistant", "b"))
    assert sharegpt.read(row((asks, "a"), (answers, "b"))).turns == expected
    assert sharegpt.read(row((asks, "a"), (answers, "b"), system="s")).turns == (Turn("system", "s"), *expected)
    assert sharegpt.read(row((asks, "a"), (answers, "b"), system=None)).turns == expected


def test_reads_messages_with_role_and_content_too() -> None:
    found = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert sharegpt.read(found).turns == (Turn("user", "a"), Turn("assistant", "b"))


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', (ToolCall("f", {"x": 1}),)),
        ('[{"name": "f", "arguments": {}}, {"name": "g"}]', (ToolCall("f", {}), ToolCall("g", {}))),
    ],
)
def test_reads_calls_and_what_the_tool_answered(written: str, calls: tuple[ToolCall, ...]) -> None:
    found = sharegpt.read(row(("human", "a"), ("function_call", written), ("observation", "1"), ("gpt", "b")))
    assert found.turns[1:3] == (Turn("assistant", "", calls=calls), Turn("tool", "1"))


@pytest.mark.parametrize(
    ("bad", "column", "what"),
    [
        ({"conversation": []}, "conversations", "is missing"),
        ({"conversations": {}}, "conversations", "not a list"),
        ({"conversations": []}, "conversations", "is empty"),
        ({"conversations": [3]}, "conversations[0]", "not a message"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value", "add 'value'"),
        (row(("humann", "a")), "conversations[0].from", "did you mean 'human'"),
        (row(("gpt", None)), "conversations[0].value", "is null"),
        (row(("function_call", "weather")), "conversations[0].value", "not valid JSON"),
        (row(("function_call", "[]")), "conversations[0].value", "calls nothing"),
        (row(("gpt", "a"), tools="[{}]"), "tools[0]", "no name"),
        (row(("gpt", "a"), system=4), "system", "int 4"),
    ],
)
def test_refuses(bad: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        sharegpt.read(bad)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix
