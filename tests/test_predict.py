"""``finetune predict``: the right answers in the right order, the same bytes however often it was killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune import predict
from tests import runs
from tests.runs import OUTPUT, Said, finetune

ROWS = [{"id": n, **runs.chat(f"What is {n} and {'very ' * (n * 7 % 5)}{n + 1}?", "7")} for n in range(11)]
OUT = Path("answers.jsonl")
SHORT = ("--max-new-tokens", "5", "--batch-rows", "3")


def ask(*more: str, out: Path = OUT, model: str = str(OUTPUT)) -> Said:
    return finetune("predict", model, "rows.jsonl", "--out", str(out), *SHORT, *more)


@pytest.fixture
def place(finished: Path) -> Path:
    runs.awake(OUTPUT / "adapter")
    runs.write_rows(Path("rows.jsonl"), ROWS)
    return finished


def read(path: Path = OUT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_has_its_own_answer_in_the_order_of_the_file(place: Path) -> None:
    said = ask()
    assert said.code == 0, said.err
    found = read()
    assert [{key: row[key] for key in ("id", "messages")} for row in found] == ROWS
    for row in found[::4]:  # alone, as a file of its own
        runs.write_rows(Path("one.jsonl"), [ROWS[row["id"]]])
        alone = finetune("predict", str(OUTPUT), "one.jsonl", "--out", f"{row['id']}.jsonl", *SHORT)
        assert alone.code == 0
        assert read(Path(f"{row['id']}.jsonl"))[0]["answer"] == row["answer"]
    assert len({row["answer"] for row in found}) > 3
    facts = json.loads(Path("answers.jsonl.facts.json").read_text())
    assert (facts["rows"], facts["settings"]["max_new_tokens"]) == (11, 5)
    assert sorted(path.name for path in Path().glob("answers*")) == ["answers.jsonl", "answers.jsonl.facts.json"]


def test_base_adapter_merge_and_a_bare_adapter(place: Path) -> None:
    assert runs.merge_run(out=Path("merged")).code == 0
    for name, model, more in (
        ("run", str(OUTPUT), ()), ("adapter", str(OUTPUT / "adapter"), ()), ("base", str(OUTPUT), ("--base",)),
        ("merged", "merged", ()),
    ):  # fmt: skip
        said = ask(*more, out=Path(f"{name}.jsonl"), model=model)
        assert said.code == 0, said.err
    texts = {
        name: [row["answer"] for row in read(Path(f"{name}.jsonl"))] for name in ("run", "adapter", "base", "merged")
    }
    assert texts["run"] == texts["adapter"] != texts["base"]
    assert sum(a == b for a, b in zip(texts["run"], texts["merged"], strict=True)) >= 8  # bf16 against the live fp32


def test_drawn_answers_are_those_of_the_seed(place: Path) -> None:
    drawn = ("--temperature", "2", "--seed", "3")
    for name, more in (("a", drawn), ("b", drawn), ("c", (*drawn[:2], "--seed", "4")), ("greedy", ())):
        assert ask(*more, out=Path(f"{name}.jsonl")).code == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert len({Path(f"{name}.jsonl").read_bytes() for name in ("a", "c", "greedy")}) == 3
    assert ask("--temperature", "2", "--top-k", "1", out=Path("d.jsonl")).code == 0
    assert Path("d.jsonl").read_bytes() == Path("greedy.jsonl").read_bytes()


@pytest.mark.parametrize("more", [(), ("--temperature", "2", "--seed", "3")])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_cut_off_after_any_batch_the_same_command_ends_with_the_same_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch, at: int, more: tuple[str, ...]
) -> None:
    assert ask(*more, out=Path("whole.jsonl")).code == 0
    real, calls = predict.answered, list[Any]()

    def counted(*arguments: Any, last: int = 99) -> Any:
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "answered", functools.partial(counted, last=at))
        assert ask(*more).code == 6
    assert not OUT.exists()
    calls.clear()
    monkeypatch.setattr(predict, "answered", counted)
    said = ask(*more)
    assert said.code == 0
    assert len(calls) == 4 - at  # nothing is asked twice
    assert ("going on after" in said.out) == (at > 0)
    assert OUT.read_bytes() == Path("whole.jsonl").read_bytes()


def test_cut_off_again_and_again_nothing_is_asked_twice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(out=Path("whole.jsonl")).code == 0
    real, calls = predict.answered, list[Any]()

    def once(*arguments: Any) -> Any:
        if calls and calls[-1] is not None:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(predict, "answered", once)
    assert [ask().code for _ in range(4)] == [6, 6, 6, 0]
    asked = [row for call in calls if call is not None for row in call]
    assert sorted(asked) == list(range(len(ROWS)))
    assert OUT.read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_torn_end_is_answered_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(out=Path("whole.jsonl")).code == 0
    part = Path("answers.jsonl.part")
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert ask().code == 6
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    foreign = json.dumps({"batch": 1, "answers": ["x"], "cut": 0}).encode() + b"\n"
    for damaged in (b"", lines[0][:9], b"".join(lines[:3]) + lines[3][:-1], lines[0] + lines[2],
                    lines[0] + lines[1] + foreign, lines[0] + b"\xff\n" + lines[2]):  # fmt: skip
        part.write_bytes(damaged)
        assert ask().code == 0
        assert OUT.read_bytes() == Path("whole.jsonl").read_bytes()
        OUT.unlink()
        Path("answers.jsonl.facts.json").unlink()


def test_killed_for_real(place: Path) -> None:
    """SIGKILL in a process of its own, while it answers."""
    assert ask(out=Path("whole.jsonl")).code == 0
    code = (
        "import sys, time; from finetune import cli, predict; real = predict.answered\n"
        "predict.answered = lambda *given: (time.sleep(0.3), real(*given))[1]\n"
        "sys.exit(cli.main_in_process(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "predict", str(OUTPUT), "rows.jsonl", "--out", str(OUT), *SHORT]
    child = subprocess.Popen(words, env=runs.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, deadline = Path("answers.jsonl.part"), time.monotonic() + 120
    while (not part.exists() or part.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGSTOP)  # alive, and holding the file
    held = ask()
    assert (held.code, "another process is answering into it" in held.err) == (5, True)
    child.kill()
    child.wait()
    assert not OUT.exists()
    said = ask()
    assert "going on after" in said.out
    assert OUT.read_bytes() == Path("whole.jsonl").read_bytes()


def test_again_changes_nothing_and_nothing_is_mixed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask().code == 0
    before = runs.snapshot(Path())
    said = ask()
    assert (said.code, "nothing to do" in said.out) == (0, True)
    assert runs.snapshot(Path()) == before
    for more in (("--base",), ("--max-new-tokens", "6"), ("--temperature", "1"), ("--batch-rows", "4")):
        other = ask(*more)
        assert (other.code, "of another model, file or settings" in other.err) == (5, True)
    assert {name: digest for name, digest in runs.snapshot(Path()).items() if name in before} == before
    OUT.write_text(OUT.read_text().replace("7", "8"))
    assert "is altered" in ask().err
    OUT.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert ask().code == 6
    runs.write_rows(Path("rows.jsonl"), ROWS[1:])
    refused = ask()
    assert (refused.code, "are under way here" in refused.err) == (5, True)


def test_what_is_refused_before_a_model_loads(place: Path) -> None:
    for words, code, said in (
        (("nowhere", "rows.jsonl"), 4, "not a run folder"),
        (("base", "gone.jsonl"), 3, "no such file"),
        (("base", "rows.jsonl", "--top-k", "3"), 2, "without --temperature"),
        (("base", "rows.jsonl", "--column", "id"), 3, "has a column 'id' already"),
        (("base", "rows.jsonl", "--max-new-tokens", "100000"), 3, "leave room for"),
    ):
        found = finetune("predict", *words, "--out", str(OUT))
        assert found.code == code, found.err
        assert said in found.err
        assert not list(Path().glob("answers*"))


def test_what_stands_in_a_row_comes_out_as_it_was(place: Path) -> None:
    """Line separators, numbers, nothing: only a column is added. A lone surrogate has no bytes, and is escaped."""
    row = {"prompt": "Hi", "note": "a\u2028b", "n": 1.50, "deep": {"x": [None, True]}, "é": "\ud800"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    assert ask("--column", "said").code == 0
    (line,) = OUT.read_bytes().splitlines()
    assert {key: value for key, value in json.loads(line).items() if key != "said"} == row
    Path("rows.csv").write_text('prompt,n\n"a, b",1\n')
    assert finetune("predict", "base", "rows.csv", "--out", "csv.jsonl", *SHORT).code == 0
    assert {**read(Path("csv.jsonl"))[0], "answer": ""} == {"prompt": "a, b", "n": "1", "answer": ""}
