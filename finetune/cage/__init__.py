"""A command that runs what a model has written: each time in a child that can do little, and ends with all it started.

The child (``inside.py``) writes to its own folder alone (Landlock), opens no socket (seccomp), has limits on time,
memory, file size and processes, no privileges and an empty environment; where the system allows namespaces it also has
no network at all, sees no other processes, and its folder is bounded as a whole. A system without Landlock gets a
fault, never a child that is held by less.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault

CHILD = Path(__file__).with_name("inside.py")
_PYTHON = (sys.executable, "-I", "-S", str(CHILD))
_READ = 64 << 10
"""Bytes of what it printed that are looked at."""
_LATE = 20.0
"""Seconds beyond its own limit after which a child that says nothing is ended from outside."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``seconds`` of a clock, and of a processor for each process; ``memory``: GB of each one's address space and of
    what all of them hold; ``processes``: threads too."""

    seconds: float
    memory: float
    processes: int


@dataclass(frozen=True)
class Ended:
    """``code``: the command's, negative for a signal; None where it was stopped: ``why`` is time, processes, memory."""

    code: int | None
    why: str
    said: bytes


@functools.cache
def given() -> Mapping[str, Any]:
    """What this system gives: ``landlock`` (its version, 0 without), ``sockets`` (whether they can be taken away),
    ``namespaces``."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        said = subprocess.run([*_PYTHON, "probe"], capture_output=True, timeout=30, env={}, check=True).stdout
        found = json.loads(said)
        if isinstance(found, dict):
            return found
    return {"landlock": 0, "sockets": False, "namespaces": False}


def remarks() -> list[str]:
    """What is not held back here, in words; none where everything is."""
    found, said = given(), []
    if not found["namespaces"]:
        said.append("it sees other processes (it cannot touch them), and its folder is bounded file by file")
    if not found["sockets"] and not found["namespaces"]:
        said.append("it can reach the network")
    return said


def run_each(words: Sequence[str], inputs: Sequence[bytes], limits: Limits, key: str) -> list[Ended]:
    """The command once for each input, which it finds on its standard input; several at a time.

    ``key``: where a recipe names it. Words that are paths of files here are made absolute: the command runs elsewhere.

    Raises:
        EnvironmentFault: the system cannot hold it, or it cannot be started.
    """
    if not given()["landlock"]:
        what = "this system has no Landlock (Linux 5.13): what a model has written would run with all your rights"
        raise EnvironmentFault(what, key, "run it on such a system, or judge with another metric")
    found = shutil.which(words[0])
    if found is None:
        raise EnvironmentFault(f"there is no command {words[0]}", key, "install it, or write its path")
    placed = [str(Path(found).absolute()), *map(_placed, words[1:])]
    pool = ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1))
    try:
        return list(pool.map(lambda data: _run(placed, data, limits, key), inputs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _placed(word: str) -> str:
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or none
        if Path(word).exists():
            return str(Path(word).absolute())
    return word


def _run(words: Sequence[str], data: bytes, limits: Limits, key: str) -> Ended:
    """One child, from its start to its end."""
    with (
        tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given_to, tempfile.TemporaryFile() as out,
    ):  # fmt: skip
        given_to.write(data)
        given_to.seek(0)
        asked = {
            "words": list(words), "folder": folder, "seconds": limits.seconds, "memory": limits.memory,
            "processes": limits.processes, "parent": os.getpid(), "namespaces": given()["namespaces"],
            "environment": {"PATH": os.environ.get("PATH", os.defpath), "LANG": os.environ.get("LANG", "C.UTF-8")},
        }  # fmt: skip
        report, end = os.pipe()
        try:
            process = subprocess.Popen(
                [*_PYTHON, json.dumps(asked), str(end)], stdin=given_to, stdout=out, stderr=subprocess.DEVNULL,
                pass_fds=[end], start_new_session=True, env={},
            )  # fmt: skip
        except OSError as error:
            os.close(report)
            raise EnvironmentFault(f"no child can be started: {error.strerror}", key, "free some memory") from None
        finally:
            os.close(end)
        try:
            told = _told(report, time.monotonic() + limits.seconds + _LATE)
            if told:  # it ends by itself, and only once nothing that it started is left
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LATE)
        finally:
            os.close(report)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if "fault" in told or not told:
            raise EnvironmentFault(
                f"the command cannot be run: {told.get('fault', 'its child was killed')}", key, "mend the command"
            )
        out.seek(0)
        return Ended(told.get("code"), told.get("why", ""), out.read(_READ))


def _told(report: int, end: float) -> dict[str, Any]:
    """What the child reports first of the command's end (why it never began, before its code); nothing if too late."""
    said = b""
    while not said.endswith(b"\n") and (left := end - time.monotonic()) > 0:
        if select.select([report], [], [], left)[0]:
            more = os.read(report, 4096)
            if not more:
                break
            said += more
    first, whole, _ = said.partition(b"\n")
    found = json.loads(first) if whole else {}
    return found if isinstance(found, dict) else {}
