"""Digests: the sha-256 of files, and a folder's manifest that says what belongs in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from finetune.runfolder import json_bytes, read_json, write_synced

NAME = "manifest.json"
_SEALS = ("SHA256SUMS", "model.sig")
"""What a release has besides, over the manifest itself; ``verify`` judges them."""
_BLOCK = 8 * 1024 * 1024


def digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha-256 of a file, as hex. ``progress`` is told the bytes of each block read."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
            if progress:
                progress(len(block))
    return total.hexdigest()


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(folder: Path, entries: dict[str, str]) -> None:
    """Write the manifest of ``folder``: file name → sha-256. Written last, it marks the folder as complete."""
    write_synced(folder / NAME, json_bytes({"sha256": entries}))


def faults(folder: Path) -> list[str]:
    """What does not hold in ``folder``: missing manifest, missing, altered or additional files. Empty: all holds."""
    stored = read_json(folder / NAME)
    if not isinstance(stored, dict) or not isinstance(stored.get("sha256"), dict):
        return [f"{folder.name}/{NAME} is missing or damaged"]
    entries: dict[str, str] = stored["sha256"]
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {NAME, *_SEALS}
    found = [f"{folder.name}/{name} is not in the manifest" for name in sorted(present - set(entries))]
    found += [f"{folder.name}/{name} is missing" for name in sorted(set(entries) - present)]
    found += [
        f"{folder.name}/{name} is damaged (its digest differs)"
        for name in sorted(present & set(entries))
        if not (folder / name).is_file() or digest(folder / name) != entries[name]
    ]
    return found


def digests(folder: Path, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Every file below ``folder`` by its path in it; ``progress`` as of ``digest``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {str(path.relative_to(folder)): digest(path, progress) for path in files}
