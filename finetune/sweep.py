"""A grid of runs, trained one after the other and then compared.

Each run is an ordinary run folder, trained by ``finetune train`` in a process of its own, so that memory is clean and
a run that fails takes no other along. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune import compare, comparepage, ended, halving, scores
from finetune.errors import Interrupted
from finetune.interrupts import stop_requests
from finetune.runfolder import RunFolder, write_json
from finetune.sweepplan import CUT, Entry, Sweep
from finetune.terminal import Terminal
from finetune.webpage import write_page


def run(sweep: Sweep, terminal: Terminal) -> dict[str, Any]:
    """Train what is planned, then compare what is finished.

    Raises:
        Interrupted: stopped on request; the same command goes on.
    """
    with RunFolder(sweep.root).lock():
        trainer = _Trainer(sweep, terminal)
        entries = trainer.halved() if sweep.halving else trainer.each()
        found = _compared(sweep, entries, terminal)
    for entry in entries:
        terminal.say(f"{entry.name}: {entry.state}")
    return found


class _Trainer:
    """Trains the entries of a sweep, each in a process of its own, within the time that the budget gives."""

    def __init__(self, sweep: Sweep, terminal: Terminal) -> None:
        self.sweep, self.terminal = sweep, terminal
        self.end = None if sweep.budget is None else time.monotonic() + sweep.budget

    def each(self) -> list[Entry]:
        return [entry if entry.state else self._to(entry, entry.steps) for entry in self.sweep.entries]

    def halved(self) -> list[Entry]:
        """Rung by rung, until one or two runs are left; see ``halving``."""
        alive, out = list(self.sweep.entries), list[Entry]()
        last = halving.rungs(len(alive))
        for rung in range(last + 1):
            reached = [self._to(entry, halving.step(entry.steps, rung, last)) for entry in alive]
            out += [entry for entry in reached if entry.failed]
            ranked = _ranked(reached, rung, last)
            keep = len(ranked) if rung == last else halving.better_half(len(ranked))
            out += [entry if entry.finished else _halved_out(entry) for entry in ranked[keep:]]
            alive = ranked[:keep]
        order = [entry.name for entry in self.sweep.entries]
        return sorted([*alive, *out], key=lambda entry: order.index(entry.name))

    def _to(self, entry: Entry, step: int) -> Entry:
        """Bring a run to a step."""
        whole = step >= entry.steps
        if entry.finished:
            return replace(entry, state="finished")
        if not whole and entry.begun and _loss(entry, step) is not None:
            return replace(entry, state=f"at step {step}")
        if self.end is not None and not self.sweep.halving and time.monotonic() + (entry.left or 0.0) > self.end:
            return replace(entry, state=CUT)
        self.terminal.say(f"── {entry.name}{'' if whole else f', to step {step} of {entry.steps}'} ──")
        code = self._child(entry, [] if whole else ["--until", str(step)])
        if code == Interrupted.exit_code:
            raise Interrupted(f"stopped on request in {entry.name}; nothing is lost", fix="the same command goes on")
        if code:
            return replace(entry, failed=True, state=f"failed with exit code {code}")
        whole = whole or bool(ended.end(entry.folder))  # it may have stopped early
        if not whole and _loss(entry, step) is None:
            return replace(entry, failed=True, state=f"failed: it has no held-out loss of step {step}")
        return replace(entry, begun=True, finished=whole, state="finished" if whole else f"at step {step}")

    def _heard(self) -> int | None:
        """Where a run's own lines go: to where this command's go; a quiet one has one line for each run."""
        if self.terminal.silent or self.terminal.quiet:
            return subprocess.DEVNULL
        return 2 if self.terminal.out is sys.stderr else None

    def _child(self, entry: Entry, options: Sequence[str]) -> int:
        """``finetune train`` of one run; a request to stop is passed on, so that it saves where it stands."""
        words = [part for text in entry.overrides for part in ("--set", text)]
        # Its own handlers are there from ``main`` on; until then SIGTERM ends it, and nothing has begun.
        code = f"from finetune import cli, interrupts; interrupts.end_with({os.getpid()}); cli.main()"
        command = [sys.executable, "-P", "-c", code, "train", str(self.sweep.recipe), *words, *options]
        command += ["--quiet"] if self.terminal.quiet else []
        process: subprocess.Popen[bytes] | None = None
        with stop_requests() as stop:
            try:
                with stop.deferred():  # a group of its own: a terminal's Ctrl-C must reach it once, from here
                    process = subprocess.Popen(command, process_group=0, stdout=self._heard())
                return process.wait()
            except BaseException:
                if process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()
                    process.wait()
                raise


def _halved_out(entry: Entry) -> Entry:
    """A run that does not go on; its folder says so, too."""
    if ended.state(entry.folder)[0] != ended.HALVED:
        why = f"{entry.state} of {entry.steps}: others had a lower held-out loss there"
        ended.note(entry.folder, ended.HALVED, why)
    return replace(entry, state=f"halved out {entry.state}")


def _loss(entry: Entry, step: int) -> float | None:
    """The held-out loss that a run had after ``step`` steps."""
    name = "after" if step >= entry.steps else f"step {step}"
    found = scores.read(entry.folder).get(name)
    value = found.get("loss") if isinstance(found, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _ranked(entries: Sequence[Entry], rung: int, last: int) -> list[Entry]:
    """The better first, by the held-out loss at a rung; a run that was finished before, without a pause, by its end."""

    def loss(entry: Entry) -> float:
        found = _loss(entry, halving.step(entry.steps, rung, last))
        found = _loss(entry, entry.steps) if found is None else found
        return math.inf if found is None else found

    return sorted((entry for entry in entries if not entry.failed), key=loss)


def _compared(sweep: Sweep, entries: Sequence[Entry], terminal: Terminal) -> dict[str, Any]:
    """The finished runs side by side, the best first."""
    finished = sorted((entry for entry in entries if entry.finished), key=_merit)
    found: dict[str, Any] = {"runs": [entry.to_dict() for entry in entries], "comparison": None}
    if len(finished) > 1:
        compared = compare.compare([entry.folder.root for entry in finished], picked=True)
        found["comparison"] = compared
        write_page(sweep.root / "comparison.html", comparepage.page(compared))
        for line in compare.lines(compared):
            terminal.say(line)
        terminal.say(f"written: {sweep.root / 'comparison.html'}")
    write_json(sweep.root / "sweep.json", found)
    return found


def _merit(entry: Entry) -> tuple[float, float]:
    """Lower is better: the held-out loss, else the share of wrong answers."""
    found = scores.read(entry.folder).get("after", {})
    return found.get("loss", math.inf), -found.get("exact_match", 0.0)
