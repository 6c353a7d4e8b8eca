"""The warm process: imports once, then forks a child per trial asked for, one JSON line in and one out.

It stays single-threaded, since a fork copies only the calling thread and would leave any lock of another one shut.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


def _shim() -> ctypes.CDLL:
    library = ctypes.CDLL(None)  # preloaded, so its functions are among the program's own
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    library.faults_log.argtypes = [ctypes.c_char_p]
    return library


def _thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def _check(code: int, what: str) -> None:
    if code < 0:
        raise OSError(-code, f"{what}: {os.strerror(-code)}")


def _redirect(trial: dict[str, Any]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for target, name in ((1, "stdout"), (2, "stderr")):
        fd = os.open(trial[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, target)
        os.close(fd)


def _child(shim: ctypes.CDLL, trial: dict[str, Any]) -> NoReturn:
    """Run the job and leave at once, without the interpreter's exit handlers, which belong to the server."""
    code = 1
    try:
        os.setsid()  # so that whatever it starts can be ended with it
        _redirect(trial)
        module, _, name = trial["callable"].partition(":")
        job = getattr(importlib.import_module(module), name)
        if trial["fault"] is not None:
            mode, n, prefix = trial["fault"]
            _check(shim.faults_log(os.fsencode(trial["log"])), "the log of operations")
            _check(shim.faults_arm(os.fsencode(prefix), n, mode), "the system-call filter")
        code = job(**trial["args"]) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - the child stands for a whole process: it ends here, with a traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _ended_within(pidfd: int, client: socket.socket, seconds: float) -> bool:
    """Wait for the child; a client that went away counts as time being up."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(client, select.POLLRDHUP)
    return any(fd == pidfd for fd, _ in poll.poll(max(0, seconds) * 1000))


def _run(shim: ctypes.CDLL, client: socket.socket, trial: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(shim, trial)
    limit, kill_after = trial["limit"], trial["kill_after"]
    early = kill_after is not None and kill_after < limit
    pidfd = os.pidfd_open(pid)
    try:
        ended = _ended_within(pidfd, client, kill_after if early else limit)
    finally:
        os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - started
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # workers the child left behind
    code = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "timed_out": not ended and not early,
        "seconds": seconds,
    }


def main(arguments: Sequence[str]) -> None:
    client = socket.socket(fileno=int(arguments[0]))
    stream = client.makefile("rw", encoding="utf-8")

    def answer(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    for module in arguments[1:]:
        importlib.import_module(module)
    threads = _thread_names()
    if len(threads) > 1:
        answer({"error": f"an import started threads, which a fork would lose: {', '.join(threads)}"})
        return
    answer({"ready": True})
    gc.collect()
    gc.freeze()  # children then copy fewer pages
    shim = _shim()
    with suppress(BrokenPipeError, ConnectionResetError):
        for line in stream:
            answer(_run(shim, client, json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1:])
