"""Several finished runs of one base as one adapter in PEFT's format, and what each run lost by the merge.

``finetune merge a:0.7 b:0.3``: the runs' adapters are summed by ``weigh``; then each run's own held-out rows are judged
with its adapter alone and with the merged one, on the base in the form that they trained against.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from finetune import adapter_file, checkpoint, evaluate, finished, identity, layouts, manifest, model, scores, weigh
from finetune.adapter_file import Adapter
from finetune.errors import EnvironmentFault, Fault, FinetuneError, ModelError, RecipeError
from finetune.model import Policy
from finetune.run import Run
from finetune.runfolder import RunFolder, atomic_folder, clear_leftovers_of, json_bytes, write_synced
from finetune.shards import Reader
from finetune.terminal import ByteBar, Progress, Terminal

RECORD = "blend.json"


@dataclass(frozen=True)
class Part:
    """A finished run and its weight in the sum; a negative one takes the run's update away."""

    run: Path
    share: float


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A part with its run and its adapter."""

    part: Part
    run: Run
    adapter: Adapter
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.part.run)


def parse(given: Sequence[str]) -> list[Part]:
    """``RUN:share`` words; a path may hold colons itself.

    Raises:
        RecipeError: every word without a share or with one that is none, a run named twice, fewer than two.
    """
    parts: list[Part] = []
    faults = []
    for word in given:
        run, _, share = word.rpartition(":")
        try:
            weight = float(share)
        except ValueError:
            weight = math.nan
        if not run or math.isnan(weight):
            fix = "give each run a weight: runs/a:0.7 runs/b:0.3"
            faults.append(Fault("this run has no weight", word, fix))
        elif math.isinf(weight) or weight == 0:
            faults.append(Fault(f"the weight {share} says nothing", word, "give a finite number that is not 0"))
        elif any(Path(run).resolve() == part.run.resolve() for part in parts):
            faults.append(Fault("this run is named twice", word, "name it once, with the sum of its weights"))
        else:
            parts.append(Part(Path(run), weight))
    if not faults and len(parts) < 2:
        fix = "give two or more: runs/a:0.7 runs/b:0.3"
        faults.append(Fault("a weighted merge needs several runs", " ".join(given), fix))
    if faults:
        raise RecipeError.of(faults)
    return parts


def blend(parts: Sequence[Part], out: Path, terminal: Terminal, options: weigh.Options) -> dict[str, Any]:
    """Write the merged adapter of ``parts`` into the new folder ``out``; → its record, with every part's losses.

    Raises:
        RecipeError: an option that cannot be.
        ModelError: parts that are no finished runs of one base in one form, or no plain LoRA.
        EnvironmentFault: something is in the way, or the disk refuses.
    """
    options.check()
    if out.exists() or out.is_symlink():
        raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")
    opened = _open(parts, terminal, options.method)
    first = opened[0].run
    shares = [part.share for part in parts]
    made = weigh.weigh([each.adapter for each in opened], shares, options, Progress(terminal, "merging module"))
    with Reader(first.base) as reader:
        configs = [each.config for each in opened]
        rows = weigh.weigh_rows([each.adapter for each in opened], configs, shares, _rows_of(reader))
    made = replace(made, rows=rows)
    for line in _said(made, opened, options):
        terminal.say(line)
    config, weights = made.peft(first.base.tensors, first.prepared.recipe.model)
    clear_leftovers_of(out)
    with atomic_folder(out) as temporary:
        write_synced(temporary / checkpoint.CONFIG, json_bytes(config))
        write_synced(temporary / checkpoint.ADAPTER, save(weights, {"format": "pt"}))
        layouts.copy_tokenizer(first.base, temporary)
        found = _losses(opened, temporary, terminal)
        note = {
            "method": made.method,
            "method_asked": options.method,
            "density": weigh.density(options) if made.method not in weigh.EXACT else None,
            "seed": options.seed if made.method.startswith("dare") else None,
            "rank": max(update.rank for update in made.updates.values()),
            "base": {
                "name": first.prepared.recipe.model,
                "commit": first.prepared.commit,
                "sha256": first.identity.base,
            },
            "rope": first.prepared.recipe.rope,
            "form": {key: value for key, value in asdict(first.form()).items() if key != "device"},
            "peft": config["peft_version"],
            "parts": [_part(each, losses) for each, losses in zip(opened, found, strict=True)],
        }
        write_synced(temporary / RECORD, json_bytes(note))
        manifest.write(temporary, manifest.digests(temporary))
    for line in table(note["parts"]):
        terminal.say(line)
    terminal.say(f"adapter: {out}")
    return note


def _rows_of(reader: Reader) -> Callable[[str, Sequence[int]], torch.Tensor]:
    return lambda module, ids: reader.rows(f"{module}.weight", ids)


def _part(each: _Opened, losses: dict[str, Any]) -> dict[str, Any]:
    digest = manifest.digest(each.run.folder.adapter / checkpoint.ADAPTER)
    return {"run": each.name, "share": each.part.share, "adapter_sha256": digest, **losses}


def _said(made: weigh.Weighed, opened: Sequence[_Opened], options: weigh.Options) -> list[str]:
    """What was done, where it is not what the word alone says."""
    ranks = sorted({update.rank for update in made.updates.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [f"{made.method} of {len(opened)} runs: {len(made.updates)} modules of rank {shown}"]
    if made.method in ("linear", "cat"):
        lines[0] += ", the exact weighted sum of the updates (--method svd for a lower rank)"
    elif made.method not in weigh.EXACT:
        lines[0] += f", density {weigh.density(options):g}"
    if made.rows:
        count = sum(len(ids) for ids, _ in made.rows.values())
        lines.append(
            f"{count} trained rows of {' and '.join(made.rows)}: the base's and the weighted sum of their changes"
        )
    if made.method in weigh.FACTORS:
        lines[0] += f", on the factors as PEFT means it (--method {made.method}_svd works on the updates)"
    if made.method != options.method:
        lines.append(f"the ranks differ: {options.method} is done as {made.method}, on updates instead of factors")
    if "ties" in made.method and sum(abs(each.part.share) for each in opened) < len(opened) * 0.75:
        # PEFT's disjoint merge is a mean: 0.5 and 0.5 of the same update give half of it.
        lines.append("ties divides each value by how many runs agree on it: weights of about 1 keep its strength")
    return lines


def _open(parts: Sequence[Part], terminal: Terminal, method: str) -> list[_Opened]:
    """The runs and their adapters. Raises with everything that keeps any of them from being merged."""
    opened: list[_Opened] = []
    errors: list[FinetuneError] = []
    for part in parts:
        try:
            opened.append(_opened(part, terminal))
        except FinetuneError as error:
            errors.append(error)
            continue
        if faults := [*_beyond(opened[-1], method), *_differing(opened[-1], opened[0])]:
            errors.append(ModelError.of(faults))
    if errors:
        raise type(errors[0]).of([fault for error in errors for fault in error.faults])
    return opened


def _opened(part: Part, terminal: Terminal) -> _Opened:
    where, files = str(part.run), RunFolder(part.run)
    if not files.identity.is_file() and (part.run / RECORD).is_file():
        raise ModelError("this is a weighted merge already", where, "name the runs that it was made of")
    if not files.identity.is_file() and (part.run / "config.json").is_file():
        raise ModelError("this is a merged model, without its adapter", where, "name the run that it was made of")
    prepared, files = finished.open_run(part.run, terminal)
    kind = checkpoint.read_adapter(files.adapter).config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{kind} has no weighted merge", where, "only LoRA runs can be merged with weights")
    adapter, config = adapter_file.read(files.adapter)
    run = Run(prepared, terminal, identity.read(files.identity))
    run.folder = files
    return _Opened(part=part, run=run, adapter=adapter, config=config)


def _beyond(each: _Opened, method: str) -> list[Fault]:
    """What of an adapter PEFT's arithmetic cannot carry: it refuses some, and leaves the rest out without a word."""
    faults = []
    if each.config.get("use_dora"):
        faults.append(Fault("DoRA's lengths cannot be added", each.name, "train with use_dora: false"))
    if whole := each.config.get("modules_to_save"):
        what = f"{', '.join(whole)} was trained whole, which PEFT cannot add"
        faults.append(Fault(what, each.name, "train without modules_to_save"))
    if each.config.get("trainable_token_indices") and method not in weigh.EXACT:
        what = f"rows of embedding and head were trained, of which {method} says nothing"
        faults.append(Fault(what, each.name, f"use --method {' or '.join(weigh.EXACT)}"))
    if not faults and (strange := [name for name in each.adapter.others if not name.endswith(weigh.ROWS)]):
        faults.append(Fault(f"{strange[0]} is no pair of LoRA factors", each.name, "train plain LoRA"))
    return faults


