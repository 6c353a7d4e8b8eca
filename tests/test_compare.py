"""Runs side by side: what differs, what is the same, and whether one is better, on runs that were really trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import compare
from tests.runs import OUTPUT, Said, chat, finetune, train, write_rows

OTHER = Path("runs/two")


@pytest.fixture
def two(finished: Path) -> Path:
    """A finished run and a copy of it under another name."""
    shutil.copytree(OUTPUT, OTHER)
    return finished


def rewrite(path: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    write_rows(path, rows)


def rows_of(folder: Path, right: list[bool], losses: list[float], first: int = 0) -> None:
    """Give a run judged rows of its own: content ``c<number>``, 2 tokens each."""
    write_rows(folder / "samples.jsonl", [
        {"row": f"e:{n}", "content": f"c{n}", "expected": "yes", "after": "yes" if one else "no"}
        for n, one in enumerate(right, first)
    ])  # fmt: skip
    write_rows(folder / "losses.jsonl", [
        {"row": f"e:{n}", "content": f"t{n}", "weight": 2.0, "after": one} for n, one in enumerate(losses, first)
    ])  # fmt: skip


def compared(*folders: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(*folders, "--json", "--quiet").out)
    return found


def said(*words: Path | str) -> Said:
    found = finetune("compare", *map(str, words))
    assert (found.code, found.err) == (0, "")
    return found


def test_another_recipe_on_the_same_rows(finished: Path) -> None:
    assert train("output=runs/two", "train.learning_rate=0.05", "adapter.r=2").code == 0
    found = compared(OUTPUT, OTHER)
    assert found["recipe"] == {
        "adapter.r": {"one": 4, "two": 2}, "train.learning_rate": {"one": 0.005, "two": 0.05},
    }  # fmt: skip
    assert (found["data"], found["base"], found["resolved"]) == ({}, {}, {})
    answer = found["answers"][0]
    assert (answer["run"], answer["against"], answer["judged"]) == ("two", "one", ["after", "after"])
    measured = answer["measures"]["loss"]
    assert (measured["rows"], measured["only_first"], measured["only_second"]) == (4, 0, 0)
    losses = [json.loads((folder / "scores.json").read_text())["after"]["loss"] for folder in (OUTPUT, OTHER)]
    assert measured["difference"] == pytest.approx(losses[0] - losses[1], rel=1e-9)
    assert measured["answer"] == "cannot tell"  # four rows can tell nothing, however far apart
    text = said(OUTPUT, OTHER).out
    assert re.search(r"train\.learning_rate +0\.005 +0\.05\n", text)
    assert "data (sha-256): the same" in text
    assert "is two better than one?" in text
    assert re.search(r"  loss: cannot tell from 4 rows: [+-]\d", text)
    assert found == compared(OUTPUT, OTHER)


def test_of_two_equal_runs_nothing_differs(two: Path) -> None:
    found = compared(OUTPUT, OTHER)
    assert all(found[part] == {} for part in compare.DIFFERENCES)
    measures = found["answers"][0]["measures"]
    assert {name: one["answer"] for name, one in measures.items()} == {"exact_match": "equal", "loss": "equal"}
    assert "no difference on any of 4 rows" in said(OUTPUT, OTHER).out


def test_the_better_one_is_told_and_so_is_the_worse(two: Path) -> None:
    rows_of(OUTPUT, [n < 10 for n in range(100)], [4.0 + n % 3 for n in range(100)])
    rows_of(OTHER, [n < 40 for n in range(100)], [3.5 + n % 3 + 0.1 * (n % 7) for n in range(100)])
    measures = compared(OUTPUT, OTHER)["answers"][0]["measures"]
    assert (measures["exact_match"]["answer"], measures["exact_match"]["difference"]) == ("better", 0.3)
    assert (measures["exact_match"]["better"], measures["exact_match"]["worse"]) == (30, 0)
    assert measures["loss"]["answer"] == "better"
    text = said(OUTPUT, OTHER).out
    assert "exact match: yes from 100 rows: +0.3000, 95 % interval +0.2" in text
    assert re.search(r"loss: yes from 100 rows: -0\.\d+, 95 % interval -0\.\d+ to -0\.\d+", text)
    measures = compared(OTHER, OUTPUT)["answers"][0]["measures"]
    assert {one["answer"] for one in measures.values()} == {"worse"}
    assert "exact match: no, it is worse from 100 rows: -0.3000" in said(OTHER, OUTPUT).out


def test_rows_are_paired_by_what_they_say_not_by_place_or_order(two: Path) -> None:
    right = [n % 3 == 0 for n in range(60)]
    rows_of(OUTPUT, right, [1.0 + n for n in range(60)])
    rows_of(OTHER, right, [1.0 + n for n in range(60)])
    for name in ("samples.jsonl", "losses.jsonl"):
        lines = (OTHER / name).read_text().splitlines()
        (OTHER / name).write_text("".join(line + "\n" for line in reversed(lines)))
        rewrite(OTHER / name, lambda number, row: row.update(row=f"elsewhere:{number}"))
    measures = compared(OUTPUT, OTHER)["answers"][0]["measures"]
    assert {one["answer"] for one in measures.values()} == {"equal"}


def test_rows_of_one_run_alone_are_counted_and_left_out(two: Path) -> None:
    rows_of(OUTPUT, [False] * 60, [2.0] * 60)
    rows_of(OTHER, [True] * 80, [1.0] * 80, first=40)
    measured = compared(OUTPUT, OTHER)["answers"][0]["measures"]["exact_match"]
    assert (measured["rows"], measured["only_first"], measured["only_second"], measured["better"]) == (20, 40, 60, 20)
    assert "from 20 rows (100 that only one was judged on are left out)" in said(OUTPUT, OTHER).out


def test_what_cannot_be_paired_is_refused_with_the_reason(two: Path) -> None:
    rows_of(OUTPUT, [True] * 30, [1.0] * 30)
    rows_of(OTHER, [True] * 30, [1.0] * 30, first=30)
    text = said(OUTPUT, OTHER).out
    assert "exact match: cannot be compared: they were judged on no row in common\n" in text
    assert "loss: cannot be compared: they were judged on no row in common with the same tokens" in text
    (OTHER / "losses.jsonl").unlink()
    assert "loss: cannot be compared: a run kept no rows behind this score" in said(OUTPUT, OTHER).out
    (OTHER / "scores.json").unlink()
    assert "nothing can be compared: two has no scores" in said(OUTPUT, OTHER).out


def test_another_file_with_the_same_rows_is_paired_and_named(finished: Path) -> None:
    """The held-out file is moved, its rows turned about and one added: four are still known again."""
    lines = Path("eval.jsonl").read_text().splitlines()
    Path("eval2.jsonl").write_text("".join(f"{line}\n" for line in reversed(lines)))
    with Path("eval2.jsonl").open("a") as file:
        file.write(json.dumps(chat("What is 9?", "9")) + "\n")
    assert train("output=runs/two", "data.eval_path=eval2.jsonl").code == 0
    found = compared(OUTPUT, OTHER)
    assert set(found["data"]) == {"eval.jsonl", "eval2.jsonl"}
    assert found["data"]["eval.jsonl"]["two"] is None
    for measure in ("exact_match", "loss"):
        measured = found["answers"][0]["measures"][measure]
        assert (measured["rows"], measured["only_first"], measured["only_second"]) == (4, 0, 1)
    assert found["answers"][0]["measures"]["exact_match"]["answer"] == "equal"  # trained alike, asked alike
    shutil.copy("eval.jsonl", "copy.jsonl")
    assert train("output=runs/three", "data.eval_path=copy.jsonl").code == 0
    assert compared(OUTPUT, Path("runs/three"))["data"] == {}


def test_of_several_each_is_compared_with_the_first_and_the_level_pays_for_it(two: Path) -> None:
    shutil.copytree(OUTPUT, "runs/three")
    found = compared(OUTPUT, OTHER, Path("runs/three"))
    assert [(one["run"], one["against"]) for one in found["answers"]] == [("two", "one"), ("three", "one")]
    assert found["level"] == pytest.approx(0.975)
    assert "2 comparisons are made: each interval is at 97.5 %" in said(OUTPUT, OTHER, "runs/three").out
    picked = compare.compare([OUTPUT, OTHER, Path("runs/three")], picked=True)
    assert picked["level"] == pytest.approx(1 - 0.05 / 3)
    assert any("picked" in one for one in compare.cautions(picked))


def test_names_are_as_long_as_they_must_be(two: Path) -> None:
    shutil.copytree("runs", "others")
    found = compared(OUTPUT, Path("others/one"), OTHER)
    assert [run["name"] for run in found["runs"]] == ["runs/one", "others/one", "runs/two"]


def test_it_answers_without_torch(two: Path) -> None:
    from tests.runs import process

    code = (
        "import sys; from finetune.cli import main_in_process as run; code = run(['compare', 'runs/one', 'runs/two']);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert process(code).returncode == 0


def test_nothing_is_written_and_bad_words_are_coded(two: Path) -> None:
    before = sorted(Path().rglob("*"))
    said(OUTPUT, OTHER)
    assert sorted(Path().rglob("*")) == before
    for words in ([OUTPUT], [OUTPUT, OUTPUT], [OUTPUT, "runs/../runs/one"], [OUTPUT, "runs"], [OUTPUT, "nowhere"]):
        found = finetune("compare", *map(str, words), "--html", "page.html")
        assert (found.code, found.out) == (5, "")
        assert found.err.count("\n") == 1
    assert not Path("page.html").exists()
    found = finetune("compare", str(OUTPUT), str(OTHER), "--html", "train.jsonl")
    assert found.code == 5
    assert "something else is there already" in found.err


def test_a_long_reason_is_told_whole_below_the_table(two: Path) -> None:
    plan, done = json.loads((OTHER / "plan.json").read_text()), json.loads((OTHER / "finished.json").read_text())
    stopped = {"by": "loss", "threshold": 0.0, "patience": 3, "since": 2}
    (OTHER / "plan.json").write_text(json.dumps(plan | {"steps": 60}))
    (OTHER / "finished.json").write_text(json.dumps(done | {"of": 60, "stopped": stopped}))
    lines = said(OUTPUT, OTHER).out.splitlines()
    assert "two: stopped early after step 6 of 60: loss has not improved for 3 evaluations, since step 2" in lines
    assert "…" in next(line for line in lines if line.startswith("two  "))


def test_a_page_for_a_folder_that_is_not_there_is_refused_by_its_own_name(two: Path) -> None:
    found = finetune("compare", str(OUTPUT), str(OTHER), "--html", "nowhere/page.html")
    assert found.code == 5
    assert "nowhere/page.html: there is no folder nowhere" in found.err
    assert ".tmp-" not in found.err
