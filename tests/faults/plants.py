"""Defects to plant in a trial's process, so that the tests of interruptions can be seen to fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def no_sync() -> None:
    """Nothing is ever flushed."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


def no_folder_sync() -> None:
    """Files are flushed, renames are not."""
    from finetune import checkpoint, runfolder

    runfolder.sync_folder = checkpoint.sync_folder = lambda path: None


def metrics_unsynced() -> None:
    """A checkpoint is saved while its steps' lines of metrics are only in memory."""
    from finetune import state

    state.sync_file = lambda path: None


def manifest_first() -> None:
    """The manifest is written before the files that it vouches for."""
    from finetune import checkpoint, manifest
    from finetune.runfolder import atomic_folder, write_synced

    def write_folder(target: Path, files: dict[str, bytes]) -> None:
        with atomic_folder(target) as temporary:
            manifest.write(temporary, {name: manifest.digest_bytes(data) for name, data in files.items()})
            for name, data in files.items():
                write_synced(temporary / name, data)

    checkpoint.write_folder = write_folder


def in_place() -> None:
    """Checkpoints are written under their final name, and nobody checks them."""
    from finetune import checkpoint, manifest, runfolder

    @contextlib.contextmanager
    def folder(path: Path) -> Iterator[Path]:
        path.mkdir(exist_ok=True)
        yield path

    checkpoint.atomic_folder = runfolder.atomic_folder = folder
    manifest.faults = lambda path: []


def metrics_uncut() -> None:
    """Lines of steps that are done again stay."""
    from finetune import metrics

    metrics._step_of = lambda line: 0


def dropout_by_history() -> None:
    """Dropout noise depends on what ran before, as with a global generator that is seeded once."""
    import torch

    from finetune import loop

    class Seedless:
        def __getattr__(self, name: str) -> Any:
            return (lambda seed: None) if name == "manual_seed" else getattr(torch, name)

    loop.torch = Seedless()  # type: ignore[assignment]


def moments_lost() -> None:
    """The optimizer starts anew on resume."""
    from finetune import checkpoint

    checkpoint.restore_optimizer = lambda optimizer, parameters, tensors: None


def lock_inherited() -> None:
    """The lock is one that started processes keep holding."""
    import fcntl

    from finetune import errors
    from finetune.runfolder import RunFolder

    @contextlib.contextmanager
    def lock(self: RunFolder) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.EnvironmentFault("another finetune process is working in this folder") from None
        yield
        os.close(descriptor)

    RunFolder.lock = lock  # type: ignore[method-assign]
