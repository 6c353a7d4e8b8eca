from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, Turn
from finetune.formats import completion


def test_reads_prompt_and_completion() -> None:
    row = {"prompt": "a", "completion": "b", "id": 3}
    assert completion.read(row).turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_reads_lists_of_messages_and_trains_the_completion_alone() -> None:
    asked = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = {"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]}
    found = completion.read(row).turns
    assert [turn.content for turn in found] == ["a", "b", "c", "d"]
    assert [turn.answers for turn in found] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "column", "what"),
    [
        ({"text": "a"}, "prompt", "set data.format: text"),
        ({"prompt": "a", "answer": "b"}, "completion", "found 'prompt', 'answer'"),
        ({"prompt": "a", "completion": None}, "completion", "is null"),
        ({"prompt": 3, "completion": "b"}, "prompt", "int 3"),
        ({"prompt": [{"role": "usr", "content": "a"}], "completion": "b"}, "prompt[0].role", "did you mean 'user'"),
    ],
)
def test_refuses(row: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        completion.read(row)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix
