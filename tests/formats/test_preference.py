"""Pairs in every layout that trainers write mean the same: one prompt, two endings."""

from __future__ import annotations

from typing import Any

import pytest

from finetune import formats
from finetune.conversation import RowFault
from finetune.formats import preference
from finetune.rowcheck import check


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


Q, GOOD, BAD = said("user", "q"), said("assistant", "good"), said("assistant", "bad")
LAYOUTS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "TRL, messages": {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, prompt in both": {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
    "prompt beside whole conversations": {"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD], "score": 3},
    "chosen conversation again as messages": {"messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
    "axolotl": {"messages": [Q], "chosen": GOOD, "rejected": BAD},
    "axolotl, names": {"messages": [Q], "chosen_messages": [GOOD], "rejected_messages": [BAD]},
    "ms-swift": {"messages": [Q, GOOD], "rejected_response": "bad"},
    "ms-swift, conversations": {"messages": [Q, GOOD], "rejected_messages": [Q, BAD]},
    "LLaMA-Factory, sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory, alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "question": {"question": "q", "chosen": "good", "rejected": "bad"},
}  # fmt: skip


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_recognised_and_means_the_same(row: dict[str, Any]) -> None:
    assert formats.detect(row) == "preference"
    found = preference.read(row)
    check(found)
    assert [(turn.role, turn.content, turn.answers) for turn in found.turns] == [
        ("user", "q", False), ("assistant", "good", True),
    ]  # fmt: skip
    assert [turn.content for turn in found.rejected] == ["q", "bad"]
    assert found.ranked


def test_earlier_answers_are_context_and_system_and_tools_are_read() -> None:
    asked = [Q, said("assistant", "and?"), said("user", "r")]
    row = {"system": "s", "tools": [{"name": "f"}], "messages": asked, "chosen": "good", "rejected": "bad"}
    found = preference.read(row)
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.answers for turn in found.turns] == [False] * 4 + [True]
    assert found.tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "chosen": "good"}, "rejected: is missing"),
        ({"chosen": "good", "rejected": "bad"}, "prompt: is missing"),
        ({"prompt": "q", "chosen": "good", "rejected": None}, "rejected: is null"),
        ({"prompt": "other", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "is not what the chosen conversation begins"),
        ({"chosen": [Q, GOOD], "rejected": [BAD]}, "begins with another role"),
        ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "nothing to prefer"),
        ({"prompt": "q", "chosen": "good", "rejected": "good"}, "nothing to prefer"),
        ({"prompt": "q", "chosen": [GOOD, Q], "rejected": "bad"}, "nothing answers it"),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, "rejected turn 2 .assistant.: the answer is empty"),
    ],
)
def test_refuses(row: dict[str, Any], what: str) -> None:
    with pytest.raises(RowFault, match=what):
        check(preference.read(row))
