"""Merge a finished run into a folder, load that folder from the disk, and prove that it is the trained model."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import (
    __version__,
    budget,
    checkpoint,
    evaluate,
    finished,
    hardware,
    layouts,
    manifest,
    merge,
    model,
    proof,
    scores,
    unfinished,
)
from finetune import base as bases
from finetune.base import Base
from finetune.checkpoint import Checkpoint
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.loading import BaseForm
from finetune.merge import FoldPlan
from finetune.prepare import Prepared
from finetune.run import Run
from finetune.runfolder import RunFolder, json_bytes, read_json, remove, write_atomic, write_synced
from finetune.terminal import Progress, Terminal

if TYPE_CHECKING:
    from finetune.dataset import Example

PROVENANCE = "finetune.json"
_MEASURED = ".measured.json"
KEPT = ("*.safetensors", _MEASURED)
"""What a merge that was killed need not do again: whole shards, and what the choices of a base were measured as."""


def merge_run(folder: Path, out: Path, choice: str, terminal: Terminal, layout: str = "native") -> dict[str, Any]:
    """Fold the adapter into the base, load the result from the disk, and prove that it is the trained model.

    ``choice``: replayed (the base as it was trained against), original (as published), or auto: what is measured to be
    nearer to the live model.
    """
    prepared, files = finished.open_run(folder)
    assert prepared.base is not None
    layouts.refuse_impossible(prepared.base, layout)
    if out.exists():
        digest = manifest.digest(files.adapter / checkpoint.ADAPTER)
        return _already(out, {"adapter_sha256": digest, "base_asked": choice, "layout": layout}, terminal)
    with unfinished.folder(out, made_of(prepared, files, choice, layout), KEPT) as temporary:
        note, reason = make(prepared, files, (temporary, layout), choice, terminal)
        manifest.write(temporary, manifest.digests(temporary))
    if reason:
        raise FinetuneError(reason, str(out), "the folder is marked unusable (config.json.unusable)")
    kept = note["proof"]
    terminal.say(f"merged model: {out}   proof: mean KL {kept['mean_kl']:.1e} ≤ {kept['bound']:.0e}")
    return note


def made_of(prepared: Prepared, files: RunFolder, choice: str, layout: str) -> dict[str, Any]:
    """What decides every byte of the merged weights."""
    assert prepared.base is not None
    adapter = manifest.digest(files.adapter / checkpoint.ADAPTER)
    return {"adapter": adapter, "base": prepared.base.digests(), "choice": choice, "layout": layout, "by": __version__}


def make(
    prepared: Prepared, files: RunFolder, to: tuple[Path, str], choice: str, terminal: Terminal
) -> tuple[dict[str, Any], str]:
    """The merged model and its proof, in the folder and layout ``to``; → what was done, and why it does not hold.

    What a killed merge has finished in that folder (``KEPT``) is taken over.
    """
    assert prepared.base is not None
    _check_room(to[0], bases.stored_bytes(prepared.base.tensors))
    this, policy = finished.live(prepared, files, terminal)
    rows: Sequence[Example] = prepared.held_out.examples if prepared.held_out else this.samples
    expected = proof.distributions(policy, rows)
    del policy
    gc.collect()
    trained = checkpoint.read_adapter(files.adapter)
    choices: dict[str, dict[str, float]] = {}
    if choice == "auto" and _differ(this):
        choices = read_json(to[0] / _MEASURED) or _measured(this, rows, expected, trained)
        write_atomic(to[0] / _MEASURED, json_bytes(choices))
    taken = min(choices, key=lambda name: choices[name]["mean_kl"]) if choices else _plain(choice)
    if choices:
        choices["live"] = {"loss": proof.loss(expected, rows)}
        for line in _table(choices, taken, len(expected)):
            terminal.say(line)
    folding = merge.make_plan(this.base, this.form(), trained.weights, trained.config, replayed=taken == "replayed")
    found = _write_merged(this, folding, trained.weights, to, terminal)
    judged = _judge_merged(this, to[0], rows, expected, taken, terminal)
    note = {
        "adapter_sha256": manifest.digest(files.adapter / checkpoint.ADAPTER),
        "base": {"name": prepared.recipe.model, "commit": prepared.commit, "sha256": this.identity.base},
        "base_asked": choice,
        "base_choice": taken,
        "choices": choices,
        "layout": to[1],
        "rope": prepared.recipe.rope,
        "quantised_as": this.form().weights if taken == "replayed" else None,
        "folded_tensors": found,
        "proof": judged["proof"].to_dict(),
    }
    remove(to[0] / _MEASURED)
    write_synced(to[0] / PROVENANCE, json_bytes(note))
    if not judged["holds"]:
        proof.mark_unusable(to[0])
    return note, judged["reason"]


def _differ(this: Run) -> bool:
    """Whether the base as it was trained against is another one than the published."""
    return this.form().weights in ("nf4", "fp4", "int8")


def _plain(choice: str) -> str:
    return "replayed" if choice == "auto" else choice


def _measured(this: Run, rows: Sequence[Example], expected: Any, trained: Checkpoint) -> dict[str, dict[str, float]]:
    """Loss and mean KL to the live model of each merge, without writing either: tensors are folded as they are read."""
    found = {}
    form = replace(this.form(), weights=this.form().compute, double=False)
    for name in ("replayed", "original"):
        plan = merge.make_plan(this.base, this.form(), trained.weights, trained.config, replayed=name == "replayed")
        change = merge.Merged(plan=plan, weights=trained.weights).whole
        fits = _fits(this.base, form)
        policy = model.load_base(this.base, form, change=change) if fits else model.stream_base(this.base, form, change)
        answers = proof.distributions(policy, rows)
        found[name] = {"loss": proof.loss(answers, rows), "mean_kl": proof.compare(expected, answers, name).mean_kl}
        del policy
        gc.collect()
    return found


def _table(choices: dict[str, dict[str, float]], taken: str, positions: int) -> list[str]:
    """The measured choices, for a reader; the loss is that of these positions, not of all rows."""
    lines = [f"{f'{positions} positions, merged into':<28}{'loss':>9}{'mean KL to live':>18}"]
    names = {
        "live": "(adapter on the live base)",
        "replayed": "base as trained against",
        "original": "base as published",
    }
    for key, name in names.items():
        kl = f"{choices[key]['mean_kl']:.1e}" if "mean_kl" in choices[key] else "-"
        lines.append(f"{name:<28}{choices[key]['loss']:>9.4f}{kl:>18}{'  ← taken' if key == taken else ''}")
    return lines


def _write_merged(this: Run, folding: FoldPlan, weights: Any, to: tuple[Path, str], terminal: Terminal) -> int:
    out, layout = to
    for line in folding.lines():
        terminal.say(line)
    merge.apply(folding, this.base, weights, out, layout, Progress(terminal, "folding tensor"))
    layouts.write(this.base, out, layout, trained=True)  # last: a folder without its config loads nowhere
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
    asked = isinstance(note, dict) and wanted.pop("base_asked") in (note.get("base_asked"), note.get("base_choice"))
    same = isinstance(note, dict) and asked and all(note.get(key) == value for key, value in wanted.items())
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


def _check_room(out: Path, size: int) -> None:
    free, needed = hardware.free_disk(out), size - sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if free < needed + 50_000_000:
        what = f"{free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB"
        raise EnvironmentFault(what, str(out.parent), "free some space or give another --out")
