"""Merge an adapter into a folder, load that folder from the disk, and prove that it is the trained model."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune import (
    __version__,
    budget,
    checkpoint,
    evaluate,
    hardware,
    layouts,
    manifest,
    model,
    proof,
    scores,
    unfinished,
)
from finetune import base as bases
from finetune import merge as merging
from finetune.base import Base
from finetune.checkpoint import Checkpoint
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.loading import BaseForm
from finetune.merge import FoldPlan
from finetune.runfolder import json_bytes, read_json, remove, write_atomic, write_synced
from finetune.terminal import Progress, Terminal
from finetune.trained import Trained

PROVENANCE = "finetune.json"
_MEASURED = ".measured.json"
KEPT = ("*.safetensors", _MEASURED)
"""What a merge that was killed need not do again: whole shards, and what the choices of a base were measured as."""


def merge(given: Trained, out: Path, choice: str, terminal: Terminal, layout: str = "native") -> dict[str, Any]:
    """Fold the adapter into the base, load the result from the disk, and prove that it is the trained model.

    ``choice``: replayed (the base as it was trained against), original (as published), or auto: what is measured to be
    nearer to the live model.
    """
    layouts.refuse_impossible(given.base, layout)
    if out.exists():
        digest = manifest.digest(given.folder / checkpoint.ADAPTER)
        return _already(out, {"adapter_sha256": digest, "base_asked": choice, "layout": layout}, terminal)
    with unfinished.folder(out, made_of(given, choice, layout), KEPT) as temporary:
        note, reason = make(given, (temporary, layout), choice, terminal)
        manifest.write(temporary, manifest.digests(temporary))
    if reason:
        raise FinetuneError(reason, str(out), "the folder is marked unusable (config.json.unusable)")
    kept = note["proof"]
    terminal.say(f"merged model: {out}   proof: mean KL {kept['mean_kl']:.1e} ≤ {kept['bound']:.0e}")
    return note


def made_of(given: Trained, choice: str, layout: str) -> dict[str, Any]:
    """What decides every byte of the merged weights."""
    adapter, form = manifest.digest(given.folder / checkpoint.ADAPTER), asdict(given.form)
    asked = {"choice": choice, "layout": layout, "rope": given.rope}
    return {"adapter": adapter, "base": dict(given.sha256), "form": form, "by": __version__} | asked


def make(given: Trained, to: tuple[Path, str], choice: str, terminal: Terminal) -> tuple[dict[str, Any], str]:
    """The merged model and its proof, in the folder and layout ``to``; → what was done, and why it does not hold.

    What a killed merge has finished in that folder (``KEPT``) is taken over.
    """
    _check_room(to[0], bases.stored_bytes(given.base.tensors))
    policy = given.live()
    expected = proof.distributions(policy, given.rows)
    del policy
    gc.collect()
    trained = checkpoint.read_adapter(given.folder)
    choices: dict[str, dict[str, float]] = {}
    if choice == "auto" and given.is_quantised():
        choices = read_json(to[0] / _MEASURED) or _measured(given, expected, trained)
        write_atomic(to[0] / _MEASURED, json_bytes(choices))
    taken = min(choices, key=lambda name: choices[name]["mean_kl"]) if choices else _plain(choice)
    if choices:
        choices["live"] = {"loss": proof.loss(expected, given.rows)}
        for line in _table(choices, taken, len(expected)):
            terminal.say(line)
    folding = merging.make_plan(given.base, given.form, trained.weights, trained.config, replayed=taken == "replayed")
    found = _write_merged(given, folding, trained.weights, to, terminal)
    judged = _judge_merged(given, to[0], expected, taken, terminal)
    note = {
        "adapter_sha256": manifest.digest(given.folder / checkpoint.ADAPTER),
        "base": {"name": given.name, "commit": given.commit, "sha256": dict(given.sha256)},
        "base_asked": choice,
        "base_choice": taken,
        "choices": choices,
        "layout": to[1],
        "rope": given.rope,
        "quantised_as": given.form.weights if taken == "replayed" else None,
        "folded_tensors": found,
        "proof": judged["proof"].to_dict(),
    }
    remove(to[0] / _MEASURED)
    write_synced(to[0] / PROVENANCE, json_bytes(note))
    if not judged["holds"]:
        proof.mark_unusable(to[0])
    return note, judged["reason"]


def _plain(choice: str) -> str:
    return "replayed" if choice == "auto" else choice


def _measured(given: Trained, expected: Any, trained: Checkpoint) -> dict[str, dict[str, float]]:
    """Loss and mean KL to the live model of each merge, without writing either: tensors are folded as they are read."""
    found = {}
    form = replace(given.form, weights=given.form.compute, double=False)
    for name in ("replayed", "original"):
        plan = merging.make_plan(given.base, given.form, trained.weights, trained.config, replayed=name == "replayed")
        change = merging.Merged(plan=plan, weights=trained.weights).whole
        fits = _fits(given.base, form)
        policy = (model.load_base if fits else model.stream_base)(given.base, form, change=change)
        answers = proof.distributions(policy, given.rows)
        found[name] = {
            "loss": proof.loss(answers, given.rows), "mean_kl": proof.compare(expected, answers, name).mean_kl,
        }  # fmt: skip
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


def _write_merged(given: Trained, folding: FoldPlan, weights: Any, to: tuple[Path, str], terminal: Terminal) -> int:
    out, layout = to
    for line in folding.lines():
        terminal.say(line)
    merging.apply(folding, given.base, weights, out, layout, Progress(terminal, "folding tensor"))
    layouts.write(given.base, out, layout, trained=True)  # last: a folder without its config loads nowhere
    return sum(bool(fold.lora_a or fold.replacement or fold.rows) for fold in folding.folds.values())


def _judge_merged(given: Trained, folder: Path, expected: Any, choice: str, terminal: Terminal) -> dict[str, Any]:
    """Load the folder as anyone would, compare with the live model, and score the held-out rows."""
    merged, compute = bases.inspect(folder), given.form.compute
    form = BaseForm(weights=compute, double=False, compute=compute, device=given.form.device)
    fits = _fits(merged, form)
    policy = model.load_base(merged, form) if fits else model.stream_base(merged, form)
    compared = proof.compare(expected, proof.distributions(policy, given.rows), choice)
    result = {"proof": compared, "holds": compared.holds, "reason": ""}
    if not compared.holds:
        result["reason"] = f"the merged model differs: mean KL {compared.mean_kl:.2e} nats, bound {compared.bound:.0e}"
        return result
    held_out = given.run.prepared.held_out if given.run else None
    if not fits:
        terminal.say("the merged model does not fit this machine: compared layer by layer, its rows are not scored")
    if given.run is None or held_out is None or not fits:
        return result
    bars: dict[str, Progress] = {}

    def show(what: str, done: int, of: int) -> None:
        bars.setdefault(what, Progress(terminal, f"judging merged: {what}"))(done, of)

    judged = evaluate.judge(policy, held_out, given.run.how(), progress=show)
    stored = scores.record(given.run.folder, "merged", judged, held_out)
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
