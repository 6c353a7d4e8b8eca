"""What stands between an answer that is tried out and this machine. Run as a script, with the standard library alone.

It puts itself into namespaces of its own where the system lets it, starts the command behind ``walls``, and watches it
from inside: how long it takes, and how many processes and how much memory it and its kin have.

    python -I -S inside.py '{"words": …, "folder": …, …}' REPORT     # REPORT: a file descriptor for one JSON object
    python -I -S inside.py probe                                     # prints what the system gives
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from finetune.cage import walls
else:
    import walls

LOOK = 0.02
"""Seconds between two looks at the processes inside."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def become(asked: dict[str, Any], others: int, report: int) -> None:
    """The command itself. What fails here is told in the report, which the command does not inherit."""
    try:
        walls.limits(asked["seconds"], asked["memory"], asked["processes"] + others)
        if not os.getuid():
            walls.strange(asked["folder"], asked["pid"])
        os.chdir(asked["folder"])
        walls.prctl(walls.NO_NEW_PRIVS, 1)
        walls.no_writing_elsewhere(asked["folder"], walls.landlock())
        walls.no_sockets()
        os.execvpe(asked["words"][0], asked["words"], asked["environment"])
    except BaseException as error:  # noqa: BLE001 - whatever it is, the command must not run in half a cage
        tell(report, {"fault": f"{type(error).__name__}: {error}"})
        os._exit(125)


def tell(report: int, value: dict[str, Any]) -> None:
    os.write(report, json.dumps(value).encode() + b"\n")


def kin() -> dict[int, tuple[int, int]]:
    """Every process that came of this one, wherever it has put itself: number → (threads, bytes)."""
    parents, found = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(name)] = int(fields[1])
        found[int(name)] = int(fields[17]), int(fields[21]) * PAGE
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return {pid: found[pid] for pid in own - {os.getpid()}}


def mine() -> int:
    """How many threads this user has, whom a limit on processes counts."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def end_all() -> None:
    """Kill whatever came of this process; those that could fork meanwhile are stopped first."""
    for _ in range(1000):
        alive = kin()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in alive:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # nobody is left
            return
        time.sleep(LOOK / 10)


def watch(first: int, asked: dict[str, Any], counted: bool) -> dict[str, Any]:
    """How the command ended: its code, or what it had too much of."""
    began, looked = time.monotonic(), 0.0
    while True:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == first:
                return {"code": os.waitstatus_to_exitcode(found[1])}
        now = time.monotonic()
        if now - began > asked["seconds"]:
            return {"why": "time"}
        if counted and now - looked > LOOK:
            looked, every = now, kin().values()
            if sum(threads for threads, _ in every) > asked["processes"]:
                return {"why": "processes"}
            if sum(memory for _, memory in every) > asked["memory"] * 1e9:
                return {"why": "memory"}
        time.sleep(LOOK / 10)


def inside(asked: dict[str, Any], report: int, namespaces: bool) -> None:
    """Start the command, watch it, tell how it ended. Orphans inside become children of this process."""
    counted = walls.furnish(asked["folder"]) if namespaces else True
    walls.prctl(walls.SUBREAPER, 1)
    first = os.fork()
    if not first:
        become(asked, 1 if namespaces or not os.getuid() else mine(), report)
    found = watch(first, asked, counted)
    if not namespaces:  # else the kernel ends them with this one
        end_all()
    tell(report, found)


def main() -> None:
    if sys.argv[1] == "probe":
        sockets = platform.machine() in walls.SOCKETS
        print(json.dumps({"landlock": walls.landlock(), "sockets": sockets, "namespaces": walls.apart()}))
        return
    asked, report = json.loads(sys.argv[1]) | {"pid": os.getpid()}, int(sys.argv[2])
    os.set_inheritable(report, False)
    walls.prctl(walls.DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != asked["parent"]:
        return
    if not (asked["namespaces"] and walls.apart()):
        inside(asked, report, False)
        return
    watcher = os.fork()  # the first process of the new namespace: with it all others there end
    if not watcher:
        try:
            walls.prctl(walls.DEATH_SIGNAL, signal.SIGKILL)
            inside(asked, report, True)
        except BaseException as error:  # noqa: BLE001 - told, not lost
            tell(report, {"fault": f"{type(error).__name__}: {error}"})
        os._exit(0)
    os.waitpid(watcher, 0)


if __name__ == "__main__":
    main()
