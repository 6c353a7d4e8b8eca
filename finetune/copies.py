"""Copies of a run at another place, for machines that are taken away: sent after saves, fetched into an empty folder.

A copy is a folder of its own below the place, never written twice, and its manifest is written last, under another name
first: without one, or with one that a file does not fit, it is passed over for the one before. What is sent are hard
links of the run's files, so that training goes on meanwhile. A place that fails stops nothing: it is said once, tried
again at every save, and at the end the exit code tells. Credentials are the environment's; none are in the address.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from finetune import checkpoint, identity, manifest, starts, taught
from finetune.errors import EnvironmentFault, Fault, FinetuneError
from finetune.identity import Identity
from finetune.runfolder import RunFolder, disk_fault, make_folder, remove, sync_folder, write_synced
from finetune.terminal import Terminal, clean

_NAME = re.compile(r"step-(\d{8})-(\d{20})")
_STEP = len("step-00000000")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_TRIES = 3
_PAUSE = 2.0
"""Seconds before the second try at the end; the third waits twice as long."""
_MANY = 10_000_000
"""Bytes of a manifest that is read: one of ours has some thousand."""


class Copies:
    """The copies of one run below ``url``, in a folder of the run folder's name; the newest ``keep`` stay there.

    Raises:
        EnvironmentFault: what the address needs is not installed, or cannot be understood.
    """

    def __init__(self, url: str, folder: RunFolder, keep: int, terminal: Terminal) -> None:
        from fsspec.core import url_to_fs

        self.url = f"{url.rstrip('/')}/{folder.root.name}"
        self.folder, self.keep, self._terminal = folder, keep, terminal
        try:
            self._fs, self._root = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise EnvironmentFault(_said(error), f"train.copy_to: {url}", "install that package") from None
        except Exception as error:  # noqa: BLE001 — each kind of place has errors of its own
            raise EnvironmentFault(_said(error), f"train.copy_to: {url}", "mend the address") from None
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")
        self._sending: Future[None] | None = None
        self._due = self._told = False
        self.seconds = 0.0
        """What the last copy took."""

    # ---- sending

    def saved(self, step: int) -> None:
        """The run was saved after that step: send it as it stands, unless the copy before is still under way."""
        self._due = True
        if self._arrived():
            self._send(step)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A run goes on inside; at its end, however it ends, the last state is sent.

        Raises:
            EnvironmentFault: the run ended well, but its copy could not be made.
        """
        try:
            yield
        except BaseException:
            fault = self._finish()
            if fault:
                self._terminal.say(f"{self.url} has no copy of the last state: {fault}")
            raise
        self._due = True  # finished.json, the adapter and the last scores
        if fault := self._finish():
            what = f"the run is whole in {self.folder.root}, but its last state could not be copied: {fault}"
            raise EnvironmentFault(what, self.url, "the same command tries again")

    def _finish(self) -> str:
        """Wait, and send what has not arrived, trying again; what went wrong, empty where nothing did."""
        with self._sender:
            fault = self._wait()
            for attempt in range(_TRIES):
                if not self._due:
                    return ""
                time.sleep(_PAUSE * attempt)
                self._send(None)
                fault = self._wait()
            return fault

    def _wait(self) -> str:
        """Until nothing is under way; how that failed."""
        fault = self._sending.exception() if self._sending else None
        self._arrived()
        return _said(fault) if fault else ""

    def _arrived(self) -> bool:
        """Whether nothing is under way; a copy that failed is told, the first time."""
        if self._sending is None:
            return True
        if not self._sending.done():
            return False
        fault, self._sending = self._sending.exception(), None
        if fault:
            self._due = True
            if not self._told:
                self._told = True
                again = "it is tried again at every save"
                self._terminal.say(f"{self.url}: no copy could be made ({_said(fault)}); {again}")
        return True

    def _send(self, step: int | None) -> None:
        """The state after ``step``, a checkpoint just written; None: the newest one that verifies."""
        place = self.folder.root / f"copy.tmp-{os.getpid()}"
        remove(place)
        if step is None:
            step = next(iter(checkpoint.steps(self.folder.checkpoints, lambda _: None)), 0)
        snapshot(self.folder, step, place)
        self._due = False
        self._sending = self._sender.submit(self._upload, place, f"step-{step:08d}-{time.time_ns():020d}")

    def _upload(self, place: Path, name: str) -> None:
        began, entries = time.monotonic(), manifest.digests(place)
        whole = [one for one in self._names() if self._is_whole(one)]
        if not whole or self._entries(whole[0]) != entries:
            self._put(place, f"{self._root}/{name}", entries)
            with contextlib.suppress(Exception):  # what may not be removed there only takes room
                self._rotate()
        remove(place)
        self.seconds = time.monotonic() - began

    def _put(self, place: Path, target: str, entries: dict[str, str]) -> None:
        for relative in entries:
            there = f"{target}/{relative}"
            self._fs.makedirs(str(PurePosixPath(there).parent), exist_ok=True)
            self._fs.put_file(str(place / relative), there)
            if (found := self._fs.info(there)["size"]) != (size := (place / relative).stat().st_size):
                raise OSError(f"{relative} has {found} bytes there and {size} here")
        last = f"{target}/{manifest.NAME}"
        self._fs.pipe_file(f"{last}.tmp", json.dumps({"sha256": entries}, indent=2).encode())
        self._fs.mv(f"{last}.tmp", last)

    def _rotate(self) -> None:
        """The newest whole copy of each of the newest ``keep`` steps stays; what else is older than the newest goes."""
        names = self._names()
        whole = [name for name in names if self._is_whole(name)]
        newest = {name[:_STEP]: name for name in reversed(whole)}
        kept = sorted(newest.values(), reverse=True)[: self.keep]
        for name in names:
            if kept and name not in kept and name < kept[0]:
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _names(self) -> list[str]:
        """All copies, whole or not, the newest first."""
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(str(path)).name for path in found)
        return sorted((name for name in names if _NAME.fullmatch(name)), reverse=True)

    def _is_whole(self, name: str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{name}/{manifest.NAME}"))

    def _entries(self, name: str) -> dict[str, str] | None:
        """File → sha-256 as a copy's manifest says; None where it is damaged."""
        try:
            stored = json.loads(self._fs.cat_file(f"{self._root}/{name}/{manifest.NAME}", end=_MANY))["sha256"]
            return {str(relative): str(digest) for relative, digest in stored.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    # ---- fetching

    def fetch(self, own: Identity, *, extend: bool) -> None:
        """Where the run folder has no state, put the newest whole copy there. Call with the folder locked.

        Raises:
            EnvironmentFault: the place cannot be read, so that it is not known whether there is a copy.
            FinetuneError: the copy is of another run, as ``identity.compare`` says.
        """
        if self.folder.finished.exists() or checkpoint.steps(self.folder.checkpoints, lambda _: None):
            return
        place = self.folder.root / f"fetched.tmp-{os.getpid()}"
        try:
            for name in self._names():
                if self._is_whole(name) and self._taken(name, place, own, extend):
                    return
        except FinetuneError:
            raise
        except Exception as error:  # noqa: BLE001 — each kind of place has errors of its own
            fix = "give the command again when it can be reached, or begin without it: --set train.copy_to=null"
            raise EnvironmentFault(f"copies of this run cannot be looked for: {_said(error)}", self.url, fix) from None
        finally:
            remove(place)

    def _taken(self, name: str, place: Path, own: Identity, extend: bool) -> bool:
        """Fetch a copy to ``place``, judge it, and move its files to theirs; False where it does not hold."""
        remove(place)
        make_folder(place)
        if fault := self._download(name, place):
            self._terminal.say(f"copy {self.url}/{name} is passed over: {clean(fault)}")
            return False
        stored = identity.read(place / self.folder.identity.name)
        if stored is None:
            return False
        try:
            identity.compare(stored, own, self.folder.root, extend=extend)
        except FinetuneError as error:
            where, fix = f"{self.url} holds a run of this name: ", "; or give the run another `output:`"
            raise type(error).of([Fault(one.what, where + one.where, one.fix + fix) for one in error.faults]) from None
        for path in _files(place):  # checkpoints last: without one, the next start fetches again
            target = self.folder.root / path.relative_to(place)
            make_folder(target.parent)
            path.replace(target)
            sync_folder(target.parent)
        self._terminal.say(f"taken over from {self.url}/{name}")
        return True

    def _download(self, name: str, place: Path) -> str:
        """What is wrong with a copy; empty where every file has come and has its digest."""
        entries = self._entries(name)
        if entries is None:
            return "its manifest is damaged"
        for relative in entries:
            if not all(_PART.fullmatch(part) for part in relative.split("/")):
                return f"its manifest names {relative!r}"
            make_folder((place / relative).parent)
            try:
                self._fs.get_file(f"{self._root}/{name}/{relative}", str(place / relative))
            except FileNotFoundError:
                return f"{relative} is missing"
            with (place / relative).open("rb") as file:
                os.fsync(file.fileno())
        wrong = [relative for relative, digest in entries.items() if manifest.digest(place / relative) != digest]
        return f"{wrong[0]} is damaged (its digest differs)" if wrong else ""


def snapshot(folder: RunFolder, step: int, place: Path) -> None:
    """The run's files at ``place``, as they are now: hard links, or copies where there are none.

    The checkpoint of ``step`` (0: none), the best adapter, the finished one, what it began with, and what tells of the
    run; no tracker's files.
    """
    make_folder(place)
    whole = [folder.checkpoints / checkpoint.folder_name(step)] if step else []
    beside = (folder.root / name for name in (starts.FOLDER, taught.FOLDER))
    whole += [
        path for path in (*folder.checkpoints.glob("best-*"), folder.adapter, *beside) if not manifest.faults(path)
    ]
    named = (path for path in folder.root.iterdir() if _PART.fullmatch(path.name) and ".tmp-" not in path.name)
    loose = [path for path in named if path.is_file()]
    for path in (*loose, *(path for part in whole for path in part.iterdir())):
        target = place / path.relative_to(folder.root)
        make_folder(target.parent)
        try:
            if path == folder.metrics:  # the one file that grows in place
                write_synced(target, path.read_bytes())
            else:
                _link(path, target)
        except OSError as error:
            raise disk_fault(error, target) from error


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _files(place: Path) -> list[Path]:
    """Every file below, those of checkpoints last."""
    files = (path for path in place.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: (path.relative_to(place).parts[0] == "checkpoints", path))


def _said(error: BaseException) -> str:
    return clean(str(error) or type(error).__name__)
