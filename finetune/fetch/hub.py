"""One repository of the hub at one commit: its listing, and its files streamed into huggingface_hub's own cache.

The cache's layout and locks are huggingface_hub's. The bytes are streamed here, because its own download drops a
half-fetched file when the connection breaks; and they enter the cache only once their digest is the one that the hub
names.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from finetune import manifest
from finetune.errors import EnvironmentFault, ModelError
from finetune.fetch import access, disk
from finetune.fetch.access import Access
from finetune.runfolder import make_folder, sync_file, write_atomic
from finetune.terminal import Terminal

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """``digest``: the sha-256 of a large file, git's blob id of a small one. The cache names the bytes by it."""

    name: str
    size: int
    digest: str


@dataclass(kw_only=True)
class Repository:
    """What ``look_up`` found. ``listing``: file name → (size, digest) as the endpoint says, unchecked."""

    access: Access
    terminal: Terminal
    commit: str
    listing: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def snapshot(self) -> Path:
        """The cache's folder of this commit; each file in it is a link to its bytes."""
        return self._home / "snapshots" / self.commit

    def file(self, name: str) -> File:
        """Raises ModelError where the repository has no such file, EnvironmentFault where nothing vouches for it."""
        if name not in self.listing:
            raise ModelError(f"the repository has no {name}", self.access.where, "name one that holds a whole model")
        size, digest = self.listing[name]
        if not isinstance(size, int) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            what = f"the endpoint gives no size or digest for {name}, so nothing vouches for its bytes"
            fix = "use another HF_ENDPOINT, or fetch the model and name its folder"
            raise EnvironmentFault(what, self.access.where, fix)
        return File(name, size, digest)

    def missing(self, file: File) -> int:
        """Bytes of it that are still to come."""
        if _has(self.snapshot / file.name, file.size) or _has(self._blob(file), file.size):
            return 0
        return max(0, file.size - _size(self._part(file)))

    def bring(self, file: File, told: Callable[[int], None]) -> Path:
        """One file, checked, in the snapshot; ``told`` hears of bytes as they come, less any that were for nothing.

        Raises:
            ModelError: its bytes are not what the hub names.
            EnvironmentFault: no access, no connection, no room; what came stays for the next attempt.
        """
        path, blob = self.snapshot / file.name, self._blob(file)
        if _has(path, file.size):
            return path
        make_folder(path.parent)
        make_folder(blob.parent)
        with self.access.coded(file.name), self._lock(file):
            if not _has(blob, file.size):
                self._obtain(file, told)
            path.unlink(missing_ok=True)
            path.symlink_to(f"../../blobs/{file.digest}")
        return path

    def name_commit(self) -> None:
        """Let the revision's name stand for this commit from now on. Called last, when the snapshot is whole."""
        if self.access.revision != self.commit:
            path = self._home / "refs" / self.access.revision
            make_folder(path.parent)
            write_atomic(path, self.commit.encode())

    @property
    def _home(self) -> Path:
        return disk.home(self.access.repo)

    def _blob(self, file: File) -> Path:
        return self._home / "blobs" / file.digest

    def _part(self, file: File) -> Path:
        return self._blob(file).with_name(f"{file.digest}.incomplete")

    @contextlib.contextmanager
    def _lock(self, file: File) -> Iterator[None]:
        """One process at a time fetches a file; huggingface_hub itself takes the same lock."""
        path = disk.cache() / ".locks" / self._home.name / f"{file.digest}.lock"
        make_folder(path.parent)
        lock = FileLock(path, mode=0o664)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.terminal.status(f"another process is fetching {file.name}: waiting for it", last=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _obtain(self, file: File, told: Callable[[int], None]) -> None:
        """Fetch the bytes and let them into the cache if they are the named ones.

        A crash can leave the end of a part damaged, so a file that was gone on with is tried once more from its start.
        """
        part = self._part(file)
        tries = 2 if _size(part) else 1
        for _ in range(tries):
            self._fill(file, told)
            if (manifest.digest(part) if len(file.digest) == 64 else _git_id(part)) == file.digest:
                sync_file(part)
                part.replace(self._blob(file))
                return
            told(-_size(part))
            part.unlink()
        what = f"{file.name} came with other bytes than the hub names; they were removed"
        fix = "run the same command again; if it stays, check HF_ENDPOINT and the proxy"
        raise ModelError(what, self.access.where, fix)

    def _fill(self, file: File, told: Callable[[int], None]) -> None:
        """Attempts until the whole file came; each goes on from the bytes that are there."""
        part = self._part(file)
        part.touch()
        pauses = list(access.PAUSES)
        while (before := _size(part)) < file.size:
            try:
                self._stream(file, told)
                return
            except access.transport() as error:
                if _size(part) > before:
                    pauses = list(access.PAUSES)
                if not pauses or not access.passes(error):
                    raise
                time.sleep(pauses.pop(0))

    def _stream(self, file: File, told: Callable[[int], None]) -> None:
        from huggingface_hub import get_session, hf_raise_for_status

        have = _size(self._part(file))
        headers = self.access.headers | ({"range": f"bytes={have}-"} if have else {})
        url = f"{self.access.endpoint}/{self.access.repo}/resolve/{self.commit}/{quote(file.name)}"
        request = get_session().stream("GET", url, headers=headers, timeout=access.SECONDS, follow_redirects=True)
        with self._part(file).open("ab") as out, request as answer:
            if have and answer.status_code in (200, 416):  # the whole file comes, or it is shorter than this part
                out.truncate(0)
                told(-have)
                have = 0
            hf_raise_for_status(answer)
            for block in answer.iter_bytes():
                out.write(block)
                have += len(block)
                told(len(block))
                if have > file.size:  # cannot be right: do not fill the disk with it
                    return


def look_up(repo: str, revision: str, terminal: Terminal) -> Repository:
    """Resolve a branch, tag or commit, and list what is there. Raises ModelError and EnvironmentFault."""
    through = access.open_access(repo, revision)
    data = through.ask()
    listing: dict[str, tuple[Any, Any]] = {}
    try:
        for entry in data["siblings"]:
            large = entry.get("lfs") or {}
            listing[entry["rfilename"]] = large.get("size", entry.get("size")), large.get("sha256", entry.get("blobId"))
        commit = data["sha"]
        sound = disk.COMMIT.fullmatch(commit) and (commit == revision or not disk.COMMIT.fullmatch(revision))
    except (AttributeError, KeyError, TypeError):
        sound = None
    if not sound:
        raise EnvironmentFault("this endpoint does not answer as the hub does", through.where, "check HF_ENDPOINT")
    return Repository(access=through, terminal=terminal, commit=commit, listing=listing)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _git_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
