"""A metric of one's own: ``evaluate.command`` is a console command that is given the rows and prints numbers.

On its standard input it finds one JSON object a line: ``question`` (the last thing that was asked), ``messages`` (all
turns before the answer), ``expected`` and ``answer``. It prints one JSON number a row (more is better; true and false
count as 1 and 0), or one JSON object of numbers by name for all rows together. It is started without a shell.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.errors import EnvironmentFault
from finetune.terminal import clean, duration, size

if TYPE_CHECKING:
    from finetune.dataset import Question

_WHERE = "evaluate.command"
_LONGEST = 64 << 20
"""Bytes that it may print; a number is a few."""
_LOOK = 0.1
"""Seconds between two looks at how much it has printed."""


class Command(NamedTuple):
    """The words of the command, and the seconds that it may take for all rows."""

    words: Sequence[str]
    seconds: float


def judge(
    questions: Sequence[Question], given: Sequence[str], asked: tuple[Sequence[str], float]
) -> tuple[list[float], dict[str, Any]]:
    """Each row's number, none where the command answers for all rows; the mean, or the numbers that it named.

    Raises:
        EnvironmentFault: it cannot be started, takes too long, fails, or prints something else.
    """
    lines = [
        {
            "question": question.asked[-1][1] if question.asked else "",
            "messages": [{"role": role, "content": content} for role, content in question.asked],
            "expected": question.answer,
            "answer": answer,
        }
        for question, answer in zip(questions, given, strict=True)
    ]
    said = _run(
        Command(*asked),
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace"),
    )
    try:
        values = [json.loads(line, parse_constant=_refuse) for line in said.decode().splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise _fault(f"printed something that is not JSON ({error}): {said[:200].decode(errors='replace')!r}") from None
    if len(values) == 1 and isinstance(values[0], dict):
        return [], {f"command.{clean(name, 60)}": _number(value) for name, value in values[0].items()}
    if len(values) != len(lines):
        raise _fault(f"printed {len(values)} lines for {len(lines)} rows")
    verdicts = [_number(value) for value in values]
    return verdicts, {"command": math.fsum(verdicts) / len(verdicts)}


def _run(asked: Command, rows: bytes) -> bytes:
    """What the command printed. It and whatever it starts have a process group of their own, and end with this."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(rows)
        given.seek(0)
        try:
            process = subprocess.Popen(list(asked.words), stdin=given, stdout=out, stderr=err, start_new_session=True)
        except (OSError, ValueError) as error:
            raise _fault(f"cannot be started: {getattr(error, 'strerror', None) or error}") from None
        try:
            code = _wait(process, time.monotonic() + asked.seconds, (out.fileno(), err.fileno()))
        except subprocess.TimeoutExpired:
            fix = "make it faster, judge fewer rows, or raise evaluate.command_timeout"
            raise EnvironmentFault(f"took more than {duration(asked.seconds)}", _WHERE, fix) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            err.seek(max(0, err.seek(0, os.SEEK_END) - 1000))
            words = err.read().decode(errors="replace").strip().splitlines()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise _fault(f"{how}: {clean(words[-1], 300) if words else 'it said nothing'}")
        out.seek(0)
        return out.read(_LONGEST)


def _wait(process: subprocess.Popen[bytes], end: float, printed: Sequence[int]) -> int:
    """Its exit code. ``printed``: files that it writes, which must not fill the disk.

    Raises:
        TimeoutExpired: it runs on after ``end``.
        EnvironmentFault: it prints without an end.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, min(_LOOK, end - time.monotonic())))
        if any(os.fstat(one).st_size > _LONGEST for one in printed):
            raise _fault(f"printed more than {size(_LONGEST)}")
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, 0)


def _number(value: Any) -> float:
    if isinstance(value, bool | int | float) and abs(value) < 1e100:
        return float(value)
    raise _fault(f"printed {clean(json.dumps(value), 60)} where a number is due")


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _fault(what: str) -> EnvironmentFault:
    return EnvironmentFault(what, _WHERE, "mend the command, or take it out of evaluate.metrics")
