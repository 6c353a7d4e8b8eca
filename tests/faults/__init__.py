"""Run a job many times from one warm process and break each run at a chosen moment.

Importing the training stack takes seconds, so one server process imports it once and forks a child per trial. The
library built from ``shim.c`` sits in that child: it counts every operation that changes files below a folder, and
kills the child or fails the operation at the chosen one.

    with Trials(preload=["finetune.pipeline"]) as trials:
        whole = trials.run("tests.faults.jobs:train", arguments)
        torn = trials.run("tests.faults.jobs:train", arguments, fault=Fault(Mode.TORN, 17, run_folder))
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHIM_SOURCE = Path(__file__).with_name("shim.c")


class Mode(IntEnum):
    """What happens at operation ``n``; the numbers are those of ``enum mode`` in ``shim.c``."""

    COUNT = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    TORN = 3  # a write leaves half of its bytes, then SIGKILL; any other operation: killed before it
    ENOSPC = 4  # the disk is full from here on: what needs space fails, deleting and syncing still work
    EIO = 5  # this one operation fails
    SHORT_WRITE = 6  # a write reports half of its bytes as written, then as ENOSPC: how a real disk fills up


class Fault(NamedTuple):
    """``n`` counts from 1 the operations below ``prefix``, a folder that need not exist yet."""

    mode: Mode
    n: int
    prefix: Path | str


class Op(NamedTuple):
    """One counted operation. ``other`` is the old name of a rename or link, else empty."""

    number: int
    name: str
    path: str
    other: str


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. Exactly one of ``exit_code`` and ``signal`` is set. ``log`` holds every operation begun, the
    one that was killed or failed included; it stays empty where no fault was asked for."""

    exit_code: int | None
    signal: int | None
    timed_out: bool
    seconds: float
    ops: int
    log: tuple[Op, ...]
    stdout: str
    stderr: str


def why_unavailable() -> str:
    """Why this machine cannot run trials, or an empty string: the reason a test gives for skipping."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "fault injection needs Linux on x86_64 or aarch64"
    return "" if shutil.which("cc") else "fault injection needs a C compiler (cc)"


def compile_shim(folder: Path) -> Path:
    """Build the library; raises CalledProcessError with the compiler's own words in ``stderr``."""
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(SHIM_SOURCE)]
    subprocess.run([*command, "-ldl"], check=True, capture_output=True, text=True)
    return library


class Trials:
    """The warm server and the folder of its scratch files. One trial at a time; open two for two at once."""

    def __init__(
        self,
        preload: Sequence[str] = ("finetune.pipeline",),
        *,
        threads: int = 2,
        env: Mapping[str, str] | None = None,
        start_seconds: float = 120,
    ) -> None:
        """``preload`` names modules to import once. Name lazily loaded ones too (a model's own module)."""
        self._preload = [preload] if isinstance(preload, str) else list(preload)
        # Waiting threads sleep: on a busy machine spinning ones multiply the time, with the same result.
        self._env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **(env or {})}
        self._start_seconds = start_seconds
        self._count = 0

    def __enter__(self) -> Trials:
        self._scratch = tempfile.TemporaryDirectory(prefix="faults-")
        try:
            self._start(Path(self._scratch.name))
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def _start(self, folder: Path) -> None:
        library = compile_shim(folder)
        ours, theirs = socket.socketpair()
        self._server_log = folder / "server.log"
        # Libraries that start threads at import would make the fork unsafe: keep OpenBLAS and arrow's jemalloc quiet.
        quiet = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with theirs, self._server_log.open("wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.faults.forkserver", str(theirs.fileno()), *self._preload],
                cwd=ROOT,
                env={**os.environ, **quiet, **self._env, "LD_PRELOAD": str(library)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        self._stream = ours.makefile("rw", encoding="utf-8")
        try:
            ours.settimeout(self._start_seconds)
            self._receive()
            ours.settimeout(None)  # from here on the server itself keeps the time
        except BaseException:
            self._stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._scratch.cleanup()

    def _stop(self) -> None:
        self._stream.close()
        self._socket.close()  # the server ends at the end of its input, with the child it may be running
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the server ended or did not answer"}
        if "error" in answer:
            tail = self._server_log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"fault injection: {answer['error']}\n{tail}".rstrip())
        return answer

    def run(
        self,
        callable_name: str,
        args: Mapping[str, Any],
        *,
        fault: Fault | tuple[Mode | int, int, Path | str] | None = None,
        kill_after_seconds: float | None = None,
        limit_seconds: float = 120,
    ) -> Outcome:
        """Fork a child that calls ``module:function`` with ``args`` (JSON values) as keywords; its result is the exit
        code. ``kill_after_seconds`` sends SIGKILL at that time; at ``limit_seconds`` too, and ``timed_out`` says so.
        """
        self._count += 1
        base = Path(self._scratch.name) / f"trial-{self._count}"
        stdout, stderr, log = (base.with_suffix(end) for end in (".out", ".err", ".log"))
        trial = {
            "callable": callable_name,
            "args": dict(args),
            "fault": None if fault is None else [int(fault[0]), fault[1], os.path.realpath(fault[2])],
            "kill_after": kill_after_seconds,
            "limit": limit_seconds,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "log": str(log),
        }
        self._stream.write(json.dumps(trial) + "\n")
        self._stream.flush()
        answer = self._receive()
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in (stdout, stderr, log)]
        for file in (stdout, stderr, log):
            file.unlink(missing_ok=True)
        log_rows = _read_log(texts[2])
        return Outcome(**answer, ops=len(log_rows), log=log_rows, stdout=texts[0], stderr=texts[1])


def _read_log(text: str) -> tuple[Op, ...]:
    rows = (line.split("\t") for line in text.split("\n") if line)
    return tuple(Op(int(number), name, path, other) for number, name, path, other in rows)
