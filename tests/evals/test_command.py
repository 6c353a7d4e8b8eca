"""A metric of one's own, run for real: what it is given, what it may print, and every way to go wrong."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from finetune.errors import EnvironmentFault
from finetune.evals import command
from tests.evals.rows import questions
from tests.runs import ROOT

READ = "import json, sys; rows = [json.loads(line) for line in sys.stdin]; "


def python(code: str, seconds: float = 30) -> tuple[list[str], float]:
    return [sys.executable, "-c", code], seconds


def test_it_is_given_the_rows_and_prints_a_number_for_each() -> None:
    code = READ + "[print(json.dumps(row['expected'] == row['answer'])) for row in rows]"
    verdicts, scores = command.judge(questions("a", "b", "U+2028:\u2028"), ["a", "x", "U+2028:\u2028"], python(code))
    assert verdicts == [1, 0, 1]
    assert scores == {"command": 2 / 3}


def test_a_row_is_told_with_its_whole_conversation(tmp_path: Path) -> None:
    code = READ + f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(rows)); print(0.5)"
    assert command.judge(questions("right"), ["given\n"], python(code)) == ([0.5], {"command": 0.5})
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q1"}]
    assert json.loads((tmp_path / "seen").read_text()) == [
        {"question": "q1", "messages": messages, "expected": "right", "answer": "given\n"}
    ]


def test_one_object_speaks_for_all_rows() -> None:
    verdicts, scores = command.judge(questions("a", "b"), ["a", "b"], python('print(\'{"f1": 0.25, "bleu": 31}\')'))
    assert verdicts == []
    assert scores == {"command.f1": 0.25, "command.bleu": 31.0}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no key')", "ended with code 1: no key"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: it said nothing"),
        ("print(1)", "printed 1 lines for 2 rows"),
        ("print(1); print('right')", "not JSON"),
        ("print(1); print('NaN')", "NaN is no number"),
        ("print(1); print('\"1\"')", "where a number is due"),
        ('print(\'{"f1": "x"}\')', "where a number is due"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n1\\n')", "not JSON"),
    ],
)
def test_whatever_else_it_does_is_one_clean_fault(code: str, said: str) -> None:
    with pytest.raises(EnvironmentFault, match=said) as caught:
        command.judge(questions("a", "b"), ["a", "b"], python(code))
    assert caught.value.faults[0].where == "evaluate.command"


def test_too_slow_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); \
open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match="took more than 2s"):
        command.judge(questions("a"), ["a"], python(child, 2))
    assert time.monotonic() - began < 20
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(EnvironmentFault, match="cannot be started: No such file"):
        command.judge(questions("a"), ["a"], (["/nowhere/judge"], 5))


def test_what_prints_without_an_end_is_stopped_before_it_fills_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_LONGEST", 1_000_000)
    for stream in ("stdout", "stderr"):
        code = f"import sys\nwhile True: sys.{stream}.write('1\\n' * 10_000)"
        began = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"printed more than 1\.0 MB"):
            command.judge(questions("a"), ["a"], python(code, seconds=60))
        assert time.monotonic() - began < 30


def test_the_example_of_the_docs_runs() -> None:
    page = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "in sys.stdin" in block]
    verdicts, _ = command.judge(questions("four", "four"), ["for", "a long answer to it"], python(code))
    assert verdicts == [1, 0]
