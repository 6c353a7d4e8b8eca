from __future__ import annotations

from typing import Any

import pytest

from finetune import formats
from finetune.conversation import RowFault
from finetune.formats import kto
from finetune.rowcheck import check

SHAPES: list[dict[str, Any]] = [
    {"prompt": "q", "completion": "r"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    {"instruction": "q", "output": "r"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: next(iter(shape)))
@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("label", [True, False])
def test_reads_a_judged_answer_in_every_shape(shape: dict[str, Any], name: str, label: bool) -> None:
    row = shape | {name: label}
    assert formats.detect(row) == "kto"
    found = kto.read(row)
    check(found)
    assert [(turn.role, turn.content) for turn in found.turns] == [("user", "q"), ("assistant", "r")]
    assert found.label is label
    assert found.ranked


def test_a_label_that_judges_nothing_is_another_column() -> None:
    assert formats.detect(SHAPES[1] | {"label": "spam"}) == "chat"


def test_only_the_last_answer_is_judged() -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    assert [turn.answers for turn in kto.read({"messages": messages, "label": True}).turns] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "completion": "r"}, "label: is missing"),
        ({"prompt": "q", "completion": "r", "label": "yes"}, "write true or false"),
        ({"label": True}, "prompt: is missing"),
    ],
)
def test_refuses(row: dict[str, Any], what: str) -> None:
    with pytest.raises(RowFault, match=what):
        kto.read(row)
