"""``finetune data check --fix``: what is certain is mended, the rest is left out by name, and the source stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune import datafix
from finetune.dataset import Reader, Source
from finetune.errors import EnvironmentFault
from tests.runs import chat, finetune, write_rows


def mend(source: Path, out: Path, **how: Any) -> dict[str, int]:
    return datafix.fix(Reader(Source(path=str(source), **how)), out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_repaired_copy_can_be_trained_and_each_change_is_logged(tmp_path: Path) -> None:
    good = chat("a", "b")
    misspelt = chat("c", "d")
    misspelt["messages"][0]["role"], misspelt["messages"][1]["role"] = "usr", "asistant"
    nul = chat("e\0f", "g")
    source, out = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    write_rows(source, [good, misspelt, nul, good, chat("no answer", " ")])
    source.write_text(source.read_text() + "{broken\n")
    before = source.read_bytes()
    said = finetune("data", "check", str(source), "--fix", str(out))
    assert said.code == 3  # what was judged is the source
    assert "1 rows kept, 2 rows mended, 3 rows left out" in said.out
    assert source.read_bytes() == before
    assert read(out) == [good, chat("c", "d"), chat("ef", "g")]
    assert finetune("data", "check", str(out)).code == 0
    told = [(entry["row"], entry["done"], entry["code"]) for entry in read(Path(f"{out}.log.jsonl"))]
    assert told == [
        (2, "mended", "unknown_role"), (2, "mended", "unknown_role"), (3, "mended", "nul"),
        (4, "left out", "duplicate"), (5, "left out", "empty_answer"), (6, "left out", "broken_json"),
    ]  # fmt: skip


def test_a_row_that_stays_faulty_is_logged_once_and_not_as_mended(tmp_path: Path) -> None:
    row = chat("a\0", " ")
    write_rows(tmp_path / "x.jsonl", [chat("a", "b"), row])
    mend(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    assert [(entry["done"], entry["code"]) for entry in read(tmp_path / "y.jsonl.log.jsonl")] == [
        ("left out", "empty_answer")
    ]


def test_other_layouts_keep_their_own(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 7}]
    write_rows(tmp_path / "x.jsonl", rows)
    mend(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    rows[0]["conversations"][0]["from"] = "human"  # type: ignore[index]
    assert read(tmp_path / "y.jsonl") == rows


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path) -> None:
    source, out = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    write_rows(source, [chat("a", "b")])
    for target in (source, tmp_path):
        with pytest.raises(EnvironmentFault, match="something is there already"):
            mend(source, target)
    assert finetune("data", "check", str(source), "--fix", str(tmp_path / "y.csv")).code == 3
    write_rows(source, [{"other": 1}])
    assert finetune("data", "check", str(source), "--fix", str(out)).code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_other_columns_keep_their_names(tmp_path: Path) -> None:
    rows = [{"dialog": chat("a", "b")["messages"], "id": 7}]
    rows[0]["dialog"][1]["role"] = "asistant"  # type: ignore[index]
    write_rows(tmp_path / "x.jsonl", rows)
    command = ["data", "check", str(tmp_path / "x.jsonl"), "--column", "messages=dialog"]
    assert finetune(*command, "--fix", str(tmp_path / "y.jsonl")).code == 3
    assert read(tmp_path / "y.jsonl") == [{"dialog": chat("a", "b")["messages"], "id": 7}]
    assert finetune("data", "check", str(tmp_path / "y.jsonl"), "--column", "messages=dialog").code == 0
    assert finetune("data", "check", str(tmp_path / "y.jsonl"), "--column", "messages").code == 2


def test_rows_that_say_the_same_are_one_whatever_else_they_hold(tmp_path: Path) -> None:
    """As the check counts them: a column that is not read makes no other row."""
    write_rows(tmp_path / "x.jsonl", [chat("a", "b") | {"id": 1}, chat("a", "b") | {"id": 2}])
    assert mend(tmp_path / "x.jsonl", tmp_path / "y.jsonl") == {"kept": 1, "mended": 0, "left out": 1}