def _differing(each: _Opened, first: _Opened) -> list[Fault]:
    """What keeps two runs from being adapters of one base."""
    faults = []
    if each.run.identity.base != first.run.identity.base:
        faults.append(Fault(f"its base is not that of {first.name}", each.name, "merge runs of one base"))
    if each.run.prepared.recipe.rope != first.run.prepared.recipe.rope:
        faults.append(Fault(f"its rope is not that of {first.name}", each.name, "merge runs of one base"))
    own, other = _form(each.run), _form(first.run)
    if own != other:
        what = f"its base was held as {own}, that of {first.name} as {other}"
        faults.append(Fault(what, each.name, "merge runs that were trained against one form"))
    return faults


def _form(run: Run) -> str:
    form = run.form()
    double = ", doubly quantised" if form.double and form.weights in ("nf4", "fp4") else ""
    return f"{form.weights}{double}, computed in {form.compute}"


def _losses(opened: Sequence[_Opened], folder: Path, terminal: Terminal) -> list[dict[str, Any]]:
    """Each part's losses on its own held-out rows: of the base, as its run stored it, of its adapter, and merged."""
    judged = [each for each in opened if each.run.prepared.held_out is not None]
    if not judged:
        terminal.say("no run has held-out rows: what the merge lost is not measured")
        return [{"rows": 0} for _ in opened]
    first = opened[0].run
    policy = model.load_base(first.base, first.form(), ByteBar(terminal, "loading the base").at)
    before = {each.name: _loss(policy, each.run.folder.adapter, [each], "alone")[0] for each in judged}
    after = dict(zip(before, _loss(policy, folder, judged, "merged"), strict=True))
    found: list[dict[str, Any]] = []
    for each in opened:
        held_out = each.run.prepared.held_out
        if held_out is None:
            found.append({"rows": 0})
            continue
        base = scores.read(each.run.folder).get("before", {}).get("loss")
        losses = {"base": base, "before": before[each.name], "after": after[each.name]}
        found.append({"rows": held_out.rows, **losses, "difference": after[each.name] - before[each.name]})
    return found


