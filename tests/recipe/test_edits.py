"""Single mistakes in the shipped recipes: each is refused with file and line, or provably changes one key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from finetune import recipe
from tests.recipe import edits, judge

REPOSITORY = Path(__file__).resolve().parents[2]
# Edits know two levels of keys; the list of several adapters has its own tests (test_several.py).
RECIPES = [path for path in sorted((REPOSITORY / "recipes").glob("*.yaml")) if "\nadapters:" not in path.read_text()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the data the shipped recipes name."""
    for place in ("dates", "preferences"):
        (tmp_path / "data" / place).mkdir(parents=True)
        for name in ("train", "eval", "train-labels", "eval-labels"):
            (tmp_path / "data" / place / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(count: int, seed: int) -> judge.Tally:
    """Judge ``count`` edits, shared out evenly over the shipped recipes."""
    tally = judge.Tally()
    file = Path("edited.yaml")
    for number, path in enumerate(RECIPES):
        original = recipe.load(path)
        share = (count + number) // len(RECIPES)
        for edit in edits.edits(path.read_text(), share, seed + number):
            start = time.perf_counter()
            verdict = judge.judge(edit, file, original)
            tally.slowest = max(tally.slowest, time.perf_counter() - start)
            tally.kinds[edit.kind] += 1
            if verdict in ("refused", "same", "one_key"):
                setattr(tally, verdict, getattr(tally, verdict) + 1)
            else:
                tally.failures.append(f"{path.name}, {edit.kind}, line {edit.line} ({edit.key}): {verdict}")
    return tally


@pytest.mark.usefixtures("work")
def test_single_edits() -> None:
    tally = sweep(300, seed=1)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.refused + tally.same + tally.one_key == 300
    assert len(tally.kinds) == len(edits.KINDS)
    assert tally.refused > 150


@pytest.mark.long
@pytest.mark.usefixtures("work")
def test_single_edits_long(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    tally = sweep(5000, seed=1000)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(
            f"\nrecipe edits: {tally.refused} refused, {tally.same} same recipe, {tally.one_key} one key as written, "
            f"{len(tally.failures)} failures; slowest {tally.slowest * 1000:.0f} ms, {seconds:.0f} s"
        )
    assert not tally.failures, "\n".join(tally.failures[:50])


@pytest.mark.usefixtures("work")
def test_the_judge_notices_a_loader_that_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    path = RECIPES[0]
    original = recipe.load(path)
    monkeypatch.setattr(recipe, "load", lambda file: original)
    text = path.read_text()
    line = next(line for line in edits.lines_of(text) if line.path == "train.learning_rate")
    edit = edits.Edit("key typo", text.replace("learning_rate:", "lerning_rate:"), line.number, line.path)
    forgiven = original.model_copy(update={"train": original.train.model_copy(update={"learning_rate": 0.5})})
    monkeypatch.setattr(recipe, "load", lambda file: forgiven)
    assert "accepted" in judge.judge(edit, Path("edited.yaml"), original)
