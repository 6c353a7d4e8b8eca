"""Power loss: nothing is relied on before it was flushed. Judged on the order of a run's own file operations.

A kill leaves the page cache, so killing proves nothing here. Instead the log of every operation is replayed against a
model of a disk that keeps only what was flushed: a file's bytes by fsync of the file, a name by fsync of its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import Op
from tests.faults.breaking import DELETIONS, RENAMES, WRITES

SAVES = "checkpoints/step-"


@dataclass
class Disk:
    """What a power cut would lose now. ``bytes_``: files with unflushed bytes; ``names``: entries not flushed."""

    run: Path
    bytes_: set[Path] = field(default_factory=set)
    names: set[Path] = field(default_factory=set)
    known: set[Path] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def apply(self, op: Op) -> None:
        path = Path(op.path)
        if path.name == ".lock":
            return
        if op.name == "fsync":
            self.bytes_.discard(path)
            self.names = {name for name in self.names if name.parent != path}
        elif op.name in RENAMES:
            self._rename(op, Path(op.other), path)
        elif op.name in DELETIONS:
            self.bytes_.discard(path)
            self.names.discard(path)
            self.known.discard(path)
        elif op.name == "mkdir" or op.name in WRITES or op.name.startswith("open"):
            self._change(op, path)
        else:
            self.faults.append(f"{op.number}: {op.name} is not known to this test")

    def _change(self, op: Op, path: Path) -> None:
        if path not in self.known:
            self.known.add(path)
            if path != self.run:
                self.names.add(path)
        if op.name == "mkdir":
            return
        others = {file for file in self.bytes_ if file.parent == path.parent and file != path}
        if path.name == "manifest.json" and others:
            self._fault(op, "the manifest is begun before these are flushed", others)
        if path.name != "manifest.json" and path.with_name("manifest.json") in self.known:
            self._fault(op, "written after the manifest that vouches for it", {path})
        self.bytes_.add(path)

    def _rename(self, op: Op, old: Path, new: Path) -> None:
        inside = {path for path in self.bytes_ | self.names if old in path.parents} | (self.bytes_ & {old})
        if inside:
            self._fault(op, "renamed before its content is flushed", inside)
        around = {path for path in self.names if path.parent == new.parent and path != old}
        promised = {path for path in self.bytes_ | self.names if path.parent == self.run}
        if around:
            self._fault(op, "the folder's earlier names are not flushed", around)
        if SAVES in str(new) and ".tmp-" not in new.name and promised:
            self._fault(op, "a checkpoint appears before these are flushed", promised)
        self.known = {new / path.relative_to(old) if path.is_relative_to(old) else path for path in self.known}
        self.names = (self.names - {old}) | {new}

    def _fault(self, op: Op, what: str, paths: set[Path]) -> None:
        names = ", ".join(str(path.relative_to(self.run)) for path in sorted(paths))
        self.faults.append(f"{op.number}: {op.name} {Path(op.path).relative_to(self.run)}: {what}: {names}")


def replay(run: Path, log: Sequence[Op]) -> list[str]:
    """What is relied on too early, and what is not flushed when the run says that it is finished."""
    disk = Disk(run)
    for op in log:
        disk.apply(op)
    left = {path for path in disk.bytes_ | disk.names if ".tmp-" not in str(path)}
    return disk.faults + [f"at the end: {path.relative_to(run)} is not flushed" for path in sorted(left)]
