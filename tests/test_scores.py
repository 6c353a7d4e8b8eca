"""scores.json and samples.jsonl: numbers under a name, each row's answers side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import scores
from finetune.dataset import Example, Question
from finetune.evaluate import HeldOut, Judged
from finetune.runfolder import RunFolder
from tests.runs import OUTPUT, finetune

HELD = HeldOut(
    examples=(),
    questions=tuple(Question(prompt=(1,), answer=f"a{n}", where=f"e:{n}", content=f"c{n}") for n in range(2)),
)


def _judged(*answers: str) -> Judged:
    return Judged(scores={"exact_match": 0.5, "confidence_interval": [0.1, 0.9], "rows": 2}, answers=list(answers))


def test_answers_stand_beside_each_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    scores.record(folder, "before", _judged("x", "\u202ey"), HELD)
    stored = scores.record(folder, "after", _judged("a0", "z"), HELD)
    assert list(stored) == ["before", "after"]
    assert json.loads(folder.scores.read_text()) == stored
    assert [json.loads(line) for line in folder.samples.read_text().splitlines()] == [
        {"row": "e:0", "content": "c0", "expected": "a0", "before": "x", "after": "a0"},
        {"row": "e:1", "content": "c1", "expected": "a1", "before": "\u202ey", "after": "z"},
    ]
    scores.record(folder, "loss", Judged(scores={"loss": 1.25, "rows": 2}, answers=[]), HELD)
    assert len(folder.samples.read_text().splitlines()) == 2


def test_answers_to_other_rows_are_not_mixed_in(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    scores.record(folder, "before", _judged("x", "y"), HELD)
    other = HeldOut(examples=(), questions=tuple(Question(prompt=(1,), answer="b", where=f"o:{n}") for n in range(2)))
    scores.record(folder, "after", _judged("p", "q"), other)
    assert [json.loads(line) for line in folder.samples.read_text().splitlines()] == [
        {"row": f"o:{n}", "content": "", "expected": "b", "after": answer} for n, answer in enumerate("pq")
    ]


def test_the_loss_of_each_row_is_kept_with_what_it_is_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    samples = [Example(ids=(1, 2, last), weights=(0.0, weight, 1.0), where=f"e:{last}") for last, weight in
               ((3, 1.0), (4, 1.0), (3, 0.5))]  # fmt: skip
    held = HeldOut(examples=tuple(samples), questions=())
    for name, losses in (("before", [3.0, 4.0, 5.0]), ("after", [1.0, 2.0, 0.5])):
        scores.record(folder, name, Judged(scores={"loss": 1.0}, answers=[], losses=losses), held)
    rows = [json.loads(line) for line in folder.losses.read_text().splitlines()]
    assert [(row["row"], row["weight"], row["before"], row["after"]) for row in rows] == [
        ("e:3", 2.0, 3.0, 1.0), ("e:4", 2.0, 4.0, 2.0), ("e:3", 1.5, 5.0, 0.5),
    ]  # fmt: skip
    assert len({row["content"] for row in rows}) == 3
    assert not folder.samples.exists()


def test_the_table_shows_what_is_there() -> None:
    lines = scores.table({"before": {"loss": 2.0, "rows": 3}, "after": _judged().scores})
    assert lines[1].split() == ["before", "-", "-", "2.0000", "3"]
    assert lines[2].split() == ["after", "0.500", "0.100", "–", "0.900", "-", "2"]


@pytest.mark.parametrize("name", ["samples.jsonl", "losses.jsonl"])
@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"[1]"])
def test_a_damaged_line_is_told_by_its_number(finished: Path, name: str, damage: bytes) -> None:
    path = OUTPUT / name
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + damage + b"\n" + rest)
    said = finetune("merge", str(OUTPUT), "--out", "merged")
    assert (said.code, f"{path}:2" in said.err, "damaged" in said.err) == (5, True, True), said.err
    assert path.read_bytes().startswith(first + b"\n" + damage)


def test_signs_that_part_lines_elsewhere_stay_within_a_row(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for Python's splitlines, not in JSON lines."""
    path = tmp_path / "samples.jsonl"
    path.write_text('{"row": "a\u2028b"}\n{"row": "c\u0085"}\n', encoding="utf-8")
    assert [row["row"] for row in scores._stored(path)] == ["a\u2028b", "c\u0085"]
