from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, Turn
from finetune.formats import sharegpt


def row(*pairs: tuple[Any, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]} | columns


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("user", "assistant")])
def test_reads_both_sets_of_names(asks: str, answers: str) -> None:
    expected = (Turn("user", "a"), Turn("assistant", "b"))
    assert sharegpt.read(row((asks, "a"), (answers, "b"))) == expected
    assert sharegpt.read(row((asks, "a"), (answers, "b"), system="s")) == (Turn("system", "s"), *expected)
    assert sharegpt.read(row((asks, "a"), (answers, "b"), system=None)) == expected


@pytest.mark.parametrize(
    ("bad", "column", "what"),
    [
        ({"conversation": []}, "conversations", "is missing"),
        ({"conversations": {}}, "conversations", "not a list"),
        ({"conversations": []}, "conversations", "is empty"),
        ({"conversations": [3]}, "conversations[0]", "not an item"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "conversations[0].from", "rename the column"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value", "add 'value'"),
        (row(("humann", "a")), "conversations[0].from", "did you mean 'human'"),
        (row(("gpt", None)), "conversations[0].value", "is null"),
        (row(("function_call", "{}")), "conversations[0].from", "tool calls are not trained yet"),
        (row(("gpt", "a"), tools="[{}]"), "tools", "tool calls are not trained yet"),
        (row(("gpt", "a"), system=4), "system", "int 4"),
    ],
)
def test_refuses(bad: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        sharegpt.read(bad)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix
