"""All runs as one table: found wherever they lie, told truly by the ends of their files, in little time and width."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from finetune import ended, runtable
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder
from tests import runs
from tests.runs import ENVIRONMENT, OUTPUT, finetune, process, train

WATCH = "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()"


def make(folder: Path, steps: int, *, total: int = 10, end: str = "\n", **scores: Any) -> RunFolder:
    """A run folder of so many steps, each of 0.5 s and 100 tokens."""
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"step": n, "loss": 1 / n, "seconds": 0.5, "tokens": 100, "memory": 2_000_000 + n})
        for n in range(1, steps + 1)
    ]
    (folder / "identity.json").write_text("{}")
    (folder / "plan.json").write_text(json.dumps({"steps": total}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end if lines else "")
    (folder / "scores.json").write_text(json.dumps(scores))
    return RunFolder(folder)


def only(root: Path) -> runtable.Row:
    (row,) = runtable.rows(root)
    return row


def test_a_real_run_is_told_by_its_own_files(finished: Path) -> None:
    row = only(Path("runs"))
    last = runs.metrics()[-1]
    assert (row.name, row.state, row.step, row.total, row.judged) == ("one", "finished", 6, 6, "after")
    assert (row.loss, row.memory) == (last["loss"], last["memory"])
    assert row.evaluation_loss == json.loads((OUTPUT / "scores.json").read_text())["after"]["loss"]
    steps = runs.metrics()
    pace = sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps)
    assert row.tokens_per_second == pytest.approx(pace, rel=1e-6)
    assert row.eta is None
    said = finetune("dashboard", "runs", "--json")
    assert said.code == 0
    (told,) = json.loads(said.out)["runs"]
    assert told | {"age": 0} == {**row.__dict__, "age": 0}
    assert only(OUTPUT).name == "one"


def test_runs_of_sweeps_and_of_several_adapters_are_found(tmp_path: Path) -> None:
    for name in ("one", "sweep/rate=1", "sweep/rate=2", "joint/en", "deep/er/sweep/x"):
        make(tmp_path / name, 1)
    make(tmp_path / "one" / "checkpoints" / "odd", 1)  # inside a run nothing is a run
    make(tmp_path / ".trash" / "old", 1)
    make(tmp_path / "a/b/c/d/e", 1)  # deeper than is looked
    assert {row.name for row in runtable.rows(tmp_path)} == {
        "one", "sweep/rate=1", "sweep/rate=2", "joint/en", "deep/er/sweep/x"
    }  # fmt: skip
    with pytest.raises(EnvironmentFault, match="there is no run here"):
        runtable.rows(tmp_path / "nowhere")


def test_each_state_is_told(tmp_path: Path) -> None:
    """Running is a lock that is held; the others are what the folder says, and what a killed run cannot say."""
    files = make(tmp_path / "r", 4)
    assert only(tmp_path).state == "interrupted"
    with files.lock():
        row = only(tmp_path)
        assert (row.state, row.eta) == ("running", pytest.approx(6 * 0.5))
    for how in (ended.PAUSED, ended.FAILED, ended.INTERRUPTED):
        ended.note(files, how, "because\x1b[31m")
        row = only(tmp_path)
        assert (row.state, row.why, row.eta) == (how, "because [31m", None)
    files.finished.write_text(json.dumps({"steps": 10}))
    assert only(tmp_path).state == "finished"
    files.finished.write_text(json.dumps({"steps": 6, "of": 10}))
    assert only(tmp_path).state == "finished"  # stopped early
    files.plan.write_text(json.dumps({"steps": 20}))  # being lengthened
    assert only(tmp_path).state == "interrupted"


def test_looking_at_a_lock_refuses_nobody(tmp_path: Path) -> None:
    """Many looks a second beside a run that begins: it gets its lock."""
    files = make(tmp_path / "r", 1)
    with files.lock():
        pass
    code = (
        "import sys, time; from pathlib import Path; from finetune import ended; from finetune.runfolder import *\n"
        "print('on', flush=True)\nwhile True: ended.under_way(RunFolder(Path(sys.argv[1]))); time.sleep(1e-4)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r")], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as looker:
        try:
            assert looker.stdout is not None
            looker.stdout.readline()
            for _ in range(5000):
                with files.lock():
                    pass
        finally:
            looker.kill()


def test_a_real_run_notes_how_it_stopped(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(options=["--until", "2"]).code == 0
    assert (only(OUTPUT).state, only(OUTPUT).step) == ("paused", 2)
    from finetune import loop

    real = loop._update

    def refuse(*words: Any, **more: Any) -> Any:
        from finetune.errors import ModelError

        raise ModelError("the loss is not finite", "step 3", "lower the rate")

    monkeypatch.setattr(loop, "_update", refuse)
    assert train().code == 4
    row = only(OUTPUT)
    assert (row.state, row.step) == ("failed", 2)
    assert "the loss is not finite" in row.why
    assert "one: step 3: the loss is not finite" in finetune("dashboard", "--text").out
    monkeypatch.setattr(loop, "_update", real)
    assert train().code == 0
    assert only(OUTPUT).state == "finished"
    assert not (OUTPUT / "stopped.json").exists()


def test_torn_and_hostile_files_break_nothing(tmp_path: Path) -> None:
    files = make(tmp_path / "r", 4, end='\n{"step": 5, "lo')
    assert only(tmp_path).step == 4
    for damage in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"steps": "x", "how": 3, "why": [], "after": {"loss": "y"}}',
        b"[",
    ):
        for path in (files.plan, files.scores, files.finished, files.stopped, files.metrics):
            before = path.read_bytes() if path.exists() else b""
            path.write_bytes(damage)
            assert runtable.lines(tmp_path)
            path.write_bytes(before)
    evil = make(tmp_path / "evil\x1b]0;x\x07", 1)
    ended.note(evil, ended.FAILED, "a\x1b[2Jb")
    assert not re.search("[\x1b\x07]", "\n".join(runtable.lines(tmp_path)))


@pytest.mark.parametrize("width", [12, 30, 50, 70, 90, 200])
def test_the_table_fits_the_terminal(tmp_path: Path, width: int) -> None:
    for name in ("a", "sweep/learning_rate=0.0001,r=8", "sweep/learning_rate=0.0001,r=16"):
        make(tmp_path / name, 4, total=100_000, **{"step 4": {"loss": 1.25}})
    found = runtable.table(runtable.rows(tmp_path), width)
    assert max(map(len, found)) <= width
    assert len(found) == 4
    if width >= 50:
        assert sum("r=16" in line for line in found) == 1, "names end in what tells them apart"
        assert all("interrupted" in line for line in found[1:])
    if width == 200:
        assert "1.2500" in found[1]
        starts = {line.index("interrupted") for line in found[1:]}
        assert len(starts) == 1


@pytest.mark.parametrize("width", [12, 40, 120])
def test_wide_signs_keep_the_columns_straight(tmp_path: Path, width: int) -> None:
    """A Chinese, Japanese or Korean sign takes two cells of a terminal, a combining one none."""
    for name in ("plain", "中文数据集の学習率を比べる-한국어", "e\u0301te\u0301"):
        make(tmp_path / name, 4, **{"step 4": {"loss": 1.25}})
    found = runtable.table(runtable.rows(tmp_path), width)
    assert max(map(cell_len, found)) <= width
    if width >= 40:
        assert len({cell_len(line[: line.index("interrupted")]) for line in found[1:]}) == 1
    assert sum("한국어" in line for line in found) == (width >= 40)


def test_a_run_that_a_sweep_left_says_so(tmp_path: Path) -> None:
    ended.note(make(tmp_path / "worse", 4), ended.HALVED, "at step 4 of 10: others had a lower held-out loss there")
    make(tmp_path / "better", 4)
    assert [row.state for row in runtable.rows(tmp_path)] == ["interrupted", "halved out"]


def test_two_hundred_long_runs_take_less_than_a_second(tmp_path: Path) -> None:
    """Of 10,000 steps each, of which only the ends are read; and torch is not loaded for it."""
    first = make(tmp_path / "0", 10_000, total=20_000, **{f"step {n}": {"loss": 1.0} for n in range(100, 10_000, 100)})
    for number in range(1, 200):
        (tmp_path / str(number)).mkdir()
        for path in first.root.iterdir():
            os.link(path, tmp_path / str(number) / path.name)
    code = (
        "import sys, time; from pathlib import Path; from finetune import runtable; began = time.process_time()\n"
        "found = runtable.lines(Path(sys.argv[1]))\n"
        "print(len(found), time.process_time() - began, 'torch' in sys.modules)"
    )
    done = process(code, str(tmp_path))
    count, seconds, torch = done.stdout.split()
    assert (int(count), torch) == (201, "False"), done.stderr
    assert float(seconds) < 1  # 0.13 s on an idle machine


def test_watching_without_a_terminal_prints_the_table_again_under_the_time(finished: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WATCH, "dashboard", "runs", "--watch", "--every", "0.2"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(8)]
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", lines[0])
    assert lines[1].startswith("run ")
    assert lines[2].startswith("one ")
    assert lines[4][:2] == "20", "and again"


def test_watching_in_a_terminal_redraws_and_gives_the_screen_back(finished: Path) -> None:
    for number in range(40):  # more than the terminal has lines
        shutil.copytree(OUTPUT, Path(f"runs/copy{number}"), ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    pid, terminal = pty.fork()
    if pid == 0:
        words = [sys.executable, "-c", WATCH, "dashboard", "runs", "--watch", "--every", "0.2"]
        os.execve(
            sys.executable, words, {name: ENVIRONMENT[name] for name in ENVIRONMENT.keys() - {"LINES", "COLUMNS"}}
        )
    termios.tcsetwinsize(terminal, (20, 80))
    shown, began = b"", time.monotonic()
    while b"25 lines more" not in shown and time.monotonic() - began < 30:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536)
    os.kill(pid, signal.SIGINT)
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert shown.startswith(b"\x1b[?1049h")
    assert shown.rstrip().endswith(b"\x1b[?1049l")
    pictures = shown.split(b"\x1b[H")[1:]  # the first ones may have met another size
    assert any(one.count(b"\n") == 18 and b"and 25 lines more" in one for one in pictures)


def test_json_and_watch_are_not_asked_together(work: Path) -> None:
    assert finetune("dashboard", "--watch", "--json").code == 2
