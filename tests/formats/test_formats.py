from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune import formats, recipe
from finetune.conversation import RowFault
from finetune.errors import DataError
from finetune.rowcheck import check

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_a_format_with_a_sample() -> None:
    here = {path.stem for path in (ROOT / "finetune/formats").glob("*.py")} - {"__init__"}
    assert set(formats.names()) == here >= {"chat", "preference", "kto", "text"}
    assert here == {path.stem for path in (ROOT / "data/samples").glob("*.jsonl")}


@pytest.mark.parametrize("name", formats.names())
def test_samples_are_detected_and_read(name: str, samples: Path) -> None:
    rows = [json.loads(line) for line in (samples / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 3 <= len(rows) <= 5
    for row in rows:
        assert formats.detect(row) == name
        check(formats.get(name).read(row), ["<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("name", ["", "chatt", "__init__", "../chat", "os", "chat.read"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="unknown data format") as caught:
        formats.get(name)
    assert caught.value.exit_code == 3


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        formats.get("alpacca")


@pytest.mark.parametrize("row", [{}, {"txt": "a"}, {"mesages": []}, {"prompt": "a", "output": "b"}])
def test_columns_of_no_format_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(RowFault, match="no format has these columns") as caught:
        formats.detect(row)
    assert all(repr(column) in str(caught.value) for column in row)
    assert "chat: messages" in str(caught.value)


def test_columns_of_two_formats_are_not_guessed() -> None:
    with pytest.raises(RowFault, match=r"several formats \(chat, text\)"):
        formats.detect({"messages": [], "text": "a"})


def test_the_format_that_reads_most_columns_is_meant() -> None:
    row = {"prompt": "a", "completion": "b", "text": "a b"}
    assert formats.detect(row) == "completion"
    said = formats.mapping("completion", row)
    assert said == "completion: 'prompt' → user turn, 'completion' → assistant turn; not read: 'text'"


@pytest.mark.parametrize("name", formats.names())
def test_no_row_ends_in_another_error(name: str) -> None:
    """Whatever JSON stands under the right and wrong columns, only RowFault comes out."""
    columns = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system"]
    columns += ["history", "tools", "chosen", "rejected", "label", "text", "question"]
    junk: list[Any] = [None, True, 0, 1.5, "", "x", [], [None], [[]], [{}], {}, [{"role": 1}], [{"from": []}]]
    odd: list[Any] = [None, 3, [1], {}]
    junk += [[{"role": "user", "content": value}] for value in [*odd, [{"type": "text"}]]]
    junk += [[{"from": "gpt", "value": value}] for value in odd] + [[["a"]], [["a", None]]]
    reader = formats.get(name)
    good = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o", "chosen": "a", "rejected": "b"}
    good |= {"label": True, "text": "t"}
    for column in columns:
        for value in junk:
            for row in ({column: value}, good | {column: value}):
                try:
                    reader.read(row)
                except RowFault as fault:
                    assert fault.what  # noqa: PT017 - any other exception fails the test


def test_a_recipe_may_name_every_format_there_is() -> None:
    data = recipe.schema()["properties"]["data"]["properties"]
    for place in (data, data["sources"]["items"]["properties"]):
        assert set(place["format"]["enum"]) == {"auto", *formats.names()}
