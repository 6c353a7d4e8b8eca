"""A folder that takes long to make: what a killed command has finished of it, the same command finds again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault
from finetune.runfolder import clear_leftovers_of, disk_fault, json_bytes, make_folder, remove, sync_folder


@contextlib.contextmanager
def folder(path: Path, made_of: Any, keep: Sequence[str]) -> Iterator[Path]:
    """Fill the yielded folder; on leaving without an error it becomes ``path``, which must not exist, in one rename.

    ``made_of``, any JSON value, says what is being made. Files that match ``keep`` (they must be whole once they have
    their name) are there again where a command with the same ``made_of`` was killed or the disk refused; nothing else
    is. Any other error removes all of it.

    Raises:
        EnvironmentFault: the disk refuses, or another process is making the same.
    """
    key = int.from_bytes(hashlib.sha256(json_bytes(made_of)).digest()[:6], "big")
    temporary = path.with_name(f"{path.name}.tmp-{key}")
    make_folder(path.parent)
    clear_leftovers_of(path, but=temporary.name)
    make_folder(temporary)
    held = _hold(temporary, path)
    try:
        for entry in temporary.iterdir():
            if not any(entry.match(pattern) for pattern in keep):
                remove(entry)
        yield temporary
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    except (EnvironmentFault, KeyboardInterrupt):
        if not any(entry.match(pattern) for entry in temporary.iterdir() for pattern in keep):
            remove(temporary)  # there is nothing to go on with
        raise
    except OSError as error:
        raise disk_fault(error, path) from error
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(held)


def _hold(temporary: Path, path: Path) -> int:
    """Hold the folder itself, not a file in it, until what is returned is closed or this process dies."""
    try:
        held = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise disk_fault(error, temporary) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if not isinstance(error, BlockingIOError):
            raise disk_fault(error, temporary) from error
        raise EnvironmentFault("another finetune process is writing this folder", str(path), "wait for it") from None
    return held
