"""Which evaluated step of a run is the best one: its adapter is kept aside, and a run may end that finds no better one.

Everything is a function of the scores up to a step, which are on the disk before anything is decided by them: a run
that is resumed before an evaluation finds the same scores there, and decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from
from safetensors.torch import save as tensors_to

from finetune import checkpoint, ended, evals, manifest, model, scores
from finetune.errors import ModelError
from finetune.model import Policy
from finetune.run import Run
from finetune.runfolder import RunFolder, discard, json_bytes, make_folder
from finetune.runstory import number

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """After some evaluations. ``best``: the best step and its score, the earliest of equals.

    ``since``: the step of the last improvement beyond the threshold; ``waited``: evaluations since then.
    """

    best: tuple[int, float] | None = None
    since: int = 0
    waited: int = 0


def standing(run: Run, step: int) -> Standing:
    """Where the run stands by its evaluations up to ``step``."""
    wanted = run.prepared.recipe.evaluate
    found, mark = Standing(), None
    for at, value in _measured(run, step):
        best = found.best
        if best is None or evals.gain(wanted.best_by, value, best[1]) > 0:
            best = (at, value)
        if mark is None or evals.gain(wanted.best_by, value, mark) > wanted.early_stopping_threshold:
            mark, found = value, Standing(best=best, since=at)
        else:
            found = Standing(best=best, since=found.since, waited=found.waited + 1)
    return found


def _measured(run: Run, step: int) -> list[tuple[int, float]]:
    """The evaluations on the way up to ``step``; a pause's own is none of them."""
    wanted, stored = run.prepared.recipe.evaluate, scores.read(run.folder)
    if not wanted.every:
        return []
    places = range(wanted.every, step + 1, wanted.every)
    found = ((at, _score(stored, ended.at_step(at), wanted.best_by)) for at in places)
    return [(at, value) for at, value in found if value is not None]


def _score(stored: dict[str, Any], name: str, metric: str) -> float | None:
    values = stored.get(name)
    return number(values.get(metric)) if isinstance(values, dict) else None


def chooses(run: Run) -> bool:
    wanted = run.prepared.recipe.evaluate
    return wanted.keep == "best" or wanted.early_stopping_patience is not None


def resume(run: Run, start: int, total: int) -> None:
    """Before a run goes on after ``start``: what was kept must be there.

    Raises:
        ModelError: the best adapter so far is lost, or a judgement that it was chosen by.
    """
    if not chooses(run):
        return
    if start < total:
        scores.drop(run.folder, ended.LAST, ended.AFTER)  # of an earlier, shorter end
    wanted = run.prepared.recipe.evaluate
    last = start - 1 if run.judges_at(start, total) else min(start, total - 1)  # that at ``start`` is made again
    again = f"remove {run.folder.checkpoints}: the run then lives its steps again, to the same bits"
    if len(_measured(run, last)) < last // wanted.every:
        what = "this run chooses by its evaluations, and this file has lost some"
        raise ModelError(what, str(run.folder.scores), again)
    best = standing(run, last).best
    # A better step from ``start`` on may have been kept before the run was cut off; it comes again.
    whole = best is None or any(step == best[0] or step >= start for step in _kept(run.folder))
    if wanted.keep == "best" and best is not None and not whole:
        what = f"the adapter of step {best[0]}, the best so far, is damaged or lost"
        raise ModelError(what, str(_place(run.folder, best[0])), again)


def after(run: Run, policy: Policy, step: int, total: int) -> Facts | None:
    """What follows from the evaluation after ``step``: the best adapter is kept; why the run is to end, or None."""
    if not (chooses(run) and run.judges_at(step, total)):
        return None
    wanted, found = run.prepared.recipe.evaluate, standing(run, step)
    if wanted.keep == "best" and found.best is not None and found.best[0] == step:
        _keep(run, policy, step)
    patience = wanted.early_stopping_patience
    if patience is None or found.waited < patience:
        return None
    stopped = {"by": wanted.best_by, "patience": patience, "since": found.since}
    return stopped | {"threshold": wanted.early_stopping_threshold}


def conclude(run: Run, policy: Policy, step: int, stopped: Facts | None) -> tuple[Facts, str | None]:
    """At the end, after ``step``: put the adapter that is kept into the policy.

    Returns what finished.json is to tell, and the name of the judgement that is of these very weights (None: there is
    none yet).

    Raises:
        ModelError: the kept adapter is damaged.
    """
    wanted, facts = run.prepared.recipe.evaluate, Facts()
    if stopped:
        facts = {"of": len(run.course().steps), "stopped": stopped}
    if wanted.keep == "last":
        return facts, ended.at_step(step) if stopped else None
    name = ended.at_step(step) if stopped else ended.LAST
    run.judge(policy, name)
    last, best = _score(scores.read(run.folder), name, wanted.best_by), standing(run, step).best
    kept, value = step, last
    if best is not None and (last is None or evals.gain(wanted.best_by, last, best[1]) <= 0):
        kept, value = best
    if kept != step:
        name = ended.at_step(kept)
        _put_back(run, policy, kept)
    return facts | {"kept": {"step": kept, "by": wanted.best_by, "value": value, "last": last}}, name


def _place(folder: RunFolder, step: int) -> Path:
    return folder.checkpoints / f"best-{step:08d}"


def _folders(folder: RunFolder) -> dict[int, Path]:
    found = {path.name[5:]: path for path in folder.checkpoints.glob("best-*")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def _kept(folder: RunFolder) -> list[int]:
    """The steps whose adapters are kept whole: one, or two where the run was cut off between them."""
    return [step for step, path in _folders(folder).items() if not manifest.faults(path)]


def _keep(run: Run, policy: Policy, step: int) -> None:
    """Keep a step's adapter, and then no other: there is always one that is whole."""
    if step not in _kept(run.folder):
        files = {
            checkpoint.ADAPTER: tensors_to(model.adapter_weights(policy.model), {"format": "pt"}),
            checkpoint.CONFIG: json_bytes(model.adapter_config(policy.model, run.prepared.plan.model)),
        }
        make_folder(run.folder.checkpoints)
        checkpoint.write_folder(_place(run.folder, step), files)
    for other, path in _folders(run.folder).items():
        if other != step:
            discard(path)


def _put_back(run: Run, policy: Policy, step: int) -> None:
    place = _place(run.folder, step)
    if step not in _kept(run.folder):
        what = f"the adapter of step {step}, the best one, is damaged or lost"
        raise ModelError(what, str(place), f"remove {run.folder.checkpoints}, and give the command again")
    model.load_adapter(policy.model, tensors_from((place / checkpoint.ADAPTER).read_bytes()), place)
