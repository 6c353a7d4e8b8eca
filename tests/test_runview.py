"""A run as its files tell it: also one that is under way, damaged or somebody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune import runview
from finetune.errors import EnvironmentFault
from tests.runs import OUTPUT, finetune


def test_a_finished_run(finished: Path) -> None:
    found = runview.view(OUTPUT)
    assert (found.finished, found.steps, found.state) == (True, 6, "finished, 6 steps")
    assert [step for step, _ in found.curve] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found.held_out] == [0, 6]
    stored = json.loads((OUTPUT / "scores.json").read_text())
    assert found.judged is not None
    assert found.judged.name == "after"
    assert sum(found.judged.right.values()) / len(found.judged.right) == stored["after"]["exact_match"]
    totals, weights = zip(*found.judged.losses.values(), strict=True)
    assert sum(totals) / sum(weights) == pytest.approx(stored["after"]["loss"], rel=1e-12)


def test_the_same_row_twice_is_two_rows(finished: Path) -> None:
    path = OUTPUT / "samples.jsonl"
    path.write_text(path.read_text() * 2)
    judged = runview.view(OUTPUT).judged
    assert judged is not None
    assert len(judged.right) == 8


def test_a_run_that_is_under_way_is_told_by_its_last_judgement(finished: Path) -> None:
    for name in ("scores.json", "samples.jsonl", "losses.jsonl"):
        path = OUTPUT / name
        path.write_text(path.read_text().replace('"after"', '"step 4"'))
    (OUTPUT / "finished.json").unlink()
    lines = (OUTPUT / "metrics.jsonl").read_text().splitlines(keepends=True)
    (OUTPUT / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    found = runview.view(OUTPUT)
    assert (found.finished, found.state) == (False, "unfinished, step 4 of 6")
    assert found.judged is not None
    assert (found.judged.name, len(found.judged.right), len(found.judged.losses)) == ("step 4", 4, 4)
    assert [step for step, _ in found.held_out] == [0, 4]


@pytest.mark.parametrize("name", ["scores.json", "samples.jsonl", "losses.jsonl", "metrics.jsonl", "plan.json"])
@pytest.mark.parametrize(
    "content",
    ["", "\x00\xff", "[1, 2]", "{}", '{"after": [1], "step": true, "loss": NaN}',
     '{"after": {"loss": 1e999}, "step": "x"}', '{"content": 5, "row": null}',
     '{"content": "c", "after": {}, "expected": [], "weight": -1}', "[" * 100_000],
)  # fmt: skip
def test_no_damage_crashes_it(finished: Path, name: str, content: str) -> None:
    shutil.copytree(OUTPUT, "runs/other")
    (OUTPUT / name).write_bytes(content.encode("latin-1"))
    said = finetune("compare", "runs/other", str(OUTPUT), "--html", "page.html")
    assert (said.code, said.err) == (0, "")


def test_what_is_no_run_is_refused(finished: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"not a run folder.*name its runs: one"):
        runview.view(Path("runs"))
    with pytest.raises(EnvironmentFault, match="not a run folder"):
        runview.view(Path("nowhere"))
    for content in ("{}", "[]", '{"recipe": [], "data": {}, "base": {}, "resolved": {}, "environment": {}}'):
        (OUTPUT / "identity.json").write_text(content)
        with pytest.raises(EnvironmentFault, match="cannot be read"):
            runview.view(OUTPUT)


@pytest.mark.parametrize(
    ("name", "step"),
    [("before", 0), ("step 12", 12), ("after", None), ("merged", None), ("step x", None), ("step -1", None)],
)  # fmt: skip
def test_a_judgements_name_tells_its_step(name: str, step: int | None) -> None:
    assert runview.step_of(name) == step
