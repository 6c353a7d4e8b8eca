"""A base named by its hub id: found on this disk, or fetched into huggingface_hub's cache.

What the model computes with and what its licence asks for comes along, nothing else: no code, no other format.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune import hardware
from finetune.errors import EnvironmentFault, ModelError
from finetune.fetch import access, disk, hub
from finetune.fetch.disk import is_hub_id
from finetune.fetch.hub import File, Repository
from finetune.runfolder import read_json
from finetune.terminal import Progress, Terminal, size

__all__ = ["Fetched", "config", "fetch", "is_hub_id", "local"]
_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A model folder and where it came from. ``commit`` is empty for a ModelScope folder, which does not say."""

    folder: Path
    repo: str
    commit: str
    origin: Literal["hub", "modelscope"]


def local(repo: str, revision: str | None = None) -> Fetched | None:
    """What is on this disk already and whole, without asking the network.

    A ModelScope folder counts only where no revision is asked for: its revisions are not the hub's.
    """
    folder = disk.snapshot(repo, revision or "main")
    if folder and disk.is_whole(folder):
        return Fetched(folder=folder, repo=repo, commit=folder.name, origin="hub")
    for folder in disk.modelscope(repo) if revision is None else ():
        if disk.is_whole(folder):
            return Fetched(folder=folder, repo=repo, commit="", origin="modelscope")
    return None


def fetch(repo: str, revision: str | None, terminal: Terminal) -> Fetched:
    """Bring the repository's model files into the cache; what is there already is not fetched again.

    Offline it answers from this disk.

    Raises:
        ModelError: no such repository, revision or weights, or bytes that are not what the hub names.
        EnvironmentFault: no access, no connection, no room; what came stays, and the next call goes on from it.
    """
    if access.offline():
        if found := local(repo, revision):
            return found
        raise access.not_here(repo)
    remote = hub.look_up(repo, revision or "main", terminal)
    files = _choose(remote)
    total, missing = sum(file.size for file in files), sum(map(remote.missing, files))
    free = hardware.free_disk(disk.cache())
    if missing > free:
        what = f"{repo} needs {size(missing)} more, {size(free)} are free"
        raise EnvironmentFault(what, str(disk.cache()), "free some space, or set HF_HOME to a folder on a larger disk")
    meter = _Meter(Progress(terminal, f"fetching {repo}, MB", start=(total - missing) // _MB), total, total - missing)
    for file in files:
        remote.bring(file, functools.partial(meter.add, file.name))
    if missing:
        meter.finish()
    remote.name_commit()
    return Fetched(folder=remote.snapshot, repo=repo, commit=remote.commit, origin="hub")


@dataclass
class _Meter:
    """Bytes as they come, shown in whole MB."""

    progress: Progress
    total: int
    done: int

    def add(self, name: str, count: int) -> None:
        before, self.done = self.done, self.done + count
        if before // _MB != self.done // _MB and self.done < self.total:
            self.progress(self.done // _MB, -(-self.total // _MB), name)

    def finish(self) -> None:
        self.progress(-(-self.total // _MB), -(-self.total // _MB))


def _choose(remote: Repository) -> list[File]:
    """What to fetch, the small files first: a refusal or a fault in them costs nothing yet.

    Where the weights have an index it is fetched here; its shards alone are taken, not a second form beside them.
    """
    names = set(remote.listing)
    remote.file("config.json")  # without it this is no model
    index = disk.index_of(names)
    if index:
        remote.bring(remote.file(index), _unheard)
    weights = disk.weights(names, remote.snapshot)
    if not weights:
        what = f"{remote.access.repo} has no weights that can be read: no safetensors, no pytorch_model.bin"
        raise ModelError(what, remote.access.where, "name the repository that holds the model in safetensors")
    return [remote.file(name) for name in [*disk.small(names), *weights]]


def config(repo: str, revision: str | None = None) -> dict[str, Any]:
    """The repository's config.json alone, a few KB: enough to plan. Raises what ``fetch`` raises."""
    found = local(repo, revision)
    folder = found.folder if found else disk.snapshot(repo, revision or "main")
    here = folder / "config.json" if folder else None
    fixed = revision is not None and disk.COMMIT.fullmatch(revision) is not None
    if here is None or not here.is_file() or not (fixed or access.offline()):
        if access.offline():
            raise access.not_here(repo)
        remote = hub.look_up(repo, revision or "main", Terminal(quiet=True))
        here = remote.bring(remote.file("config.json"), _unheard)
    value = read_json(here)
    if not isinstance(value, dict):
        raise ModelError("config.json is not a JSON object", str(here), "name another repository")
    return value


def _unheard(count: int) -> None:
    """Files of a few KB need no progress line."""