def _loss(policy: Policy, adapter: Path, judged: Sequence[_Opened], what: str) -> list[float]:
    """The adapter's losses on the parts' rows; the base is as it was afterwards."""
    adapted = model.attach_saved(policy, adapter)
    found = []
    for each in judged:
        assert each.run.prepared.held_out is not None
        how = replace(each.run.how(), metrics=("loss",))
        bar = Progress(each.run.terminal, f"judging {each.name}, {what}")
        done = evaluate.judge(
            adapted, each.run.prepared.held_out, how, progress=functools.partial(_show, bar), origin=each.run.origin()
        )
        found.append(float(done.scores["loss"]))
    adapted.model.unload()
    if not all(map(math.isfinite, found)):
        raise ModelError("the loss is not a number", str(adapter), "give smaller weights")
    return found


def _show(bar: Progress, _: str, done: int, of: int) -> None:
    bar(done, of)


def table(parts: Sequence[dict[str, Any]]) -> list[str]:
    """The parts' losses as lines of text."""
    width = max(12, *(len(part["run"]) + 2 for part in parts))
    lines = [f"{'':<{width}}{'weight':>8}{'base':>10}{'alone':>10}{'merged':>10}{'lost':>10}{'rows':>7}"]
    for part in parts:
        shown = [part.get(key) for key in ("base", "before", "after")]
        numbers = "".join(f"{value:>10.4f}" if value is not None else f"{'-':>10}" for value in shown)
        lost = f"{part['difference']:>+10.4f}" if "difference" in part else f"{'-':>10}"
        lines.append(f"{part['run']:<{width}}{part['share']:>8g}{numbers}{lost}{part['rows']:>7}")
    return lines
