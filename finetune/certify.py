"""Merge an adapter into a folder, load that folder from the disk, and prove that it is the trained model."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass, replace
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
    runpage,
    scores,
    unfinished,
    whole,
)
from finetune import base as bases
from finetune import merge as merging
from finetune.base import Base
from finetune.checkpoint import Checkpoint
from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.loading import BaseForm
from finetune.merge import FoldPlan
from finetune.runfolder import json_bytes, read_json, remove, write_atomic, write_synced
from finetune.terminal import ByteBar, Progress, Terminal, size
from finetune.trained import Trained

PROVENANCE = "finetune.json"
_MEASURED = ".measured.json"
WIDE = BaseForm(weights="fp32", double=False, compute="fp32", device="cpu")
_ABSURD = 100.0
"""Times its own norm by which no training changes a tensor."""
KEPT = ("*.safetensors", _MEASURED)
"""What a merge that was killed need not do again: whole shards, and what the choices of a base were measured as."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What kind of merge. ``base``: replayed (as it was trained against), original (as published), or auto, what is
    measured to be nearer to the live model; ``correct``: the rank at which the published base is corrected towards
    the other, 0 for not at all; ``layout``: native or original."""

    base: str = "auto"
    correct: int = 0
    layout: str = "native"

    def choices(self) -> list[str]:
        """The merges that come into question."""
        first = ["replayed"] if self.base != "original" else []
        if self.base == "replayed":
            return first
        return [*first, *(["original"] if self.base == "auto" or not self.correct else []),
                *(["corrected"] if self.correct else [])]  # fmt: skip


def merge(given: Trained, out: Path, asked: Asked, terminal: Terminal) -> dict[str, Any]:
    """Fold the adapter into the base, load the result from the disk, and prove that it is the trained model."""
    layouts.refuse_impossible(given.base, asked.layout)
    if asked.correct and (asked.base == "replayed" or not given.is_quantised()):
        what = "there is nothing to correct: the base is the one that was trained against"
        raise ModelError(what, "--correct", "leave it out")
    if out.exists() or out.is_symlink():
        digest = manifest.digest(given.folder / checkpoint.ADAPTER)
        wanted = {"adapter_sha256": digest, "layout": asked.layout, "correct_rank": asked.correct}
        return _already(out, wanted, asked.base, terminal)
    with unfinished.folder(out, made_of(given, asked), KEPT) as temporary:
        note, reason = make(given, temporary, asked, terminal)
        bar = ByteBar.over(terminal, "digesting", temporary.rglob("*"))
        manifest.write(temporary, manifest.digests(temporary, bar.more))
    if reason:
        raise FinetuneError(reason, str(out), "the folder is marked unusable (config.json.unusable)")
    kept = note["proof"]
    rewards = f"; rewards differ by {kept['apart']:.1e} at most" if "apart" in kept else ""
    terminal.say(f"merged model: {out}   proof: mean KL {kept['mean_kl']:.1e} ≤ {kept['bound']:.0e}{rewards}")
    return note


def made_of(given: Trained, asked: Asked) -> dict[str, Any]:
    """What decides every byte of the merged weights."""
    adapter, form = manifest.digest(given.folder / checkpoint.ADAPTER), asdict(given.form)
    made = {"adapter": adapter, "base": dict(given.sha256), "form": form, "rope": given.rope, "by": __version__}
    return made | asdict(asked)


def make(given: Trained, out: Path, asked: Asked, terminal: Terminal) -> tuple[dict[str, Any], str]:
    """The merged model and its proof, in the folder ``out``; → what was done, and why it does not hold.

    What a killed merge has finished in that folder (``KEPT``) is taken over.
    """
    _check_room(out, bases.stored_bytes(given.base.tensors))
    wide = fits(given.base, WIDE)
    policy = given.live(terminal, wide=wide)
    expected = proof.distributions(policy, given.rows, Progress(terminal, "asking the live model, batch"))
    del policy
    gc.collect()
    trained = checkpoint.read_adapter(given.folder)
    possible = asked.choices()[:1] if given.by_peft else asked.choices()
    choices: dict[str, dict[str, float]] = {}
    if len(possible) > 1 and given.is_quantised():
        choices = read_json(out / _MEASURED) or _measured(given, expected, trained, asked)
        write_atomic(out / _MEASURED, json_bytes(choices))
    taken = min(choices, key=lambda name: choices[name]["mean_kl"]) if choices else possible[0]
    if choices:
        choices["live"] = {"loss": proof.loss(expected, given.rows)}
        for line in _table(choices, taken, len(expected)):
            terminal.say(line)
    if given.by_peft:
        found = _write_whole(given, trained.config["peft_type"], taken, (out, asked.layout), terminal)
    else:
        plan = _plan(given, trained, taken, asked)
        found = _write_merged(given, plan, trained.weights, (out, asked.layout), terminal)
    judged = _judge_merged(given, out, expected, taken, terminal)
    note = {
        "adapter_sha256": manifest.digest(given.folder / checkpoint.ADAPTER),
        "base": {"name": given.name, "commit": given.commit, "sha256": dict(given.sha256)},
        "base_asked": asked.base,
        "base_choice": taken,
        "correct_rank": asked.correct,
        "choices": choices,
        "layout": asked.layout,
        "rope": given.rope,
        "quantised_as": given.form.weights if taken == "replayed" else None,
        **found,
        "proof": judged["proof"].to_dict(),
    }
    remove(out / _MEASURED)
    write_synced(out / PROVENANCE, json_bytes(note))
    if not judged["holds"]:
        proof.mark_unusable(out)
    return note, judged["reason"]


def _plan(given: Trained, trained: Checkpoint, choice: str, asked: Asked) -> FoldPlan:
    return merging.make_plan(
        given.base, given.form, trained.weights, trained.config, replayed=choice == "replayed",
        correct=asked.correct if choice == "corrected" else 0,
    )  # fmt: skip


def _measured(given: Trained, expected: Any, trained: Checkpoint, asked: Asked) -> dict[str, dict[str, float]]:
    """Loss and mean KL to the live model of each merge, without writing either: tensors are folded as they are read."""
    found = {}
    form = proof_form(given.base, given.form)
    for name in asked.choices():
        change = _plan(given, trained, name, asked).folding(trained.weights).whole
        policy = (model.load_base if fits(given.base, form) else model.stream_base)(given.base, form, change=change)
        answers = proof.distributions(policy, given.rows)
        mean_kl = proof.compare(expected, answers, proof.MEAN_KL[name]).mean_kl
        found[name] = {"loss": proof.loss(answers, given.rows), "mean_kl": mean_kl}
        if not all(map(math.isfinite, found[name].values())):
            what = "the merged model gives no numbers: alpha or the weights are damaged"
            raise ModelError(what, str(given.folder), "fetch the adapter again")
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
        "corrected": "the same, corrected",
    }
    for key, name in names.items():
        if key not in choices:
            continue
        kl = f"{choices[key]['mean_kl']:.1e}" if "mean_kl" in choices[key] else "-"
        lines.append(f"{name:<28}{choices[key]['loss']:>9.4f}{kl:>18}{'  ← taken' if key == taken else ''}")
    return lines


def _write_merged(
    given: Trained, plan: FoldPlan, weights: Any, to: tuple[Path, str], terminal: Terminal
) -> dict[str, Any]:
    out, layout = to
    for line in plan.lines():
        terminal.say(line)
    changes = merging.apply(plan, given.base, weights, out, layout, Progress(terminal, "folding tensor"))
    layouts.write(given.base, out, layout, trained=True)  # last: a folder without its config loads nowhere
    if changes:
        sizes = sorted(changes.values())
        if not sizes[-1] < _ABSURD:
            name = max(changes, key=lambda key: changes[key])
            what = f"{name} changes by {sizes[-1]:.1e} times its norm: alpha or the weights are damaged"
            raise ModelError(what, str(given.folder), "fetch the adapter again")
        middle = sizes[len(sizes) // 2]
        terminal.say(f"tensors change by {sizes[0]:.2%} to {sizes[-1]:.2%} of their norm, half by {middle:.2%} or less")
    count = sum(bool(fold.lora_a or fold.replacement or fold.rows) for fold in plan.folds.values())
    return {"folded_tensors": count, "relative_changes": dict(sorted(changes.items()))}


def _write_whole(given: Trained, method: str, choice: str, to: tuple[Path, str], terminal: Terminal) -> dict[str, Any]:
    memory = size(whole.need(given.base))
    terminal.say(f"{method} is merged by PEFT itself: the whole model in memory in fp32, about {memory}")
    progress = Progress(terminal, "writing tensor")
    whole.apply(given.base, given.form, given.folder, *to, progress, replayed=choice == "replayed")
    layouts.write(given.base, *to, trained=True)
    return {"folded_tensors": 0, "relative_changes": {}, "merged_by": "peft"}


def _judge_merged(given: Trained, folder: Path, expected: Any, choice: str, terminal: Terminal) -> dict[str, Any]:
    """Load the folder as anyone would, compare with the live model, and score the held-out rows."""
    merged, compute = bases.inspect(folder), given.form.compute
    wide = proof_form(merged, given.form)
    policy = (model.load_base if fits(merged, wide) else model.stream_base)(merged, wide)
    asking = Progress(terminal, "asking the merged model, batch")
    compared = proof.compare(expected, proof.distributions(policy, given.rows, asking), proof.MEAN_KL[choice])
    result = {"proof": compared, "holds": compared.holds, "reason": ""}
    if not compared.holds:
        result["reason"] = f"the merged model differs: mean KL {compared.mean_kl:.2e} nats, bound {compared.bound:.0e}"
        return result
    held_out = given.run.prepared.held_out if given.run else None
    form = BaseForm(weights=compute, double=False, compute=compute, device=given.form.device)
    holds = fits(merged, form)
    if not holds:
        terminal.say("the merged model does not fit this machine: compared layer by layer, its rows are not scored")
    if given.run is None or held_out is None or not holds:
        return result
    if form != wide:  # its rows are scored as those of the live model were
        del policy
        gc.collect()
        policy = model.load_base(merged, form, ByteBar(terminal, "loading the merged model").at)
    bars: dict[str, Progress] = {}

    def show(what: str, done: int, of: int) -> None:
        bars.setdefault(what, Progress(terminal, f"judging merged: {what}"))(done, of)

    judged = evaluate.judge(policy, held_out, given.run.how(), progress=show, origin=given.run.origin())
    stored = scores.record(given.run.folder, "merged", judged, held_out)
    runpage.keep(given.run.folder, terminal)
    for line in scores.table(stored):
        terminal.say(line)
    after = stored.get("after", {}).get("exact_match")
    if choice == "replayed" and after is not None:
        count = len(held_out.questions)
        apart = round(abs(judged.scores["exact_match"] - after) * count)
        if apart > max(1, count // 200) and form != wide:
            terminal.say(f"{apart} of {count} rows apart in {compute}, whose rounding turns close answers: now in fp32")
            del policy
            live = given.run.right(given.live(terminal, wide=True))
            apart = abs(given.run.right(model.load_base(merged, wide)) - live)
        if apart > max(1, count // 200):
            result["holds"] = False
            result["reason"] = f"the merged model answers {apart} of {count} rows differently"
    return result


def proof_form(base: Base, form: BaseForm) -> BaseForm:
    """How a merged model is asked for a proof: in fp32 where it fits, as the live one was then.

    In bf16 two equal models answer differently: 9e-4 nats apart for a 135M model whose merge is 4e-5 off.
    """
    if fits(base, WIDE):
        return replace(WIDE, device=form.device)
    return replace(form, weights=form.compute, double=False)


def fits(merged: Base, form: BaseForm) -> bool:
    """Whether the merged model can be held here, with room to answer."""
    size = budget.weight_bytes(form.weights, form.double, form.compute, merged.shape, form.device)
    return size + 2e9 < hardware.detect().free_memory * budget.USABLE


def _already(out: Path, wanted: dict[str, Any], base: str, terminal: Terminal) -> dict[str, Any]:
    """The same merge again changes nothing; anything else in the way is refused."""
    note = read_json(out / PROVENANCE) if out.is_dir() else None
    asked = isinstance(note, dict) and base in (note.get("base_asked"), note.get("base_choice"))
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


def _check_room(out: Path, whole_size: int) -> None:
    free, needed = hardware.free_disk(out), whole_size - sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if free < needed + 50_000_000:
        what = f"{size(free)} free, the merged model needs {size(needed)}"
        raise EnvironmentFault(what, str(out.parent), "free some space or give another --out")
