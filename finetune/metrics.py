"""metrics.jsonl, one line a step, always written; the tracker and the live terminal line show the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import hardware
from finetune.runfolder import disk_fault, write_atomic
from finetune.terminal import Progress, Terminal, size

if TYPE_CHECKING:
    from finetune.devices import Session
    from finetune.loop import StepDone


_TOLD = {
    "reward": "reward", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "KL",
    "cross_entropy": "cross-entropy",
}  # fmt: skip
"""An objective's figures that the live line has room for."""


class StepLog:
    """Where a finished step is told: the file, the tracker, the terminal."""

    def __init__(self, path: Path, session: Session, terminal: Terminal, total: int, start: int) -> None:
        self.path, self.session, self.total = path, session, total
        self.progress = Progress(terminal, "step", start=start)

    def step(self, event: StepDone) -> None:
        speed, memory = event.tokens / event.seconds, hardware.memory_in_use()
        line: dict[str, Any] = {
            "step": event.step,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens": event.tokens,
            "supervised_tokens": event.supervised,
            "samples": event.samples,
            "seconds": round(event.seconds, 4),
            "waited": round(event.waited, 4),
            "tokens_per_second": round(speed, 1),
            "memory": memory,
        }
        if event.loss_scale is not None:
            line["loss_scale"] = event.loss_scale
        line |= event.figures
        append_line(self.path, line)
        self.session.log({key: value for key, value in line.items() if key != "step"}, event.step)
        told = "".join(f"  {name} {event.figures[key]:.3g}" for key, name in _TOLD.items() if key in event.figures)
        self.progress(event.step, self.total, f"loss {event.loss:.4f}{told}  {speed:.0f} tokens/s  {size(memory)}")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add one JSON line. A line that a crash cut off is dropped when the run goes on."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise disk_fault(error, path) from error


def cut(path: Path, step: int) -> int:
    """Keep the lines of steps up to ``step``, those after it are about to be lived again; how many there are."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        write_atomic(path, b"".join(kept))
    return len({_step_of(line) for line in kept})


def last_step(path: Path) -> int:
    """The last step that a file of metrics tells of, 0 where there is none."""
    found = [_step_of(line) for line in path.read_bytes().splitlines(keepends=True)] if path.exists() else []
    return int(max((step for step in found if math.isfinite(step)), default=0))


def _step_of(line: bytes) -> float:
    """The step that a line of metrics tells of; infinite for a line that a crash left incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
