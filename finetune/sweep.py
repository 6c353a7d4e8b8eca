"""A grid of runs: all planned first, then trained one after the other, then compared.

Each run is an ordinary run folder, trained by ``finetune train`` in a process of its own, so that memory is clean and
a run that fails takes no other along. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import compare, comparepage, halving, hardware, identity, manifest, metrics, prepare, scores, source
from finetune import recipe as recipes
from finetune.errors import EnvironmentFault, Fault, FinetuneError, Interrupted, RecipeError
from finetune.grid import Combination
from finetune.interrupts import stop_requests
from finetune.plan import Plan
from finetune.prepare import Prepared
from finetune.runfolder import RunFolder, read_json, write_json, write_page
from finetune.terminal import Terminal, duration, size


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a sweep. ``left``: seconds that it is predicted to need yet; ``state``: how it ended, or did not."""

    name: str
    folder: RunFolder
    overrides: tuple[str, ...]
    plan: Plan
    steps: int
    left: float | None
    finished: bool
    failed: bool = False
    state: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "folder": str(self.folder.root), "steps": self.steps, "state": self.state,
            "failed": self.failed, "finished": self.finished,
            "memory": self.plan.budget.total, "seconds": self.plan.seconds, "seconds_left": self.left,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is to be done: all runs, and how. ``budget`` in seconds, of this command."""

    recipe: Path
    root: Path
    entries: list[Entry] = field(default_factory=list)
    budget: float | None = None
    halving: bool = False

    @property
    def predicted(self) -> float | None:
        """Seconds that all runs need yet; with halving at most."""
        if any(entry.left is None for entry in self.entries):
            return None
        left = [entry.left or 0.0 for entry in self.entries]
        return halving.at_most(left) if self.halving else math.fsum(left)

    def lines(self) -> list[str]:
        wide = max(len(entry.name) for entry in self.entries)
        said = [f"{len(self.entries)} runs below {self.root}", f"{'run':<{wide}}{'steps':>8}{'memory':>12}{'time':>12}"]
        for entry in self.entries:
            left = "unknown" if entry.left is None else "finished" if entry.finished else duration(entry.left)
            memory = size(entry.plan.budget.total)
            said.append(
                f"{entry.name:<{wide}}{entry.steps:>8}{memory:>12}{left:>12}{entry.state and f'  {entry.state}'}"
            )
        total = "unknown" if self.predicted is None else f"about {duration(self.predicted)}"
        most = "at most " if self.halving and self.predicted is not None else ""
        budget = "" if self.budget is None else f", the budget is {duration(self.budget)}"
        return [*said, f"time: {most}{total} in all (predicted){budget}"]


def plan(
    recipe: Path,
    root: Path,
    grid: Sequence[Combination],
    terminal: Terminal,
    *,
    budget: float | None,
    halve: bool,
    fetch: bool,
) -> Sweep:
    """Check every combination with everything it names, and what all cost. ``fetch`` a base that is not here.

    Raises:
        FinetuneError: what is wrong with any of them, each with its name; nothing has been written.
    """
    if RunFolder(root).identity.exists():
        raise EnvironmentFault(
            "a run of its own stands in this folder", str(root), "--set output=ANOTHER for the sweep"
        )
    prepared = _prepared(recipe, grid)
    if fetch and prepared[0].base is None:
        source.bring(prepared[0].recipe.model, prepared[0].recipe.revision, terminal)
        prepared = _prepared(recipe, grid)
    entries = [_entry(one, found) for one, found in zip(grid, prepared, strict=True)]
    if halve:
        _refuse_unranked(prepared, recipe)
    made = Sweep(recipe=recipe, root=root, entries=entries, budget=budget, halving=halve)
    return made if budget is None else _within(made, budget)


def _prepared(recipe: Path, grid: Sequence[Combination]) -> list[Prepared]:
    machine = hardware.detect()
    found: list[Prepared] = []
    errors: list[tuple[str, FinetuneError]] = []
    for one in grid:
        try:
            found.append(prepare.prepare(recipe, one.overrides, machine=machine))
        except FinetuneError as error:
            errors.append((one.name, error))
    if errors:
        kind = type(errors[0][1])
        same = [(name, fault) for name, error in errors if type(error) is kind for fault in error.faults]
        raise kind.of([Fault(f"{fault.what} ({name})", fault.where, fault.fix) for name, fault in same])
    return found


def _entry(one: Combination, prepared: Prepared) -> Entry:
    """Where a run stands: what it has lived already is not to be paid again."""
    folder, made = RunFolder(one.output), prepared.plan
    steps = made.steps or 0
    stored = identity.read(folder.identity)
    same = stored is not None and stored.recipe == dict(recipes.flatten(prepared.recipe))
    done = read_json(folder.finished)
    finished = same and isinstance(done, dict) and done.get("steps") == steps and not manifest.faults(folder.adapter)
    lived = min(1.0, metrics.last_step(folder.metrics) / steps) if steps and same else 0.0
    left = 0.0 if finished else None if made.seconds is None else made.seconds * (1 - lived)
    return Entry(
        name=one.name, folder=folder, overrides=one.overrides, plan=made, steps=steps, left=left, finished=finished
    )


def _refuse_unranked(prepared: Sequence[Prepared], recipe: Path) -> None:
    """Halving ranks by held-out loss: all must have one, of the same rows with the same tokens."""
    if any(one.held_out is None or "loss" not in one.recipe.evaluate.metrics for one in prepared):
        what = "--halving keeps the runs of the lower held-out loss, and there is none"
        raise RecipeError(what, str(recipe), "set data.eval_path or data.eval_fraction, and evaluate.metrics: [loss]")
    if len({tuple(map(scores.content, one.held_out.examples)) for one in prepared if one.held_out}) > 1:
        what = "--halving compares losses, and this grid changes the rows or tokens that they are of"
        raise RecipeError(what, str(recipe), "sweep those keys without --halving")


def _within(sweep: Sweep, budget: float) -> Sweep:
    """The runs that the budget pays for, in their order; the others are cut by name.

    Raises:
        EnvironmentFault: it pays for none, or what is to be halved exceeds it: then all runs are in the comparison.
    """
    if sweep.predicted is None:
        raise EnvironmentFault("the time of these runs cannot be predicted here", "--budget", "leave it out")
    if sweep.predicted <= budget:
        return sweep
    needs = f"all runs need about {duration(sweep.predicted)}, the budget is {duration(budget)}"
    if sweep.halving:
        raise EnvironmentFault(needs, "--budget", "name fewer values: --halving cannot leave runs out")
    spent, kept = 0.0, []
    for entry in sweep.entries:
        fits = spent + (entry.left or 0.0) <= budget
        spent += (entry.left or 0.0) if fits else 0.0
        kept.append(entry if fits else replace(entry, state=_CUT))
    if all(entry.state == _CUT for entry in kept):
        raise EnvironmentFault(needs, "--budget", "it pays for none of them: raise it, or lower train.steps")
    return replace(sweep, entries=kept)


_CUT = "left out: beyond the budget"


def run(sweep: Sweep, terminal: Terminal, *, quiet: bool = False) -> dict[str, Any]:
    """Train what is planned, then compare what is finished.

    Raises:
        Interrupted: stopped on request; the same command goes on.
    """
    with RunFolder(sweep.root).lock():
        trainer = _Trainer(sweep, terminal, quiet)
        entries = trainer.halved() if sweep.halving else trainer.each()
        found = _compared(sweep, entries, terminal)
    for entry in entries:
        terminal.say(f"{entry.name}: {entry.state}")
    return found


class _Trainer:
    """Trains the entries of a sweep, each in a process of its own, within the time that the budget gives."""

    def __init__(self, sweep: Sweep, terminal: Terminal, quiet: bool) -> None:
        self.sweep, self.terminal, self.quiet = sweep, terminal, quiet
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
            ranked = sorted(
                (entry for entry in reached if not entry.failed),
                key=lambda entry, rung=rung: _loss_at(entry, halving.step(entry.steps, rung, last)),
            )
            keep = len(ranked) if rung == last else halving.better_half(len(ranked))
            out += [
                entry if entry.finished else replace(entry, state=f"halved out {entry.state}")
                for entry in ranked[keep:]
            ]
            alive = ranked[:keep]
        order = [entry.name for entry in self.sweep.entries]
        return sorted([*alive, *out], key=lambda entry: order.index(entry.name))

    def _to(self, entry: Entry, step: int) -> Entry:
        """Bring a run to a step."""
        whole = step >= entry.steps
        if entry.finished:
            return replace(entry, state="finished")
        if not whole and _loss(entry, step) is not None:
            return replace(entry, state=f"at step {step}")
        if self.end is not None and not self.sweep.halving and time.monotonic() + (entry.left or 0.0) > self.end:
            return replace(entry, state=_CUT)
        self.terminal.say(f"── {entry.name}{'' if whole else f', to step {step} of {entry.steps}'} ──")
        code = self._child(entry, [] if whole else ["--until", str(step)])
        if code == Interrupted.exit_code:
            raise Interrupted(f"stopped on request in {entry.name}; nothing is lost", fix="the same command goes on")
        if code:
            return replace(entry, failed=True, state=f"failed with exit code {code}")
        if not whole and _loss(entry, step) is None:
            return replace(entry, failed=True, state=f"failed: it has no held-out loss of step {step}")
        return replace(entry, finished=whole, state="finished" if whole else f"at step {step}")

    def _child(self, entry: Entry, options: Sequence[str]) -> int:
        """``finetune train`` of one run; a request to stop is passed on, so that it saves where it stands."""
        words = [part for text in entry.overrides for part in ("--set", text)]
        code = "from finetune.cli import main; main()"
        command = [sys.executable, "-P", "-c", code, "train", str(self.sweep.recipe), *words, *options]
        process: subprocess.Popen[bytes] | None = None
        with stop_requests() as stop:
            try:
                with stop.deferred():  # a group of its own: a terminal's Ctrl-C must reach it once, from here
                    process = subprocess.Popen(command, process_group=0, stdout=2 if self.quiet else None)
                return process.wait()
            except BaseException:
                if process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()
                    process.wait()
                raise


def _loss(entry: Entry, step: int) -> float | None:
    """The held-out loss that a run had after ``step`` steps."""
    name = "after" if step >= entry.steps else f"step {step}"
    found = scores.read(entry.folder).get(name)
    value = found.get("loss") if isinstance(found, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _loss_at(entry: Entry, step: int) -> float:
    """What a rung ranks by; a run that was finished before, without a pause there, by its end."""
    found = _loss(entry, step)
    found = _loss(entry, entry.steps) if found is None else found
    return math.inf if found is None else found


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
