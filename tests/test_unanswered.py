from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune import unanswered
from finetune.dataset import Source
from finetune.errors import DataError
from finetune.renderer import Renderer
from tests import runs, tiny

ASKED = {"role": "user", "content": "Hi"}
SHARED = {"from": "human", "value": "Hi"}


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return tiny.load(tiny_base).renderer


def prompts(renderer: Renderer, folder: Path, *rows: dict[str, Any], **source: Any) -> list[str]:
    runs.write_rows(folder / "rows.jsonl", rows)
    place = Source(path=str(folder / "rows.jsonl"), **source)
    found = unanswered.prompts(place, renderer, room=source.pop("room", 100), column="answer")
    return [renderer.tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED]},
        {"messages": [ASKED, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [SHARED]},
        {"conversations": [SHARED, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi"},
        {"prompt": "Hi", "completion": ""},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [ASKED]},
        {"instruction": "Hi"},
        {"instruction": "Hi", "output": None},
        {"instruction": "Hi", "output": "Hello", "id": 7},
    ],
)
def test_with_or_without_its_answer_the_same_is_asked(renderer: Renderer, tmp_path: Path, row: dict[str, Any]) -> None:
    (expected,) = prompts(renderer, tmp_path, {"messages": [ASKED, {"role": "assistant", "content": "x"}]})
    assert prompts(renderer, tmp_path, row) == [expected]
    assert expected.endswith("assistant\n")


def test_columns_of_another_name(renderer: Renderer, tmp_path: Path) -> None:
    columns = {"prompt": "q", "completion": "a"}
    asked = prompts(renderer, tmp_path, {"q": "Hi", "a": "Hello"}, {"q": "Hi"}, columns=columns)
    assert asked[0] == asked[1]
    assert "Hello" not in asked[0]


def test_every_row_that_cannot_be_asked_is_named(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": 3}, {"prompt": "long " * 200}, {"prompt": "Hi", "answer": 1}, {"prompt": "<|im_end|>"}, {"x": 1}]
    with pytest.raises(DataError) as caught:
        prompts(renderer, tmp_path, {"prompt": "Hi"}, *rows)
    places = [fault.where.rpartition(":")[2] for fault in caught.value.faults]
    assert places == ["2", "3", "4", "5", "6"]
    with pytest.raises(DataError, match="plain text asks nothing"):
        prompts(renderer, tmp_path, {"text": "Once"})
