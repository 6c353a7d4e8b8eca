"""Hostile answers, run for real: each does its worst, with namespaces and without, and nothing comes of it.

Every attempt is bounded: so many processes, so much memory and time, and files in folders of the tests alone.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune import cage
from finetune.cage import Ended, Limits
from finetune.errors import EnvironmentFault
from finetune.evals import unit_test
from tests.evals.rows import questions
from tests.runs import ROOT

pytestmark = pytest.mark.skipif(not cage.given()["landlock"], reason="this kernel has no Landlock")
SMALL = Limits(seconds=2, memory=0.5, processes=12)


@pytest.fixture(params=["namespaces", "none"])
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """With all that this system gives, and as where it gives no namespaces."""
    given = dict(cage.given())
    if request.param == "namespaces" and not given["namespaces"]:
        pytest.skip("this system gives no namespaces")
    chosen = given | {"namespaces": request.param == "namespaces"}
    monkeypatch.setattr(cage, "given", lambda: chosen)
    return chosen


def run(code: str, limits: Limits = SMALL, given: bytes = b"") -> Ended:
    (ended,) = cage.run_each([sys.executable, "-c", code], [given], limits, "unit_test")
    return ended


def test_it_reads_its_input_and_has_a_folder_and_nothing_else(walls: Mapping[str, Any], tmp_path: Path) -> None:
    code = (
        "import os, sys; open('own', 'w').write('x'); os.mkdir('d'); "
        "print(sys.stdin.read(), os.listdir('.'), sorted(os.environ))"
    )
    ended = run(code, given=b"asked")
    assert (ended.code, ended.why) == (0, "")
    said = ended.said.decode().replace("'LC_CTYPE', ", "")  # Python's own, for its children
    assert sorted(said[: said.index("]")]) == sorted("asked ['own', 'd'")
    assert "['LANG', 'PATH']" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("walls")
def test_files_elsewhere_stay_as_they_are(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before")
    kept.chmod(0o666)  # nobody is kept from it by who he is
    tmp_path.chmod(0o777)
    acts = (
        "open(P, 'w')", "open(P, 'a')", "os.remove(P)", "os.truncate(P, 0)", "os.rename(P, P + 'x')",
        "open(P + 'new', 'w')", "os.mkdir(P + 'd')", "os.symlink('x', P + 's')", "os.link(P, 'here')",
    )  # fmt: skip
    for act in acts:
        ended = run(f"import os; P = {str(kept)!r}; {act}")
        assert ended.code == 1, act
    assert kept.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.usefixtures("walls")
def test_no_socket_is_opened() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.01)
        port = listening.getsockname()[1]
        for act in (f"socket.create_connection(('127.0.0.1', {port}))", "socket.socket(socket.AF_UNIX)",
                    "socket.socket(type=socket.SOCK_DGRAM)", "socket.create_server(('127.0.0.1', 0))"):  # fmt: skip
            assert run(f"import socket; {act}").code == 1, act
        with pytest.raises(TimeoutError):
            listening.accept()
    assert run("import socket; one, two = socket.socketpair(); one.send(b'x'); print(two.recv(1))").code == 0


@pytest.mark.usefixtures("walls")
def test_an_endless_loop_is_ended() -> None:
    began = time.monotonic()
    assert run("while True: pass", Limits(seconds=1, memory=0.5, processes=4)) == Ended(None, "time", b"")
    assert run("import time; time.sleep(60)", Limits(seconds=1, memory=0.5, processes=4)).why == "time"
    assert time.monotonic() - began < 15


@pytest.mark.usefixtures("walls")
def test_a_fork_bomb_is_held_and_nothing_of_it_stays() -> None:
    """Also what has left the process group and its parents."""
    mark = f"12{os.getpid()}.25"
    bomb = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
        "while True:\n  try:\n    if os.fork() == 0: os.setsid()\n  except OSError: time.sleep(0.01)"
    )
    began = time.monotonic()
    ended = run(bomb)
    assert ended.code is None
    assert ended.why in ("processes", "time")
    assert time.monotonic() - began < 20
    gone(mark)


@pytest.mark.usefixtures("walls")
def test_what_stays_behind_ends_with_the_command() -> None:
    mark = f"13{os.getpid()}.25"
    code = f"import subprocess; subprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
    assert run(code).code == 0
    gone(mark)


def gone(mark: str) -> None:
    found = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert f"sleep {mark}" not in found


@pytest.mark.usefixtures("walls")
def test_output_and_files_are_bounded() -> None:
    ended = run("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert ended.code != 0
    assert len(ended.said) <= 65536
    assert run("open('large', 'wb').write(b'x' * (40 << 20))").code == 1


def test_the_folder_is_bounded_as_a_whole() -> None:
    if not cage.given()["namespaces"]:
        pytest.skip("this system gives no namespaces")
    fill = "for n in range(9): open(str(n), 'wb').write(b'x' * (12 << 20))"
    assert run(fill, Limits(seconds=10, memory=0.5, processes=4)).code == 1


@pytest.mark.usefixtures("walls")
def test_memory_is_bounded_for_one_and_for_all() -> None:
    assert run("bytearray(900_000_000)").code == 1
    each = "if os.fork() == 0: x = bytearray(150_000_000); time.sleep(9)"
    ended = run(
        f"import os, time\nfor n in range(6):\n  {each}\ntime.sleep(9)", Limits(seconds=8, memory=0.5, processes=12)
    )
    assert (ended.code, ended.why) == (None, "memory")


@pytest.mark.usefixtures("walls")
def test_other_processes_cannot_be_touched() -> None:
    mine = os.getpid()
    for act in (f"os.kill({mine}, 9)", "os.kill(os.getppid(), 9)", f"open('/proc/{mine}/environ').read()",
                f"open('/proc/{mine}/mem', 'rb')"):  # fmt: skip
        ended = run(f"import os; {act}")
        assert ended.code == 1, act


def test_it_gains_no_privileges(walls: Mapping[str, Any]) -> None:
    read = (
        "{line.split()[0]: line.split()[1] for line in open('/proc/self/status') if ':' in line and line.split()[1:]}"
    )
    said = run(f"s = {read}; print(s['NoNewPrivs:'], s['Seccomp:'], int(s['CapEff:'], 16) & ~0b110)").said
    assert said.split()[:3] == [b"1", b"2", b"0"]  # at most what lets root's child read what root reads


def test_a_system_without_walls_gets_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "given", lambda: {"landlock": 0, "sockets": True, "namespaces": True})
    with pytest.raises(EnvironmentFault, match="has no Landlock"):
        run("print(1)")


def test_what_is_not_held_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "given", lambda: {"landlock": 3, "sockets": False, "namespaces": False})
    assert [words for words in cage.remarks() if "reach the network" in words]
    monkeypatch.setattr(cage, "given", lambda: {"landlock": 3, "sockets": True, "namespaces": True})
    assert cage.remarks() == []


@pytest.mark.usefixtures("walls")
def test_a_command_that_cannot_run_is_a_fault_and_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no command nowhere-to-be-found"):
        cage.run_each(["nowhere-to-be-found"], [b""], SMALL, "unit_test")
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/python\n")
    broken.chmod(0o755)
    with pytest.raises(EnvironmentFault, match="cannot be run"):
        cage.run_each([str(broken)], [b""], SMALL, "unit_test")


def test_relative_words_are_the_callers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "check.py").write_text("print('here')")
    monkeypatch.chdir(tmp_path)
    (ended,) = cage.run_each([sys.executable, "check.py"], [b""], SMALL, "unit_test")
    assert ended == Ended(0, "", b"here\n")


CHECK = """
import json, subprocess, sys
row = json.load(sys.stdin)
assert row["prompt"] == row["messages"][-1]["content"]
done = subprocess.run([sys.executable, "-I", "-c", row["completion"]], capture_output=True, text=True, timeout=5)
sys.exit(done.stdout.strip() != row["reference"])
"""


def test_the_metric_says_who_passes() -> None:
    asked = ([sys.executable, "-c", CHECK], 5.0, 0.5, 16)
    given = ["<think>so</think>print(2 + 2)", "print(5)", "import os; os._exit(0)", "while True: pass"]
    verdicts, scores = unit_test.judge(questions("4", "4", "4", "4"), given, (asked[0], 1.0, *asked[2:]))
    assert verdicts == [1.0, 0.0, 0.0, 0.0]
    assert scores["unit_test"] == 0.25
    assert scores["unit_test_stopped"] == 1
    assert len(scores["unit_test_interval"]) == 2


def test_the_example_of_the_docs_runs() -> None:
    page = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load(sys.stdin)" in block]
    tests = "assert twice(4) == 8"
    given = ["def twice(n): return 2 * n", "def twice(n): return n", "import os; os._exit(1)"]
    asked = ([sys.executable, "-c", code], 10.0, 0.5, 16)
    assert unit_test.judge(questions(tests, tests, tests), given, asked)[0] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("code", "verdict"),
    [("print(0.25)", 0.25), ("print('fine')", 1.0), ("pass", 1.0), ("print('1e9')", 0.0), ("print('nan')", 0.0),
     ("print(1); raise SystemExit(3)", 0.0), ("import os; os.kill(os.getpid(), 9)", 0.0)],
)  # fmt: skip
def test_a_number_alone_is_the_verdict(code: str, verdict: float) -> None:
    verdicts, scores = unit_test.judge(questions("x"), ["y"], ([sys.executable, "-c", code], 5.0, 0.5, 16))
    assert verdicts == [verdict]
    assert scores["unit_test"] == verdict
