"""``finetune teach``: what a recipe's teacher says of all its rows, written down once; training then needs no teacher.

The rows that are trained and those that are held out, each sample once. A killed command goes on after the last part
that is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import manifest, model, prepare, taught, teacher, teaching, tokenizer
from finetune.errors import EnvironmentFault, RecipeError
from finetune.prepare import Prepared
from finetune.run import Run
from finetune.taught import Taught
from finetune.terminal import ByteBar, Progress, Terminal, size


def teach(
    recipe: Path, overrides: Sequence[str], out: Path, top_k: int, terminal: Terminal, progress: Any
) -> dict[str, Any]:
    """Write the record of a recipe's teacher into the folder ``out``; → what it is of.

    Raises:
        RecipeError: the recipe has no teacher that can be asked.
        DataError, ModelError: as preparing and loading say.
        EnvironmentFault: something else is at ``out``, or the disk refuses.
    """
    prepared = prepare.prepare(recipe, overrides, training=False, progress=progress)
    run = _run(prepared, terminal)
    shape = run.base.shape
    found = run.prepared.teacher
    assert found is not None
    width = min(shape.vocab, found.base.shape.vocab if found.base else shape.vocab)
    facts = teacher.facts_of(run, min(top_k, width))
    held_out = prepared.held_out.examples if prepared.held_out else ()
    samples = [*run.samples, *held_out]
    if out.exists() or out.is_symlink():
        return _done(out, facts, samples, terminal)

    def load() -> teacher.Live | teacher.Stored:
        if found.base is not None:
            return teacher.load(found, None, run.form(), terminal)
        terminal.say(f"loading {prepared.recipe.model} as {run.form().weights} on {run.form().device}")
        base = model.load_base(run.base, run.form(), ByteBar(terminal, "loading the base").at)
        return teacher.load(found, base, run.form(), terminal)

    bar = Progress(terminal, f"asking {found.name}, samples")
    said = teacher.write(out, facts, samples, load, prepared.plan.micro_batch_tokens, bar)
    return _told(said, terminal)


def _run(prepared: Prepared, terminal: Terminal) -> Run:
    """The recipe's run, which is not begun, with its teacher."""
    located, base = prepared.located, prepared.base
    if prepared.recipe.objective.method != "distill":
        where = located.where("objective.method")
        raise RecipeError("this recipe has no teacher", where, "objective: {method: distill, teacher: …}")
    if base is None:
        raise RecipeError(
            "the model is not on this disk", located.where("model"), "fetch it: it says what a row's ids are"
        )
    found = teaching.find(located, base, tokenizer.of(base), None)
    if found is None or found.record is not None:
        what = "this teacher is written down already"
        raise RecipeError(what, located.where(teaching.KEY), "name the run, adapter or model that is to be asked")
    return Run(replace(prepared, teacher=found), terminal)


def _done(out: Path, facts: taught.Facts, samples: Sequence[Any], terminal: Terminal) -> dict[str, Any]:
    """The same command again changes nothing; anything else in the way is refused."""
    if taught.is_one(out) and not manifest.faults(out):
        there = taught.read(out)
        if replace(there.facts, name="") == replace(facts, name="") and not there.missing(samples):
            terminal.say(f"{out} is just that already: nothing to do")
            return _told(there, terminal)
    raise EnvironmentFault(
        "something else is there, of another teacher, rows or settings", str(out), "give another --out"
    )


def _told(said: Taught, terminal: Terminal) -> dict[str, Any]:
    held = sum(path.stat().st_size for path in said.folder.iterdir())
    terminal.say(
        f"{said.folder}: the {said.facts.top_k} likeliest tokens at {said.tokens:,} positions of {said.samples:,} "
        f"samples, {size(held)}; train on it with objective.teacher={said.folder}"
    )
    return {
        "folder": str(said.folder),
        "samples": said.samples,
        "tokens": said.tokens,
        "bytes": held,
    } | said.facts.to_dict()
