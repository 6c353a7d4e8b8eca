"""A finished run, opened again from its own files alone, and its model as it trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune import gather, identity, manifest, model, prepare
from finetune.errors import DataError, ModelError, RecipeError
from finetune.model import Policy
from finetune.prepare import Prepared
from finetune.proof import UNUSABLE
from finetune.run import Run
from finetune.runfolder import RunFolder
from finetune.terminal import ByteBar, Terminal


def open_run(folder: Path, terminal: Terminal, overrides: Sequence[str] = ()) -> tuple[Prepared, RunFolder]:
    """A finished run, from its own files alone; its base and data must be those that it trained on.

    ``overrides``: other rows to judge on, or another way to judge.

    Raises:
        ModelError: no finished run is there, its adapter is damaged, or the base has changed.
        DataError: a data file has changed, so that new scores could not stand beside the old.
    """
    files = RunFolder(folder)
    if (folder / UNUSABLE).is_file():
        raise ModelError("this merge did not pass its proof", str(folder), "remove it and merge again")
    if not files.identity.is_file():
        raise ModelError("this is not a run folder", str(folder), "give the `output:` folder of a finished run")
    if not files.finished.is_file():
        raise ModelError("this run is not finished", str(folder), "run `finetune train` again to finish it")
    faults = manifest.faults(files.adapter)
    if faults:
        raise ModelError(faults[0], str(files.adapter), "train again, or take the adapter from a backup")
    try:
        prepared = prepare.prepare(files.recipe, overrides, training=False)
    except RecipeError as error:  # the recipe was good once; what it names is looked for from here
        fix = "go to the folder where the run was started, whose files its recipe names"
        shown = [fault if "--set" in fault.where else fault._replace(fix=fix) for fault in error.faults]
        raise RecipeError.of(shown) from None
    stored = identity.read(files.identity)
    bar = ByteBar.over(terminal, "verifying the base", prepared.base.files() if prepared.base else ())
    if prepared.base is None or stored is None or prepared.base.digests(bar.more) != stored.base:
        raise ModelError("the base is not the one that this run trained on", prepared.recipe.model, "put it back")
    now = gather.digests(prepared.recipe)
    for path in sorted({*stored.data, *now} if not overrides else {*stored.data} & {*now}):
        if stored.data.get(path) != now.get(path):
            raise DataError("this file is not the one that the run began with", path, "put it back")
    return prepared, files


def live(prepared: Prepared, files: RunFolder, terminal: Terminal) -> tuple[Run, Policy]:
    """The trained model as it trained: the adapter on the base in the run's own form."""
    this = run_of(prepared, files, terminal)
    return this, policy(this)


def run_of(prepared: Prepared, files: RunFolder, terminal: Terminal) -> Run:
    """The run itself, as it was when it ended; nothing is loaded."""
    this = Run(prepared, terminal, identity.read(files.identity))
    this.folder = files
    return this


def policy(this: Run) -> Policy:
    """The adapter on the base in the run's own form."""
    base = model.load_base(this.base, this.form(), ByteBar(this.terminal, "loading the base").at)
    return model.attach_saved(base, this.folder.adapter)
