"""The table of contents: what each verb does, in the order of the road, one screen each."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import base as bases
from finetune import checkpoint, evaluate, identity, manifest, merge, model, prepare, proof, run, scores
from finetune.errors import DataError, EnvironmentFault, FinetuneError, ModelError
from finetune.merge import FoldPlan
from finetune.model import BaseForm, Policy
from finetune.plan import Plan
from finetune.prepare import Prepared
from finetune.report import plan_lines
from finetune.run import Run
from finetune.runfolder import RunFolder, atomic_folder, json_bytes, read_json, remove, write_json, write_synced
from finetune.terminal import Progress, Terminal, duration

PROVENANCE = "finetune.json"


def plan(recipe: Path, overrides: Sequence[str], terminal: Terminal) -> Plan:
    """Check everything and say what a run would do."""
    prepared = prepare.prepare(recipe, overrides)
    for line in plan_lines(prepared.plan):
        terminal.say(line)
    return prepared.plan


def train(recipe: Path, overrides: Sequence[str], terminal: Terminal, *, extend: bool = False) -> RunFolder:
    """The same checks, then the run: begun, or taken up where it stands."""
    prepared = prepare.prepare(recipe, overrides)
    if prepared.base is None:
        raise ModelError(
            "the model is not on this disk",
            prepared.recipe.model,
            "fetch it (for the shipped recipes: make base, make tiny-base) and name its folder in `model:`",
        )
    for line in plan_lines(prepared.plan)[-4:]:
        terminal.say(line)
    folder = run.train(prepared, terminal, extend=extend)
    for line in scores.table(read_json(folder.scores) or {}):
        terminal.say(line)
    terminal.say(f"adapter: {folder.adapter}   curves: {folder.metrics}   answers: {folder.samples}")
    return folder


def opened(folder: Path) -> tuple[Prepared, RunFolder]:
    """A finished run, from its own files alone; its base and data must be those that it trained on.

    Raises:
        ModelError: no finished run is there, its adapter is damaged, or the base has changed.
        DataError: a data file has changed, so that new scores could not stand beside the old.
    """
    files = RunFolder(folder)
    if not files.identity.is_file():
        raise ModelError("this is not a run folder", str(folder), "give the `output:` folder of a finished run")
    if not files.finished.is_file():
        raise ModelError("this run is not finished", str(folder), "run `finetune train` again to finish it")
    faults = manifest.faults(files.adapter)
    if faults:
        raise ModelError(faults[0], str(files.adapter), "train again, or take the adapter from a backup")
    prepared = prepare.prepare(files.recipe)
    stored = identity.read(files.identity)
    if prepared.base is None or stored is None or prepared.base.digests() != stored.base:
        raise ModelError("the base is not the one that this run trained on", prepared.recipe.model, "put it back")
    for path, digest in stored.data.items():
        if manifest.digest(Path(path)) != digest:
            raise DataError("this file is not the one that the run began with", path, "put it back")
    return prepared, files


def live(prepared: Prepared, files: RunFolder, terminal: Terminal) -> tuple[Run, Policy]:
    """The trained model as it trained: the adapter on the base in the run's own form."""
    assert prepared.base is not None
    this = Run(prepared, terminal)
    stored = identity.read(files.identity)
    assert stored is not None
    this.identity, this.folder = stored, files
    policy = model.attach_saved(model.load_base(prepared.base, this.form()), files.adapter)
    return this, policy


def merge_run(folder: Path, out: Path, choice: str, terminal: Terminal) -> dict[str, Any]:
    """Fold the adapter into the base, load the result from the disk, and prove that it is the trained model."""
    prepared, files = opened(folder)
    assert prepared.base is not None
    digest = manifest.digest(files.adapter / checkpoint.ADAPTER)
    if out.exists():
        return _already(out, digest, choice, terminal)
    needed = bases.stored_bytes(prepared.base.tensors)
    _check_room(out, needed)
    this, policy = live(prepared, files, terminal)
    rows = prepared.held_out.examples if prepared.held_out else prepared.examples
    expected = proof.distributions(policy, rows)
    del policy
    gc.collect()
    trained = checkpoint.read_adapter(files.adapter)
    for stale in out.parent.glob(f"{out.name}.tmp-*"):
        remove(stale)
    folding = merge.make_plan(
        prepared.base, this.form(), trained.weights, trained.config, replayed=choice == "replayed"
    )
    with atomic_folder(out) as temporary:
        found = _write_merged(this, folding, trained.weights, temporary, terminal)
        judged = _judge_merged(this, temporary, rows, expected, choice, terminal)
        note = {
            "adapter_sha256": digest,
            "base": {"name": prepared.recipe.model, "sha256": this.identity.base},
            "base_choice": choice,
            "quantised_as": this.form().weights if choice == "replayed" else None,
            "folded_tensors": found,
            "proof": judged["proof"].to_dict(),
        }
        write_synced(temporary / PROVENANCE, json_bytes(note))
        if not judged["holds"]:
            proof.mark_unusable(temporary)
        entries = manifest.digests(path for path in temporary.iterdir())
        manifest.write(temporary, entries)
    if not judged["holds"]:
        raise FinetuneError(judged["reason"], str(out), "the folder is marked unusable (config.json.unusable)")
    terminal.say(f"merged model: {out}   proof: mean KL {judged['proof'].mean_kl:.1e} ≤ {judged['proof'].bound:.0e}")
    return note


