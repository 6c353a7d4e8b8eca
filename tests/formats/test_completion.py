from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, Turn
from finetune.formats import completion


def test_reads_prompt_and_completion() -> None:
    row = {"prompt": "a", "completion": "b", "id": 3}
    assert completion.read(row) == (Turn("user", "a"), Turn("assistant", "b"))


@pytest.mark.parametrize(
    ("row", "column", "what"),
    [
        ({"text": "a"}, "prompt", "does not say which part is the answer"),
        ({"prompt": "a", "answer": "b"}, "completion", "found 'prompt', 'answer'"),
        ({"prompt": "a", "completion": None}, "completion", "is null"),
        ({"prompt": 3, "completion": "b"}, "prompt", "int 3"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "prompt", "is a list of messages"),
    ],
)
def test_refuses(row: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        completion.read(row)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix
