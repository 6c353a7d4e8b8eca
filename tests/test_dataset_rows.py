"""Rows and files of data: what is read, and what becomes of a bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.conversation import Turn
from finetune.errors import DataError
from tests.runs import chat, read_rows, train, write_rows

GOOD = json.dumps(chat("a", "b"))


def _messages(*messages: Any) -> str:
    return json.dumps({"messages": messages})


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# The second row is bad in each; numbers are those of the catalogue in docs/reliability.md.
BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "34 broken JSON": ('{"messages": [}', "not valid JSON"),
    "35 truncated line": (GOOD[:-9], "not valid JSON"),
    "37 latin-1": (GOOD.replace('"b"', '"\xe9"').encode("latin-1"), "not UTF-8"),
    "40 empty messages": (_messages(), "messages: is empty"),
    "41 no assistant turn": (_messages(USER), "no assistant turn"),
    "42 role typo": (_messages(USER, {"role": "asistant", "content": "b"}), "unknown role 'asistant'"),
    "43 content null": (_messages(USER, {"role": "assistant", "content": None}), "is null"),
    "44 content a number": (_messages({"role": "user", "content": 5}, ANSWER), "is int 5, not a text"),
    "45 tool calls": (
        _messages(USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}),
        "not a call",
    ),
    "46 wrong column": ('{"txt": "a"}', "messages: is missing"),
    "47 empty answer": (_messages(USER, {"role": "assistant", "content": " "}), "the answer is empty"),
    "50 all masked": (_messages(USER, ANSWER | {"weight": 0}), "no assistant turn is trained"),
    "51 lone surrogate": (_messages(USER | {"content": "\ud83d"}, ANSWER), "half a surrogate pair"),
    "52 NUL": (_messages(USER | {"content": "\0"}, ANSWER), "NUL character"),
    "55 duplicate key": ('{"messages": [], "messages": []}', "key 'messages' occurs twice"),
    "55 duplicate key below": ('{"messages": [{"role": "user", "role": "x"}]}', "key 'role' occurs twice"),
    "57 user, user": (_messages(USER, USER, ANSWER), "two user turns running"),
    "57 ends with the user": (_messages(USER, ANSWER, USER), "nothing answers it"),
    "59 NaN": ('{"messages": NaN}', "NaN is not a JSON number"),
    "59 Infinity": ('{"messages": -Infinity}', "-Infinity is not a JSON number"),
    "59 1e400": (_messages(USER, ANSWER).replace('"b"', "1e400"), "is float inf, not a text"),
    "59 long number": (_messages(USER, ANSWER).replace('"b"', "9" * 5000), "not valid JSON"),
    "a list for a row": ("[1, 2]", "a row must be a JSON object, this one is list"),
    "a text for a row": ('"hello"', "a row must be a JSON object, this one is str"),
    "deep nesting": ("[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize(("row", "what"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(row: str | bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    data = row if isinstance(row, bytes) else row.encode()
    file.write_bytes(GOOD.encode() + b"\n" + data + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as caught:
        read_rows(file)
    (fault,) = caught.value.faults
    assert fault.where == f"{file}:2"
    assert what in fault.what
    assert fault.fix


def test_all_bad_rows_come_at_once_up_to_fifty(tmp_path: Path) -> None:
    bad = [row for row, _ in BAD_ROWS.values() if isinstance(row, str)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([GOOD, *bad[:20], GOOD]))
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert [fault.where for fault in caught.value.faults] == [f"{file}:{n}" for n in range(2, 22)]
    file.write_text("\n".join([GOOD, *["{"] * 70]))
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert len(caught.value.faults) == 51
    assert caught.value.faults[-1].what == "and 20 more rows like these"


UTF8 = GOOD.encode()
FILES: dict[str, tuple[str, bytes, str]] = {
    "36 UTF-8 BOM": ("x.jsonl", b"\xef\xbb\xbf" + UTF8, ""),
    "38 UTF-16": ("x.jsonl", GOOD.encode("utf-16"), "x.jsonl:1: not UTF-8"),
    "38 UTF-16 without BOM": ("x.jsonl", GOOD.encode("utf-16-le"), "x.jsonl:1: not valid JSON"),
    "39 empty": ("x.jsonl", b"", "there are no rows"),
    "39 blank lines only": ("x.jsonl", b"\n \n", "there are no rows"),
    "39 empty CSV": ("x.csv", b"", "there are no rows"),
    "58 mixed line endings": ("x.jsonl", UTF8 + b"\r\n" + UTF8 + b"\n\n" + UTF8, ""),
    "twice a column": ("x.csv", b"prompt,completion,completion\nq,one,two\n", "occurs twice"),
    "58 gzip called jsonl": ("x.jsonl", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "x.jsonl: this is a gzip file"),
    "58 parquet called jsonl": ("x.jsonl", b"PAR1\x15\x04\x15\x80", "x.jsonl:1: not"),
    "JSON array": ("x.json", b"[" + UTF8 + b",\n" + UTF8 + b"]", ""),
    "JSON array, broken": ("x.json", b"[" + UTF8 + b",\n" + UTF8, "x.json:1: not valid JSON"),
    "JSON array in jsonl": ("x.jsonl", b"[" + UTF8 + b"]", "this one is list"),
    "separators of Unicode in a text": ("x.jsonl", _messages(USER, ANSWER | {"content": "a\u2028b\x85c"}).encode(), ""),
    "CSV": ("x.csv", b'prompt,completion\na,"b, c"\n"d\ne",007\n', ""),
    "CSV with BOM": ("x.csv", b"\xef\xbb\xbfprompt,completion\na,null\n", ""),
    "CSV in latin-1": ("x.csv", "prompt,completion\na,é\n".encode("latin-1"), "x.csv:2: not UTF-8"),
    "CSV, too many cells": ("x.csv", b"prompt,completion\na,b\na,b,c\n", "x.csv:3: has more cells than the 2 columns"),
    "CSV, too few cells": ("x.csv", b"prompt,completion\na\n", "x.csv:2: has fewer cells than the 2 columns"),
    "CSV, open quote": ("x.csv", b'prompt,completion\na,"b\n', "not valid CSV"),
    "CSV, empty answer": ("x.csv", b"prompt,completion\na,\n", "x.csv:2: turn 2 (assistant): the answer is empty"),
    "parquet that is none": ("x.parquet", b"PAR1 no", "x.parquet: cannot be read"),
}


@pytest.mark.parametrize(("name", "data", "what"), FILES.values(), ids=FILES)
def test_a_file_is_read_or_named(name: str, data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    if not what:
        assert read_rows(tmp_path / name)
        return
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert what in str(caught.value.faults[0])
    assert str(tmp_path / name) in caught.value.faults[0].where


def test_csv_cells_stay_texts(tmp_path: Path) -> None:
    """A reader that guesses types makes 7 of "007" and nothing of "null"."""
    (tmp_path / "x.csv").write_text("prompt,completion\na,007\nb,null\nc,1.50\nd,True\n")
    assert [row.conversation.turns[1].content for row in read_rows(tmp_path / "x.csv")] == [
        "007", "null", "1.50", "True",
    ]  # fmt: skip


def test_parquet_is_read_and_its_rows_are_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "data [v1] *"  # no pattern for file names
    folder.mkdir()
    parquet.write_table(pyarrow.table({"messages": [chat("a", "b")["messages"]] * 2}), folder / "x.parquet")
    rows = read_rows(folder / "x.parquet")
    assert [row.where for row in rows] == [f"{folder}/x.parquet:1", f"{folder}/x.parquet:2"]
    assert rows[0].conversation.turns == (Turn("user", "a"), Turn("assistant", "b"))
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["x", None]}), folder / "y.parquet")
    with pytest.raises(DataError, match=r"y\.parquet:2: completion: is null"):
        read_rows(folder / "y.parquet")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "x.jsonl")


def test_the_format_of_the_first_row_holds_for_all(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, chat("a", "b")])
    with pytest.raises(DataError, match=r"x\.jsonl:2: prompt: is missing"):
        read_rows(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl:1: messages: is missing"):
        read_rows(tmp_path / "x.jsonl", "chat")


def test_faults_of_data_end_the_command_with_3(work: Path) -> None:
    Path("train.jsonl").write_text(GOOD + "\n{\n" + _messages(USER) + "\n")
    said = train()
    assert said.code == 3
    assert [line.split(": ")[:2] for line in said.err.splitlines()] == [["data", f"train.jsonl:{n}"] for n in (2, 3)]
    assert not Path("runs").exists()
