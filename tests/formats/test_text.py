from __future__ import annotations

import pytest

from finetune.conversation import Conversation, RowFault, Turn
from finetune.formats import text
from finetune.rowcheck import check


def test_reads_one_turn_outside_any_template() -> None:
    found = text.read({"text": "a b", "id": 1})
    assert found == Conversation((Turn("text", "a b"),))
    check(found)


@pytest.mark.parametrize(("row", "what"), [({"txt": "a"}, "is missing"), ({"text": None}, "is null")])
def test_refuses(row: dict[str, str], what: str) -> None:
    with pytest.raises(RowFault, match=what):
        text.read(row)


def test_an_empty_text_teaches_nothing() -> None:
    with pytest.raises(RowFault, match="empty"):
        check(text.read({"text": " \n"}))
