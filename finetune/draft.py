"""A first recipe for somebody's own data: the model that fits, every number derived, and why, beside each key.

It is planned before it is written, so that what is written plans; and nothing that is there is ever replaced.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import dataset, hardware, prepare, proposal, survey
from finetune.errors import DataError, EnvironmentFault, RecipeError
from finetune.plan import Plan
from finetune.proposal import HELD_OUT, STEPS, Form, Model, Numbers
from finetune.report import plan_lines
from finetune.runfolder import disk_fault, remove, sync_folder, write_synced
from finetune.survey import Survey
from finetune.terminal import Terminal, clean


def begin(
    data: str, out: Path, name: str | None, card: float | None, terminal: Terminal, progress: dataset.Progress
) -> dict[str, Any]:
    """Judge the rows, choose the model, write the recipe, and say what to type next.

    Raises:
        DataError: rows that cannot be trained; more as of ``proposal.choose`` and ``write``.
    """
    refuse_existing(out)
    judged = survey.judge(data, progress)
    for line in judged.lines():
        terminal.say(line)
    if judged.errors:
        fix = f"mend them (finetune data check {data} --fix COPY writes a repaired copy), then give the same command"
        raise DataError(f"{judged.rows - judged.trainable:,} of {judged.rows:,} rows cannot be trained", data, fix)
    device = "cuda" if card else hardware.detect().device
    model = proposal.choose(name, judged.mapping.partition(":")[0], device)
    made = write(data, survey.measure(data, model.base, progress), model, out, card=card, progress=progress)
    for line in plan_lines(made):
        terminal.say(line)
    terminal.say(f"written: {out}   model: {model.name} ({model.why})")
    terminal.say("next:")
    for verb in ("plan", "train"):
        terminal.say(f"  finetune {verb} {out}{f' --card {card:g}' if card and verb == 'plan' else ''}")
    return {"recipe": str(out), "model": model.name, "why": model.why, "plan": made.to_dict()}


def write(
    data: str, rows: Survey, model: Model, out: Path, *, card: float | None, progress: dataset.Progress
) -> Plan:  # fmt: skip
    """Write the first recipe that plans, of the forms from the largest to the least; → its plan.

    Raises:
        EnvironmentFault: something is at ``out`` already, or no form fits the machine.
        RecipeError, DataError, ModelError: as of planning.
    """
    refuse_existing(out)
    device = "cuda" if card else hardware.detect().device
    refused: EnvironmentFault | None = None
    for form in proposal.forms_of(model, device):
        found = proposal.derive(rows, model)
        recipe = "\n".join(_lines(data, rows, model, form, found, out)) + "\n"
        try:
            plan = _planned(recipe, out, card, progress)
        except EnvironmentFault as error:
            refused = error
            continue
        place(out, recipe)
        return plan
    assert refused is not None
    raise refused


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise EnvironmentFault("something is there already", str(out), "give another --out")


def _planned(recipe: str, out: Path, card: float | None, progress: dataset.Progress) -> Plan:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        try:
            return prepare.prepare(path, card=card, progress=progress).plan
        except RecipeError as error:
            raise RecipeError.of(
                [fault._replace(where=fault.where.replace(str(path), str(out))) for fault in error.faults]
            ) from None


def place(out: Path, recipe: str) -> None:
    """The whole file under its name, or nothing; a file that came there meanwhile stays as it is."""
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    write_synced(temporary, recipe.encode(), out)
    try:
        out.hardlink_to(temporary)
    except FileExistsError:
        refuse_existing(out)
    except OSError as error:
        raise disk_fault(error, out) from error
    finally:
        remove(temporary)
    sync_folder(out.parent)


def _lines(data: str, rows: Survey, model: Model, form: Form, found: Numbers, out: Path) -> Iterator[str]:
    small, large = min(rows.lengths), max(rows.lengths)
    how = "counted by the model's own tokenizer" if rows.measured else "estimated from the text: no tokenizer is here"
    yield "# A first recipe by `finetune init`. Every number says where it comes from; change what you know better."
    yield f"# Data: {rows.rows:,} rows of {small:,} to {large:,} tokens ({how}),"
    yield f"# read as {clean(rows.mapping, 300)}."
    yield f"# Next: finetune plan {clean(str(out))}, then finetune train {clean(str(out))}"
    yield ""
    yield f"model: {json.dumps(model.name, ensure_ascii=False)} # {model.why}"
    yield ""
    yield "quantize: # how the frozen base weights are held"
    yield f"  weights: {form.weights} # {form.why}"
    if form.weights == "nf4":
        yield "  double: true # the block scales in 8 bits too: about 0.4 bits a weight less"
    yield ""
    yield "adapter: # what is trained: a PEFT method and that method's own fields"
    yield "  method: lora # small matrices beside every linear"
    yield "  r: 16 # rank: raise it where the loss stays high on the training rows"
    yield "  lora_alpha: 32 # twice the rank, as the learning rate below expects"
    yield ""
    yield from _data(data, rows, model, found)
    yield ""
    yield from _train(rows, model, found)
    yield ""
    yield from _evaluate(rows, found)
    yield ""
    yield "tracker: trackio # curves on this machine, no account; or wandb, tensorboard, mlflow, none"
    yield ""
    yield f"output: {json.dumps(_output(data), ensure_ascii=False)} # the run folder"


def _data(data: str, rows: Survey, model: Model, found: Numbers) -> Iterator[str]:
    yield "data: # where the rows come from"
    yield f"  train_path: {json.dumps(data, ensure_ascii=False)} # relative to the folder that commands run in"
    yield f"  format: {rows.format} # as its columns say"
    if found.fraction:
        share = "a tenth" if found.fraction == 0.1 else f"{HELD_OUT} rows are enough to tell"
        yield f"  eval_fraction: {found.fraction:.6g} # {found.held} of {rows.rows:,} rows are held out ({share})"
    if found.cut:
        yield f"  over_length: drop # {found.cut} rows are longer than the window: left out, named in rows.jsonl"
    if model.family == "qwen3" and not rows.thinking:
        yield "  thinking: strip # these rows have no reasoning: serve the model with enable_thinking=False"


def _train(rows: Survey, model: Model, found: Numbers) -> Iterator[str]:
    longest = max(rows.lengths)
    rate = 1e-4 if model.parameters > 7e9 else 2e-4 if model.parameters > 1e9 else 1e-3
    why = f"the longest row has {longest:,} tokens, rounded up to a multiple of 64"
    if found.max_length == model.positions:
        why = f"all that this model has; the longest row has {longest:,} tokens"
    yield "train: # how long, how fast, how much at a time"
    yield f"  epochs: {found.epochs} # passes over the rows: 3 below 2,000 rows, 2 below 10,000, else 1"
    many = f"about {found.steps} steps{'' if rows.measured else ' (estimated)'}"
    yield f"  tokens_per_step: {found.tokens_per_step} # {many}; {STEPS} or more where the data are enough"
    size = f"{model.parameters / 1e9:.3g} billion parameters"
    yield f"  learning_rate: {rate:g} # usual for LoRA on {size}; halve it if the loss jumps"
    yield "  schedule: cosine # down to zero at the end"
    yield f"  warmup: {found.steps // 20} # the first twentieth of the steps"
    yield f"  max_length: {found.max_length} # {why}"
    often = max(1, min(50, -(-found.steps // 4)))
    yield f"  save_every: {often} # steps between checkpoints: an interrupted run goes on from the last"
    yield f"  seed: {found.seed} # of held-out rows, row order, adapter start and dropout"


def _evaluate(rows: Survey, found: Numbers) -> Iterator[str]:
    yield "evaluate: # how the result is judged, base against adapter"
    if found.exact:
        yield f"  metrics: [loss, exact_match] # answers of at most {rows.answer} tokens can be compared as a whole"
        yield f"  max_new_tokens: {found.max_new_tokens} # the longest answer, and a little room"
    elif found.fraction:
        yield "  metrics: [loss] # answers are too long or too free to be compared as a whole"
    else:
        yield "  metrics: [loss] # one row cannot be held out: nothing is judged"


def _output(data: str) -> str:
    """A run folder that is not there yet, named after the data."""
    stem = "".join(char if char.isalnum() or char in "-_" else "-" for char in Path(data).name.split(".")[0]).strip("-")
    number = 1
    while (path := Path("runs") / (f"{stem or 'data'}-{number}" if number > 1 else stem or "data")).exists():
        number += 1
    return str(path)
