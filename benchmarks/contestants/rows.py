"""The process that a contestant of the data benchmark works in, and both ends of the line to it.

It is started once, imports what it needs, and is then asked for one task at a time, so that the contestants can take
turns within seconds. Only the task is timed. This file imports nothing of `finetune`.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One task. ``folder`` is for the caches: a new one makes the call a cold one, a used one a warm one."""

    file: str = ""
    folder: str = ""
    base: str = ""
    window: int = 0
    processes: int | None = None
    lengths: str = ""
    options: dict[str, Any] = field(default_factory=dict)


Told = Callable[[], dict[str, Any]]
"""What a task found, worked out after the clock has stopped."""
Task = Callable[[Call], Told]


def serve(tasks: Mapping[str, Task]) -> None:
    """Answer each line of the standard input with one line; whatever libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        gc.collect()
        wall, busy = time.perf_counter(), _busy()
        told = tasks[asked["task"]](Call(**asked["call"]))
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": _busy() - busy}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(spent | {"peak_memory": peak, "found": told()}) + "\n")
        answers.flush()


def _busy() -> float:
    """Processor seconds of this process and of those that it started and has seen the end of."""
    own, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime


def digest(ids: Sequence[int], trained: Sequence[bool], stop: int) -> str:
    """A sample's digest, whether or not the frame behind an answer's stop token is there, or in the loss."""
    after = {place + 1 for place, token in enumerate(ids) if token == stop}
    marks = [bool(mark) and place not in after for place, mark in enumerate(trained)]
    end = max(after, default=len(ids))
    text = json.dumps([list(ids[:end]), marks[:end]])
    return blake2b(text.encode(), digest_size=8).hexdigest()


class Worker:
    """A process that does a module's tasks, one at a time."""

    def __init__(self, module: str, log: Path) -> None:
        self.module, self.log = module, log
        self._stderr = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.contestants.{module}"], cwd=ROOT, env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._stderr.close()

    def ask(self, task: str, call: dict[str, Any]) -> dict[str, Any]:
        """Raises SystemExit with the end of what it said, where it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, "call": call}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.module}: {task} failed:\n{self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
