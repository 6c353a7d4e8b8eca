"""The run folder: the only owner of its paths, and the only way files in it are written.

Every file appears whole or not at all: bytes go to a temporary name in the same folder, are flushed to the disk,
renamed into place, and the folder's own entry is flushed. A crash leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.errors import EnvironmentFault

_OURS = {".lock", "identity.json"}
_LEFTOVER = re.compile(r"\.tmp-\d+(-old|-unpacked)?$")
_GLANCE = 0.2  # seconds to wait for a lock: who looks whether a run is under way (``ended``) holds it for an instant
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class RunFolder:
    """Names inside one run folder; reading ``ls`` of it tells the story of the run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def identity(self) -> Path:
        return self.root / "identity.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def named_rows(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def losses(self) -> Path:
        return self.root / "losses.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def finished(self) -> Path:
        return self.root / "finished.json"

    @property
    def stopped(self) -> Path:
        return self.root / "stopped.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one process; the kernel frees it when that process dies, however it dies.

        Raises:
            EnvironmentFault: another process holds it.
        """
        make_folder(self.root)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=_GLANCE, poll_interval=_GLANCE / 10)
        except Timeout:
            what, fix = "another finetune process is working in this folder", "wait for it or stop it"
            raise EnvironmentFault(what, str(self.root), f"{fix}, or give the recipe another `output:`") from None
        except OSError as error:
            raise disk_fault(error, self.root) from error
        try:
            yield
        finally:
            lock.release()

    def refuse_foreign(self) -> None:
        """A folder with somebody's files and no run in it is not ours to write into, not even a lock."""
        if self.identity.exists() or not self.root.is_dir():
            return
        if self.checkpoints.is_dir():
            what = "this folder holds a run without its identity.json: what it belongs to cannot be told"
            raise EnvironmentFault(what, str(self.root), "put the file back, or give the recipe another `output:`")
        foreign = [entry.name for entry in self.root.iterdir() if entry.name not in _OURS and ".tmp-" not in entry.name]
        if foreign and not self.identity.exists():  # another process may have begun the run just now
            what = f"the output folder holds other files ({foreign[0]})"
            raise EnvironmentFault(what, str(self.root), "give the recipe an empty or new `output:`")

    def clear_leftovers(self) -> None:
        """Remove what a killed process left half-written. Only call while holding the lock."""
        for folder in (self.root, self.checkpoints):
            for entry in folder.glob("*.tmp-*") if folder.is_dir() else ():
                if _LEFTOVER.search(entry.name):
                    remove(entry)


def clear_leftovers_of(path: Path, but: str = "") -> None:
    """Remove what killed commands left beside ``path`` under its temporary names, and nothing else."""
    for entry in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        if entry.name != but and _LEFTOVER.fullmatch(entry.name.removeprefix(path.name)):
            remove(entry)


def disk_fault(error: OSError, path: Path) -> EnvironmentFault:
    """The coded form of an operating-system error met while writing ``path``."""
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        return EnvironmentFault(f"there is no folder {path.parent}", str(path), "make it first, or write elsewhere")
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = "free some space and run the same command again" if error.errno in _DISK_FULL else "mend that and run again"
    return EnvironmentFault(f"cannot write: {reason}", str(path), fix)


def user_cache() -> Path:
    """This tool's part of the user's cache folder, as the desktop's convention has it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The convention says that a relative path is to be ignored.
    return Path(named if named.startswith("/") else os.path.expanduser("~/.cache")) / "finetune"  # noqa: PTH111 - never raises


def make_folder(path: Path) -> None:
    """Make a folder and its parents; that they exist survives power loss."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_fault(error, path) from error
    for made in reversed(missing):
        sync_folder(made.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is already gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder that readers must see whole or not at all: it loses its name first.

    What a crash leaves has a temporary name, and the next start clears it.
    """
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-old")
    try:
        folder.rename(aside)
    except OSError as error:
        raise disk_fault(error, folder) from error
    remove(aside)


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries, so that a rename in it survives power loss."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Flush a file that was written piece by piece."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_fault(error, path) from error


def write_synced(path: Path, data: bytes | memoryview, name: Path | None = None) -> None:
    """Write and flush one file in place. For files inside a folder that is itself renamed when complete, or that get
    another ``name`` then, which a fault is told of.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_fault(error, name or path) from error


def rename(path: Path, to: Path) -> None:
    """Give a file that is whole and flushed its name."""
    try:
        path.rename(to)
    except OSError as error:
        raise disk_fault(error, to) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace one file: readers see the old bytes or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_synced(temporary, data, path)
        temporary.replace(path)
    except OSError as error:
        remove(temporary)
        raise disk_fault(error, path) from error
    except BaseException:
        remove(temporary)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The file's value, or None where it is absent or damaged (the caller then makes it anew)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded temporary folder; on leaving without an error it becomes ``path`` in one rename. A folder that
    is already there is moved aside first and removed last.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    make_folder(path.parent)
    try:
        remove(temporary)
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if path.exists() or path.is_symlink():
            path.rename(aside)
        temporary.rename(path)
        sync_folder(path.parent)
        remove(aside)
    except BaseException as error:
        if aside.exists() and not path.exists():
            aside.rename(path)
        remove(temporary)
        if isinstance(error, OSError):
            raise disk_fault(error, path) from error
        raise
