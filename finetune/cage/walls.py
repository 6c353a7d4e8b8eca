"""The kernel's own means of holding a process back, called as they are: with the standard library alone, Linux only.

Namespaces, Landlock, seccomp, limits on resources, and for root another user. Each function raises OSError where the
kernel refuses, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import sys
from typing import Any

USER, MOUNT, NET, PID, IPC = 0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000  # CLONE_NEW…, sched.h
RULESET, RULE, RESTRICT = 444, 445, 446  # Landlock's system calls, the same everywhere
WRITES = [1 << 1, *(1 << bit for bit in range(4, 13))]  # write, remove, make: LANDLOCK_ACCESS_FS_…, linux/landlock.h
REFER, TRUNCATE, WRITE_FILE = 1 << 13, 1 << 14, 1 << 1
NO_NEW_PRIVS, SECCOMP, DEATH_SIGNAL, SECUREBITS, SUBREAPER, AMBIENT = 38, 22, 1, 28, 36, 47  # prctl(2)
NO_ROOT = 0b1111  # uid 0 gains nothing by an exec, and setuid changes nothing; both locked: linux/securebits.h
SOCKETS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # audit architecture, number of socket(2)
IO_URING = 425  # another way to a socket
MOUNT_SETATTR, RECURSIVE = 442, 0x8000
FILES, FOLDER = 16 << 20, "64m"  # bytes of one file; of the whole folder, where it is a file system of its own

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """A function of the C library. Raises OSError."""
    done: int = getattr(libc, name)(*arguments)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return done


def prctl(option: int, *values: int) -> int:
    return call("prctl", option, *[ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]])


def landlock() -> int:
    """The version of Landlock that the kernel has, 0 without."""
    return max(0, int(libc.syscall(RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def apart() -> bool:
    """Namespaces of one's own: no network, no processes but those inside, mounts that nobody else sees.

    In a user namespace, or, for root where those are forbidden, without. Returns whether it was possible.
    """
    for kinds in (USER | MOUNT | NET | PID | IPC, MOUNT | NET | PID | IPC):
        writer, ready = _mapping() if kinds & USER else (0, 0)
        try:
            call("unshare", kinds)
        except OSError:
            continue
        finally:
            if writer:
                os.close(ready)  # whether or not there is anything to map, the other one goes on
                os.waitpid(writer, 0)
        return True
    return False


def _mapping() -> tuple[int, int]:
    """A process that stays outside and, once this one has a user namespace, says who is who there: this user, and for
    root a stranger too, as whom the command runs. Only from outside may more than oneself be named."""
    uid, gid, target = os.getuid(), os.getgid(), os.getpid()
    wait, ready = os.pipe()
    writer = os.fork()
    if writer:
        os.close(wait)
        return writer, ready
    os.close(ready)
    os.read(wait, 1)
    stranger = f"{stranger_of(target)} {stranger_of(target)} 1\n" if not uid else ""
    for more in (stranger, "") if stranger else ("",):
        try:
            if uid:
                _write(f"/proc/{target}/setgroups", "deny")
            _write(f"/proc/{target}/uid_map", f"0 {uid} 1\n{more}")
            _write(f"/proc/{target}/gid_map", f"0 {gid} 1\n{more}")
        except OSError:
            continue
        break
    os._exit(0)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def stranger_of(pid: int) -> int:
    """A user who owns nothing and has no other process: root's processes cannot be limited, this one's can."""
    return 1_900_000_000 + pid


def furnish(folder: str) -> bool:
    """Within namespaces: nothing can be written but a folder of limited size, and /proc shows the processes inside and
    no others. Returns whether that last is so."""
    private, plain = 1 << 18 | 1 << 14, 0b1110  # MS_PRIVATE | MS_REC; nosuid, nodev, noexec
    call("mount", b"none", b"/", None, ctypes.c_ulong(private), None)
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY
    with contextlib.suppress(OSError):  # before Linux 5.12; Landlock holds all the same
        call("syscall", MOUNT_SETATTR, -100, b"/", RECURSIVE, ctypes.byref(read_only), ctypes.c_size_t(32))
    options = f"size={FOLDER},nr_inodes=20k,mode=0700".encode()
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(plain & 0b0110), options)
    try:
        call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(plain), None)
    except OSError:  # containers hide parts of /proc, and then a whole one may not be shown
        return False
    return True


def strange(folder: str, pid: int) -> None:
    """For root: nothing is gained by being root, and as far as possible become somebody who can still read what root
    reads and has nothing else of root's."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    who = stranger_of(pid)
    with contextlib.suppress(OSError):  # no privileges to lose
        prctl(SECUREBITS, NO_ROOT)
    try:
        os.chown(folder, who, who)
        os.setgroups([])
        os.setresgid(who, who, who)
        os.setresuid(who, who, who)
    except OSError:
        return
    for bit in (2, 1, None):  # CAP_DAC_READ_SEARCH; where there is none, CAP_DAC_OVERRIDE, which Landlock bounds
        kept = 0 if bit is None else 1 << bit
        with contextlib.suppress(OSError):
            data = (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0)
            call("capset", ctypes.byref(Header(0x20080522, 0)), ctypes.byref(data))
            if bit is not None:
                prctl(AMBIENT, 2, bit)  # PR_CAP_AMBIENT_RAISE
            return


def no_writing_elsewhere(folder: str, version: int) -> None:
    """By Landlock: files are made, changed and removed in the folder alone. No TCP, no signals to the outside."""

    class Handled(ctypes.Structure):
        _fields_ = [("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("allowed", ctypes.c_uint64), ("place", ctypes.c_int32)]

    rights = sum(WRITES) | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    handled = Handled(rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = call("syscall", RULESET, ctypes.byref(handled), ctypes.c_size_t(size), ctypes.c_uint32(0))
    of_a_file = WRITE_FILE | (TRUNCATE if version >= 3 else 0)
    for place, allowed in ((folder, rights), ("/dev/null", of_a_file)):
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rule = Beneath(allowed, opened)
        call("syscall", RULE, rules, ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(opened)
    call("syscall", RESTRICT, rules, ctypes.c_uint32(0))
    os.close(rules)


def no_sockets() -> bool:
    """By seccomp: socket(2) and io_uring fail; pairs of sockets between one's own processes stay. Returns whether."""
    if platform.machine() not in SOCKETS or sys.maxsize < 2**32:
        return False
    architecture, number = SOCKETS[platform.machine()]

    class Step(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step))]

    load, equal, at_least, back = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    steps = [
        (load, 0, 0, 4), (equal, 0, 5, architecture), (load, 0, 0, 0), (at_least, 3, 0, 0x40000000),
        (equal, 2, 0, number), (equal, 1, 0, IO_URING), (back, 0, 0, 0x7FFF0000), (back, 0, 0, 0x00050001),
    ]  # fmt: skip
    program = Program(len(steps), (Step * len(steps))(*[Step(*one) for one in steps]))
    prctl(SECCOMP, 2, ctypes.addressof(program))
    return True


def limits(seconds: float, memory: float, processes: int) -> None:
    """What each process may have: seconds of a processor, GB of address space. ``processes``: of its user, in all."""
    wanted = {
        resource.RLIMIT_CPU: math.ceil(seconds), resource.RLIMIT_AS: int(memory * 1e9), resource.RLIMIT_FSIZE: FILES,
        resource.RLIMIT_NPROC: processes, resource.RLIMIT_NOFILE: 256, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }  # fmt: skip
    for name, value in wanted.items():
        most = resource.getrlimit(name)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(name, (value, value))
