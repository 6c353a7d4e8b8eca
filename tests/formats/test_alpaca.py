from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import RowFault, Turn
from finetune.formats import alpaca


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"history": None, "system": None}])
def test_reads_instruction_and_output(empty: dict[str, Any]) -> None:
    row = {"instruction": "a", "output": "b"} | empty
    assert alpaca.read(row).turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_reads_input_system_and_history() -> None:
    row = {"system": "s", "history": [["q", "r"]], "instruction": "a", "input": "i", "output": "b"}
    assert alpaca.read(row).turns == (
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "r"),
        Turn("user", "a\n\ni"),
        Turn("assistant", "b"),
    )


@pytest.mark.parametrize(
    ("change", "column", "what"),
    [
        ({"output": None}, "output", "is null"),
        ({"instruction": 5}, "instruction", "int 5"),
        ({"input": 5}, "input", "int 5"),
        ({"history": "x"}, "history", "not a list"),
        ({"history": [["a"]]}, "history[0]", "not a pair"),
        ({"history": [["a", None]]}, "history[0][1]", "is null"),
    ],
)
def test_refuses(change: dict[str, Any], column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        alpaca.read({"instruction": "a", "output": "b"} | change)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RowFault, match="output: is missing"):
        alpaca.read({"instruction": "a"})