def _write_merged(this: Run, folding: FoldPlan, weights: Any, out: Path, terminal: Terminal) -> int:
    for line in folding.lines():
        terminal.say(line)
    merge.copy_files(this.base, out)
    merge.apply(folding, this.base, weights, out, Progress(terminal, "folding tensor"))
    return sum(bool(fold.lora_a or fold.replacement) for fold in folding.folds.values())


def _judge_merged(this: Run, folder: Path, rows: Any, expected: Any, choice: str, terminal: Terminal) -> dict[str, Any]:
    """Load the folder as anyone would, compare with the live model, and score the held-out rows."""
    merged = bases.inspect(folder)
    form = BaseForm(weights=this.form().compute, double=False, compute=this.form().compute, device=this.form().device)
    policy = model.load_base(merged, form)
    compared = proof.compare(expected, proof.distributions(policy, rows), choice)
    result = {"proof": compared, "holds": compared.holds, "reason": ""}
    if not compared.holds:
        result["reason"] = f"the merged model differs: mean KL {compared.mean_kl:.2e} nats, bound {compared.bound:.0e}"
        return result
    held_out = this.prepared.held_out
    if held_out is None:
        return result
    bars: dict[str, Progress] = {}

    def show(what: str, done: int, of: int) -> None:
        bars.setdefault(what, Progress(terminal, f"judging merged: {what}"))(done, of)

    judged = evaluate.judge(policy, held_out, this.how(), progress=show)
    stored = scores.record(this.folder, "merged", judged, held_out)
    for line in scores.table(stored):
        terminal.say(line)
    after = stored.get("after", {}).get("exact_match")
    if choice == "replayed" and after is not None:
        rows_apart = round(abs(judged.scores["exact_match"] - after) * len(held_out.questions))
        if rows_apart > max(1, len(held_out.questions) // 200):
            result["holds"] = False
            result["reason"] = f"the merged model answers {rows_apart} of {len(held_out.questions)} rows differently"
    return result


def _already(out: Path, digest: str, choice: str, terminal: Terminal) -> dict[str, Any]:
    """The same merge again changes nothing; anything else in the way is refused."""
    note = read_json(out / PROVENANCE) if out.is_dir() else None
    wanted = {"adapter_sha256": digest, "base_choice": choice}
    same = isinstance(note, dict) and all(note.get(key) == value for key, value in wanted.items())
    if isinstance(note, dict) and same and note["proof"]["holds"] and not manifest.faults(out):
        terminal.say(f"{out} is this adapter's merge already: nothing to do")
        return note
    raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")


def _check_room(out: Path, needed: int) -> None:
    from finetune.hardware import free_disk

    free = free_disk(out.absolute())
    if free < needed + 50_000_000:
        what = f"{free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB"
        raise EnvironmentFault(what, str(out), "free some space or give another --out")


def evaluate_run(folder: Path, terminal: Terminal) -> dict[str, Any]:
    """Judge a finished run's adapter and its base on the run's held-out rows, fresh."""
    prepared, files = opened(folder)
    if prepared.held_out is None:
        raise EnvironmentFault("this run has no held-out rows", str(folder), "set data.eval_path or data.eval_fraction")
    this, policy = live(prepared, files, terminal)
    found: dict[str, Any] = {}
    for name, adapter in (("base", False), ("adapter", True)):
        bars: dict[str, Progress] = {}

        def show(what: str, done: int, of: int, name: str = name, bars: dict[str, Progress] = bars) -> None:
            bars.setdefault(what, Progress(terminal, f"judging {name}: {what}"))(done, of)

        found[name] = evaluate.judge(policy, prepared.held_out, this.how(), adapter=adapter, progress=show).scores
    for line in scores.table(found):
        terminal.say(line)
    write_json(files.root / "evaluation.json", found)
    return found


def summary(folder: Path, seconds: float, terminal: Terminal) -> None:
    """What happened, where things lie, and what to type next."""
    files = RunFolder(folder)
    stored = read_json(files.scores) or {}
    terminal.say(f"done in {duration(seconds)}")
    for line in scores.table(stored):
        terminal.say(line)
    terminal.say("next:")
    for command in (f"chat {folder}", f"dashboard {folder.parent}", f"plan {files.recipe}"):
        terminal.say(f"  .venv/bin/finetune {command}")
