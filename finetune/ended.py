"""How a run stands or ended, by its folder alone: under way, finished, paused, interrupted or failed, and why."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, Interrupted
from finetune.runfolder import RunFolder, read_json, remove, write_json
from finetune.terminal import clean

RUNNING, FINISHED, PAUSED, INTERRUPTED, FAILED = "running", "finished", "paused", "interrupted", "failed"
_WHY = 400


def under_way(folder: RunFolder) -> bool:
    """Whether a process works in the folder. Looks at its lock without writing, and lets go of it at once."""
    try:
        descriptor = os.open(folder.root / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def note(folder: RunFolder, how: str, why: str) -> None:
    """Say why a run that is not finished stands still."""
    write_json(folder.stopped, {"how": how, "why": clean(why, _WHY)})


@contextlib.contextmanager
def noting(folder: RunFolder) -> Iterator[None]:
    """Work on a run; where that ends by an error, its folder says so. Who is killed leaves no note: ``state`` knows."""
    remove(folder.stopped)
    try:
        yield
    except BaseException as error:
        how = INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else FAILED
        with contextlib.suppress(FinetuneError, OSError):  # a full disk is what it would tell of
            note(folder, how, str(error) or type(error).__name__)
        raise


def end(folder: RunFolder) -> dict[str, Any]:
    """finished.json of a run that is at the end of the course in its plan; empty where it is not, or goes on beyond.

    ``steps`` were done, of a course of ``of`` steps where it was stopped early.
    """
    done, plan = _object(folder.finished), _object(folder.plan)
    return done if plan.get("steps") in (done.get("of", done.get("steps")), None) else {}


def state(folder: RunFolder) -> tuple[str, str]:
    """One of the five words, and why the run stands still where that was said."""
    if under_way(folder):
        return RUNNING, ""
    if end(folder):
        return FINISHED, ""
    said = _object(folder.stopped)
    how, why = said.get("how"), said.get("why")
    known = how if how in (PAUSED, INTERRUPTED, FAILED) else INTERRUPTED
    return known, clean(why, _WHY) if isinstance(why, str) else ""


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}
