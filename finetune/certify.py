"""Merge a finished run into a folder, load that folder from the disk, and prove that it is the trained model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from finetune import base as bases
from finetune import budget, checkpoint, evaluate, finished, hardware, layouts, manifest, merge, model, proof, scores
from finetune.base import Base
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.loading import BaseForm
from finetune.merge import FoldPlan
from finetune.run import Run
from finetune.runfolder import atomic_folder, clear_leftovers_of, json_bytes, read_json, write_synced
from finetune.terminal import Progress, Terminal

PROVENANCE = "finetune.json"


def merge_run(folder: Path, out: Path, choice: str, terminal: Terminal, layout: str = "native") -> dict[str, Any]:
    """Fold the adapter into the base, load the result from the disk, and prove that it is the trained model."""
    prepared, files = finished.open_run(folder)
    assert prepared.base is not None
    digest = manifest.digest(files.adapter / checkpoint.ADAPTER)
    layouts.refuse_impossible(prepared.base, layout)
    if out.exists():
        return _already(out, {"adapter_sha256": digest, "base_choice": choice, "layout": layout}, terminal)
    needed = bases.stored_bytes(prepared.base.tensors)
    _check_room(out, needed)
    this, policy = finished.live(prepared, files, terminal)
    rows = prepared.held_out.examples if prepared.held_out else this.samples
    expected = proof.distributions(policy, rows)
    del policy
    gc.collect()
    trained = checkpoint.read_adapter(files.adapter)
    clear_leftovers_of(out)
    folding = merge.make_plan(
        prepared.base, this.form(), trained.weights, trained.config, replayed=choice == "replayed"
    )
    with atomic_folder(out) as temporary:
        found = _write_merged(this, folding, trained.weights, (temporary, layout), terminal)
        judged = _judge_merged(this, temporary, rows, expected, choice, terminal)
        note = {
            "adapter_sha256": digest,
            "base": {"name": prepared.recipe.model, "commit": prepared.commit, "sha256": this.identity.base},
            "base_choice": choice,
            "layout": layout,
            "rope": prepared.recipe.rope,
            "quantised_as": this.form().weights if choice == "replayed" else None,
            "folded_tensors": found,
            "proof": judged["proof"].to_dict(),
        }
        write_synced(temporary / PROVENANCE, json_bytes(note))
        if not judged["holds"]:
            proof.mark_unusable(temporary)
        manifest.write(temporary, manifest.digests(temporary))
    if not judged["holds"]:
        raise FinetuneError(judged["reason"], str(out), "the folder is marked unusable (config.json.unusable)")
    terminal.say(f"merged model: {out}   proof: mean KL {judged['proof'].mean_kl:.1e} ≤ {judged['proof'].bound:.0e}")
    return note


def _write_merged(this: Run, folding: FoldPlan, weights: Any, to: tuple[Path, str], terminal: Terminal) -> int:
    out, layout = to
    for line in folding.lines():
        terminal.say(line)
    layouts.write(this.base, out, layout, trained=True)
    merge.apply(folding, this.base, weights, out, layout, Progress(terminal, "folding tensor"))
    return sum(bool(fold.lora_a or fold.replacement or fold.rows) for fold in folding.folds.values())


def _judge_merged(this: Run, folder: Path, rows: Any, expected: Any, choice: str, terminal: Terminal) -> dict[str, Any]:
    """Load the folder as anyone would, compare with the live model, and score the held-out rows."""
    merged = bases.inspect(folder)
    form = BaseForm(weights=this.form().compute, double=False, compute=this.form().compute, device=this.form().device)
    fits = _fits(merged, form)
    policy = model.load_base(merged, form) if fits else model.stream_base(merged, form)
    compared = proof.compare(expected, proof.distributions(policy, rows), choice)
    result = {"proof": compared, "holds": compared.holds, "reason": ""}
    if not compared.holds:
        result["reason"] = f"the merged model differs: mean KL {compared.mean_kl:.2e} nats, bound {compared.bound:.0e}"
        return result
    held_out = this.prepared.held_out
    if not fits:
        terminal.say("the merged model does not fit this machine: compared layer by layer, its rows are not scored")
    if held_out is None or not fits:
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


def _fits(merged: Base, form: BaseForm) -> bool:
    """Whether the merged model can be held here, with room to answer."""
    size = budget.weight_bytes(form.weights, form.double, form.compute, merged.shape)
    return size + 2e9 < hardware.detect().free_memory * budget.USABLE


def _already(out: Path, wanted: dict[str, str], terminal: Terminal) -> dict[str, Any]:
    """The same merge again changes nothing; anything else in the way is refused."""
    note = read_json(out / PROVENANCE) if out.is_dir() else None
    same = isinstance(note, dict) and all(note.get(key) == value for key, value in wanted.items())
    if isinstance(note, dict) and same and note["proof"]["holds"] and not manifest.faults(out):
        terminal.say(f"{out} is this adapter's merge already: nothing to do")
        return note
    if (out / proof.UNUSABLE).is_file():
        raise EnvironmentFault(
            "a merge that did not pass its proof is there", str(out), "remove it, or give another --out"
        )
    if same and (faults := manifest.faults(out)):
        raise EnvironmentFault(f"this adapter's merge is there, but {faults[0]}", str(out), "remove it and merge again")
    raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")


def _check_room(out: Path, needed: int) -> None:
    free = hardware.free_disk(out.absolute())
    if free < needed + 50_000_000:
        what = f"{free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB"
        raise EnvironmentFault(what, str(out), "free some space or give another --out")
