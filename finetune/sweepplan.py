"""A grid of runs, planned: every combination checked with all that it names, its memory, and the time of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import gather, halving, hardware, identity, manifest, metrics, prepare, scores, source
from finetune import recipe as recipes
from finetune.errors import EnvironmentFault, Fault, FinetuneError, RecipeError
from finetune.grid import Combination
from finetune.plan import Plan
from finetune.prepare import Prepared
from finetune.runfolder import RunFolder, read_json
from finetune.terminal import Terminal, duration, size

CUT = "left out: beyond the budget"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a sweep. ``left``: seconds that it is predicted to need yet; ``state``: how it ended, or did not.

    ``begun``: what stands in its folder is of this very recipe and data.
    """

    name: str
    folder: RunFolder
    overrides: tuple[str, ...]
    plan: Plan
    steps: int
    left: float | None
    begun: bool
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
    same = same and stored is not None and stored.data == gather.digests(prepared.recipe)
    done = read_json(folder.finished)
    whole = isinstance(done, dict) and done.get("of", done.get("steps")) == steps  # also where it was stopped early
    finished = same and whole and not manifest.faults(folder.adapter)
    lived = min(1.0, metrics.last_step(folder.metrics) / steps) if steps and same else 0.0
    left = 0.0 if finished else None if made.seconds is None else made.seconds * (1 - lived)
    return Entry(
        name=one.name, folder=folder, overrides=one.overrides, plan=made, steps=steps, left=left, begun=same,
        finished=finished,
    )  # fmt: skip


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
        kept.append(entry if fits else replace(entry, state=CUT))
    if all(entry.state == CUT for entry in kept):
        raise EnvironmentFault(needs, "--budget", "it pays for none of them: raise it, or lower train.steps")
    return replace(sweep, entries=kept)
