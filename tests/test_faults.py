"""The fault-injection tool itself: it must count everything, and break exactly where it was told to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import ROOT, Fault, Mode, Outcome, Trials, compile_shim, why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

SAVE_DEMO = "tests.faults.jobs:save_demo"
WRITE_TWICE = "tests.faults.jobs:write_twice"
SAVE_OPS = ["mkdir", "mkdir", "openat", "write", "fsync"]  # the folder, the draft in it, state.json
SAVE_OPS += ["openat", "ftruncate", "write", "renameat"]  # safetensors writes under a name of its own and renames it
SAVE_OPS += ["openat", "write", "unlink", "rename"]  # scratch; the draft gets its final name
CHANGES = "write|pwrite64|writev|openat|open|creat|mkdir|rename|renameat|renameat2|unlink|rmdir|ftruncate|fsync"


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    with Trials(["safetensors.torch"]) as warm:
        yield warm


def save(trials: Trials, folder: Path, mode: Mode, n: int = 0) -> Outcome:
    return trials.run(SAVE_DEMO, {"folder": str(folder)}, fault=Fault(mode, n, folder), limit_seconds=30)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes; temporary names that a library draws at random become ``*``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"\.tmp\w{6}$", "*", str(path.relative_to(folder))): path.read_bytes() for path in files}


def test_every_operation_is_counted_in_order_with_its_path(trials: Trials, tmp_path: Path) -> None:
    outcome = save(trials, tmp_path / "run", Mode.COUNT)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert [op.name for op in outcome.log] == SAVE_OPS
    assert outcome.ops == len(SAVE_OPS)
    assert outcome.log[-1][2:] == (str(tmp_path / "run/step-1"), str(tmp_path / "run/step-1.tmp"))
    assert set(tree(tmp_path)) == {"run/step-1/state.json", "run/step-1/adapter.safetensors"}


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_strace_sees_no_operation_that_the_tool_missed(trials: Trials, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    program = f"from tests.faults.jobs import save_demo; save_demo({str(tmp_path / 'plain')!r})"
    command = ["strace", "-f", "-y", "-o", str(trace), sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    seen = []
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(rf"\d+ +({CHANGES})\(", line)
        reads = "O_RDONLY" in line
        if call and str(tmp_path / "plain") in line and not reads and "ENOENT" not in line:
            seen.append(call[1])
    counted = save(trials, tmp_path / "run", Mode.COUNT)
    # mkdir(parents=True) first tries without the parent: that call changes nothing, and neither list holds it.
    assert seen == [op.name for op in counted.log]


@pytest.mark.parametrize("n", range(1, len(SAVE_OPS) + 1))
def test_killed_before_and_after_leave_neighbouring_states(trials: Trials, tmp_path: Path, n: int) -> None:
    before = save(trials, tmp_path / "before", Mode.KILL_BEFORE, n)
    after = save(trials, tmp_path / "after", Mode.KILL_AFTER, n)
    assert (before.signal, before.exit_code, before.ops) == (9, None, n)
    assert (after.signal, after.exit_code, after.ops) == (9, None, n)
    save(trials, tmp_path / "following", Mode.KILL_BEFORE, n + 1)
    assert tree(tmp_path / "after") == tree(tmp_path / "following")
    no_change = SAVE_OPS[n - 1] in ("mkdir", "fsync")
    assert (tree(tmp_path / "before") == tree(tmp_path / "after")) == no_change


def test_a_kill_leaves_exactly_the_files_written_so_far(trials: Trials, tmp_path: Path) -> None:
    rename = SAVE_OPS.index("renameat") + 1
    save(trials, tmp_path / "before", Mode.KILL_BEFORE, rename)
    save(trials, tmp_path / "after", Mode.KILL_AFTER, rename)
    adapter = tree(tmp_path / "after")["step-1.tmp/adapter.safetensors"]
    assert len(adapter) > 4000
    assert tree(tmp_path / "before") == {"step-1.tmp/state.json": b"{}\n", "step-1.tmp/*": adapter}
    assert tree(tmp_path / "after") == {"step-1.tmp/state.json": b"{}\n", "step-1.tmp/adapter.safetensors": adapter}


def test_a_torn_write_leaves_half_of_its_bytes(trials: Trials, tmp_path: Path) -> None:
    outcome = trials.run(WRITE_TWICE, {"folder": str(tmp_path)}, fault=(Mode.TORN, 4, tmp_path))
    assert outcome.signal == 9
    assert tree(tmp_path) == {"first": b"y" * 100, "second": b"y" * 50}


def test_a_full_disk_raises_enospc_in_python_and_stays_full(trials: Trials, tmp_path: Path) -> None:
    outcome = trials.run(WRITE_TWICE, {"folder": str(tmp_path)}, fault=(Mode.ENOSPC, 2, tmp_path))
    assert outcome.exit_code == 28
    assert tree(tmp_path) == {"first": b""}
    outcome = save(trials, tmp_path / "run", Mode.ENOSPC, SAVE_OPS.index("write") + 1)
    assert outcome.exit_code == 1
    assert "OSError: [Errno 28] No space left on device" in outcome.stderr
    assert "renameat" not in {op.name for op in outcome.log}


def test_a_full_disk_is_an_error_from_safetensors(trials: Trials, tmp_path: Path) -> None:
    header = SAVE_OPS.index("ftruncate") + 2
    outcome = save(trials, tmp_path, Mode.ENOSPC, header)
    assert outcome.exit_code == 1
    assert "SafetensorError" in outcome.stderr
    assert "No space left on device" in outcome.stderr
    assert outcome.log[-1].name == "unlink", "deleting still works on a full disk"
    assert tree(tmp_path) == {"step-1.tmp/state.json": b"{}\n"}


def test_an_input_output_error_comes_once(trials: Trials, tmp_path: Path) -> None:
    outcome = trials.run(WRITE_TWICE, {"folder": str(tmp_path)}, fault=(Mode.EIO, 2, tmp_path))
    assert outcome.exit_code == 5
    outcome = save(trials, tmp_path / "run", Mode.EIO, SAVE_OPS.index("ftruncate") + 2)
    assert (outcome.exit_code, "Input/output error" in outcome.stderr) == (1, True)
    assert outcome.log[-1].name == "unlink"
    assert tree(tmp_path / "run") == {"step-1.tmp/state.json": b"{}\n"}, "the deletion that followed went through"


def test_a_short_write_tells_its_length_and_then_the_disk_is_full(trials: Trials, tmp_path: Path) -> None:
    outcome = trials.run(WRITE_TWICE, {"folder": str(tmp_path)}, fault=(Mode.SHORT_WRITE, 2, tmp_path))
    assert (outcome.exit_code, outcome.stdout) == (28, "first 50\n")
    assert tree(tmp_path) == {"first": b"y" * 50}, "the second could not be created"


def test_operations_outside_the_prefix_are_left_alone(trials: Trials, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    for folder, ops in (("run-2", 0), ("run", 4), ("link", 4), ("run-2/../run", 4)):
        args = {"folder": str(tmp_path / folder)}
        outcome = trials.run(WRITE_TWICE, args, fault=(Mode.COUNT, 0, tmp_path / "run"))
        assert (folder, outcome.exit_code, outcome.ops) == (folder, 0, ops)
    outcome = trials.run(
        WRITE_TWICE, {"folder": str(tmp_path / "run-2")}, fault=(Mode.KILL_BEFORE, 1, tmp_path / "run")
    )
    assert outcome.exit_code == 0


def test_a_child_computes_on_two_threads(trials: Trials) -> None:
    outcome = trials.run("tests.faults.jobs:compute", {"threads": 2}, limit_seconds=30)
    assert (outcome.exit_code, outcome.stderr, outcome.timed_out) == (0, "", False)


def test_a_hanging_child_is_killed_with_what_it_started(trials: Trials) -> None:
    outcome = trials.run("tests.faults.jobs:spawn_sleeper", {}, limit_seconds=0.3)
    assert (outcome.signal, outcome.timed_out) == (9, True)
    assert outcome.seconds < 5
    grandchild = Path("/proc") / outcome.stdout.strip() / "stat"
    deadline = time.monotonic() + 5
    while grandchild.exists() and grandchild.read_text().split(") ")[1][0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grandchild.exists() or grandchild.read_text().split(") ")[1][0] == "Z"
    outcome = trials.run("tests.faults.jobs:spawn_sleeper", {}, kill_after_seconds=0.1)
    assert (outcome.signal, outcome.timed_out) == (9, False)
    assert 0.1 <= outcome.seconds < 5


def test_outcomes_tell_exit_codes_exceptions_and_unknown_jobs(trials: Trials) -> None:
    assert trials.run("builtins:int", {}).exit_code == 0
    assert trials.run("sys:exit", {}).exit_code == 0
    refused = trials.run("tests.faults.jobs:missing", {})
    assert (refused.exit_code, "AttributeError" in refused.stderr) == (1, True)


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"), Trials(["no_such_module"]):
        pass


def test_programs_started_by_an_armed_process_run_on(tmp_path: Path) -> None:
    library = compile_shim(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import ctypes, subprocess; shim = ctypes.CDLL(None)\n"
        f"assert shim.faults_arm({os.fsencode(folder)!r}, ctypes.c_long(1), {int(Mode.KILL_BEFORE)}) == 0\n"
        f"subprocess.run(['touch', {str(folder / 'made')!r}], check=True)\n"
        "print(shim.faults_count()); shim.faults_disarm()\n"
        f"open({str(folder / 'after')!r}, 'w').close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert set(tree(folder)) == {"made", "after"}
