"""How a run stands or ended, by its folder alone: under way, finished, paused, out, interrupted or failed, and why."""

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

AFTER, LAST = "after", "last"
"""Names of judgements: of the adapter that a run ends with; of its last step's, where another step's may be kept."""
RUNNING, FINISHED, PAUSED, INTERRUPTED, FAILED = "running", "finished", "paused", "interrupted", "failed"
HALVED = "halved out"
"""A sweep's: others were better at its pause, and it is not to go on."""
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
    """Work on a run; where that ends by an error, its folder says so. Who is killed leaves no note: ``state`` knows.
    A finished run that is only cut off from closing gets none."""
    remove(folder.stopped)
    try:
        yield
    except BaseException as error:
        how = INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else FAILED
        with contextlib.suppress(FinetuneError, OSError):  # a full disk is what it would tell of
            if not end(folder):
                note(folder, how, str(error) or type(error).__name__)
        raise


def at_step(step: int) -> str:
    """The name of the judgement after a step on the way."""
    return f"step {step}"


def end(folder: RunFolder) -> dict[str, Any]:
    """finished.json of a run that is at the end of the course in its plan; empty where it is not, or goes on beyond.

    ``steps`` were done; of a course of ``of`` steps where the run was ``stopped`` early: ``by`` a metric, which had not
    been better by more than ``threshold`` for ``patience`` evaluations, not ``since`` a step. ``kept``: the ``step``
    whose adapter it is, with the ``value`` of the metric, and its ``last`` one.
    """
    done, plan = _object(folder.finished), _object(folder.plan)
    whole = done.get("of", done.get("steps"))
    return done if isinstance(done.get("steps"), int) and plan.get("steps") in (whole, None) else {}


def sentences(end: dict[str, Any]) -> list[str]:
    """What is to be said of an end that was chosen by evaluations; nothing of any other."""
    steps, of, stopped, kept = end.get("steps"), end.get("of"), end.get("stopped"), end.get("kept")
    said = []
    if isinstance(stopped, dict):
        by, more = _word(stopped.get("by")), stopped.get("threshold")
        beyond = f" by more than {more:g}" if isinstance(more, int | float) and more else ""
        said.append(
            f"stopped early after step {steps} of {of}: {by} has not improved{beyond} for {stopped.get('patience')} "
            f"evaluations, since step {stopped.get('since')}"
        )
    if isinstance(kept, dict):
        by = _word(kept.get("by"))
        value, last = _shown(kept.get("value")), _shown(kept.get("last"))
        other = f"; last: step {steps} ({by} {last})" if kept.get("step") != steps else ", the last"
        said.append(f"kept: step {kept.get('step')} ({by} {value}){other}")
    return [clean(one, _WHY) for one in said]


def _word(metric: Any) -> str:
    return str(metric).replace("_", " ")


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"


def state(folder: RunFolder) -> tuple[str, str]:
    """One of the six words, and why the run stands still where that was said."""
    if under_way(folder):
        return RUNNING, ""
    if end(folder):
        return FINISHED, ""
    said = _object(folder.stopped)
    how, why = said.get("how"), said.get("why")
    known = how if how in (PAUSED, HALVED, INTERRUPTED, FAILED) else INTERRUPTED
    return known, clean(why, _WHY) if isinstance(why, str) else ""


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}
