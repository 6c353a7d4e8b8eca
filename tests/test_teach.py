"""``finetune teach``: what a teacher says, written down once; killed, the same command ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import prepare, taught, teacher
from tests import runs
from tests.test_teaching import TEACHER, WANTED, school, student, written

__all__ = ["school"]


def digests(folder: str) -> dict[str, str]:
    return {name: digest for name, (digest, _) in runs.snapshot(Path(folder)).items()}


@pytest.mark.usefixtures("school")
def test_every_row_is_asked_once() -> None:
    lines = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(lines + lines.splitlines()[0] + "\n")  # one comes twice
    said = written("--top-k=8", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["samples"], told["top_k"]) == (24, 8)
    record = taught.read(Path("said"))
    prepared = prepare.prepare(Path("r.yaml"), WANTED[1:])
    assert prepared.samples is not None
    assert prepared.held_out is not None
    assert record.missing([*prepared.samples, *prepared.held_out.examples]) == []
    assert record.facts.name == str(TEACHER)
    assert student("objective.teacher=said").code == 0


@pytest.mark.usefixtures("school")
def test_the_same_command_again_does_nothing_and_another_is_refused() -> None:
    assert written("--top-k=8").code == 0
    before = runs.snapshot(Path("said"))
    said = written("--top-k=8")
    assert (said.code, "is just that already" in said.out, "loading" in said.out) == (0, True, False)
    for other in ("--top-k=9", "objective.temperature=2.0"):
        said = written(*({"--top-k=8", other} if "." in other else {other}))
        assert (said.code, "something else is there" in said.err) == (5, True)
    assert runs.snapshot(Path("said")) == before
    Path("file").write_text("mine")
    assert written(out="file").code == 5
    assert Path("file").read_text() == "mine"


@pytest.mark.usefixtures("school")
@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_killed_command_goes_on(monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    monkeypatch.setattr(teacher, "_PART_TOKENS", 10)
    assert written("--top-k=8", out="whole").code == 0
    assert len(list(Path("whole").glob(taught.PARTS))) > 4
    real, asked = teacher._said, []

    def dying(*given: object) -> taught.Part:
        if len(asked) == killed_at:
            raise KeyboardInterrupt
        asked.append(given)
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_said", dying)
        assert written("--top-k=8").code != 0
    assert not Path("said").exists()
    asked.clear()
    monkeypatch.setattr(teacher, "_said", lambda *given: (asked.append(given), real(*given))[1])
    assert written("--top-k=8").code == 0
    assert len(asked) == len(list(Path("said").glob(taught.PARTS))) - killed_at
    assert digests("said") == digests("whole")
    assert not list(Path().glob("said.tmp-*"))


@pytest.mark.usefixtures("school")
def test_what_a_killed_command_left_is_of_no_use_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_PART_TOKENS", 10)
    assert written("--top-k=9", out="nine").code == 0
    real, asked = teacher._said, []

    def dying(*given: object) -> taught.Part:
        asked.append(given)
        if len(asked) > 3:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_said", dying)
        assert written("--top-k=8").code != 0
    assert written("--top-k=9").code == 0
    assert digests("said") == digests("nine")


@pytest.mark.usefixtures("school")
def test_what_cannot_be_written_down() -> None:
    said = runs.finetune("teach", "r.yaml", "--out", "said")
    assert (said.code, "this recipe has no teacher" in said.err) == (2, True)
    assert written("--top-k=4").code == 0
    said = written("objective.teacher=said", out="again")
    assert (said.code, "is written down already" in said.err) == (2, True)
    said = written("objective.teacher=runs/none", out="again")
    assert (said.code, "there is no runs/none" in said.err) == (2, True)
    Path("runs/none").mkdir()
    said = written("objective.teacher=runs/none", out="again")
    assert (said.code, "no finished run and no adapter" in said.err) == (2, True)
    assert not Path("again").exists()
