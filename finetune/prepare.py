"""Everything that can be known before weights load: recipe, machine, base folder, data, plan, disk.

``plan`` prints what this returns; ``train`` does the same first and goes on from it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune import (
    control_tokens,
    datacheck,
    dataset,
    devices,
    hardware,
    known_models,
    plan,
    recipe,
    source,
    tokenizer,
    window,
)
from finetune.base import Base, inspect
from finetune.budget import Load
from finetune.dataset import Example, Row
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault, ModelError, RecipeError
from finetune.evaluate import HeldOut
from finetune.hardware import Hardware
from finetune.plan import Plan
from finetune.recipe import Located, Recipe
from finetune.renderer import Renderer
from finetune.runfolder import RunFolder
from finetune.window import Fitted, Named

_NO_CHOICE = "only the original Qwen has a choice here; this model's config.json says how far it reaches"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that passed every check. Without ``base`` the model is known by its numbers only."""

    located: Located
    hardware: Hardware
    base: Base | None
    plan: Plan
    commit: str | None
    examples: tuple[Example, ...]
    held_out: HeldOut | None
    named: tuple[Named, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return self.located.recipe


def prepare(path: Path, overrides: Sequence[str] = (), *, training: bool = True, card: float | None = None) -> Prepared:
    """Check a recipe with everything it names; and, where it is to be trained, that memory and disk are large enough.

    ``card``: GB of a CUDA card to plan for, instead of this machine.

    Raises:
        RecipeError, DataError, ModelError, EnvironmentFault: what is wrong; nothing has been written.
    """
    located = recipe.locate(path, overrides)
    machine = hardware.imagined(card) if card else hardware.detect()
    if training:
        _refuse_place(located)
    found = source.find(located.recipe.model, located.recipe.revision)
    if found is None:
        return _by_numbers(located, machine, must_fit=card is not None)
    base = _inspect(located, found.folder)
    renderer = _renderer(located, base)
    rows, held = read(located.recipe, special_tokens(renderer))
    longest = located.recipe.train.max_length
    policy = located.recipe.data.over_length
    fitted = window.fit(rows, renderer, longest, policy)
    judged = window.fit(held, renderer, longest, policy)
    examples = fitted.examples
    held_out = _held_out(judged, renderer) if held else None
    _refuse_long_answers(located, base, held_out)
    rows_trained = control_tokens.resolve(located, base, renderer)
    load = _load(located.recipe, examples, held_out)
    made = plan.make(
        located, base.shape, machine, load, must_fit=training, rows=rows_trained.fields(base.shape.tied),
        notes=[
            *found.notes, *base.notes, *rows_trained.notes, *dataset.repeats(rows, held),
            *fitted.notes("data.train_path"), *judged.notes("data.eval_path"),
        ],
    )  # fmt: skip
    free = hardware.free_disk(Path(made.output))
    if training and free < made.output_bytes:
        what = f"{free / 1e6:.0f} MB free, the run writes about {made.output_bytes / 1e6:.0f} MB"
        raise EnvironmentFault(what, made.output, "free some space, or lower train.keep_last")
    return Prepared(
        located=located, hardware=machine, base=base, plan=made, commit=found.commit, examples=examples,
        held_out=held_out, named=(*fitted.named, *judged.named),
    )  # fmt: skip


def _renderer(located: Located, base: Base) -> Renderer:
    return Renderer(
        tokenizer.of(base), base.stop_token, piecewise=base.piecewise, train_on=located.recipe.data.train_on
    )


def _refuse_place(located: Located) -> None:
    """What a run would only meet once it has begun: an output that is no folder, a missing package, no processors."""
    chosen = located.recipe
    output = Path(chosen.output)
    blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise RecipeError(f"{blocked} is a file", located.where("output"), "name a folder")
    RunFolder(output).refuse_foreign()
    devices.refuse_missing(chosen.tracker, located.where("tracker"))
    processors = os.cpu_count() or 1
    if chosen.train.workers > processors:
        what = f"{chosen.train.workers} processes on {processors} processors"
        raise EnvironmentFault(what, located.where("train.workers"), f"at most {processors} here")


def _inspect(located: Located, folder: Path) -> Base:
    rope = located.recipe.rope
    base = inspect(folder, rope)
    if rope and base.origin is None:
        raise RecipeError(_NO_CHOICE, located.where("rope"), "remove it")
    return base


def _refuse_long_answers(located: Located, base: Base, held_out: HeldOut | None) -> None:
    """A generated answer must end within the positions that the model has."""
    wanted = located.recipe.evaluate
    if held_out is None or "exact_match" not in wanted.metrics:
        return
    longest = max(len(question.prompt) for question in held_out.questions)
    if longest + wanted.max_new_tokens > base.shape.max_positions:
        what = f"a prompt of {longest} tokens leaves no room for so many: the model has {base.shape.max_positions}"
        raise RecipeError(what, located.where("evaluate.max_new_tokens"), "lower it")


def _by_numbers(located: Located, machine: Hardware, *, must_fit: bool) -> Prepared:
    """A model that is not on the disk: the plan comes from committed config numbers, or from its config on the hub."""
    name, rope = located.recipe.model, located.recipe.rope
    known = known_models.find(name)
    if known is not None:
        shape, evidence = DecoderShape.from_known(known), f"numbers: {known.evidence}"
        reach = source.reach_of(known, rope)
    else:
        shape, reach = source.remote_shape(name, located.recipe.revision, rope)
        evidence = "numbers: its config.json on the hub"
    if rope and reach is None:
        raise RecipeError(_NO_CHOICE, located.where("rope"), "remove it")
    if reach is not None:
        shape = replace(shape, family="qwen1", max_positions=reach)
    read(located.recipe, ())
    unchecked = (
        f"the weights, tokenizer and template of {name}: not on this disk ({evidence})",
        "token counts, and so steps per epoch and time: they need the tokenizer",
        "whether the base has learned its template's control tokens: that is seen in the weights",
    )
    made = plan.make(located, shape, machine, None, must_fit=must_fit, unchecked=unchecked)
    return Prepared(located=located, hardware=machine, base=None, plan=made, commit=None, examples=(), held_out=None)


def check_data(path: Path, overrides: Sequence[str], progress: Callable[[Path, int], None]) -> list[datacheck.Report]:
    """The recipe's files, judged row by row: with the model's own tokenizer and window where the model is here."""
    located = recipe.locate(path, overrides)
    chosen = located.recipe
    found = source.find(chosen.model, chosen.revision)
    specials: Sequence[str] = datacheck.CONTROL
    render = None
    if found is not None:
        base = _inspect(located, found.folder)
        renderer = _renderer(located, base)
        specials, render = special_tokens(renderer), (renderer, chosen.train.max_length)
    reports = []
    trained = None
    for file in (chosen.data.train_path, chosen.data.eval_path):
        if file is not None:
            name = Path(file)
            report, seen = datacheck.check(
                name, chosen.data.format, specials, trained=trained, render=render,
                progress=functools.partial(progress, name),
            )  # fmt: skip
            reports.append(report)
            trained = trained or seen
    return reports


def open_renderer(path: Path, overrides: Sequence[str]) -> tuple[Located, Renderer]:
    """The recipe and its model's renderer, without a plan or weights. Raises ModelError where the model is not here."""
    located = recipe.locate(path, overrides)
    found = source.find(located.recipe.model, located.recipe.revision)
    if found is None:
        fix = "fetch it: the tokenizer decides what is trained"
        raise ModelError("the model is not on this disk", located.recipe.model, fix)
    base = _inspect(located, found.folder)
    return located, _renderer(located, base)


def special_tokens(renderer: Renderer) -> list[str]:
    return [token.content for token in renderer.tokenizer.added_tokens_decoder.values() if token.special]


def read(recipe: Recipe, specials: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) as the recipe says; the second is empty where it names none."""
    data = recipe.data
    rows = dataset.read_rows(Path(data.train_path), data.format, specials)
    held: list[Row] = []
    if data.eval_path:
        held = dataset.read_rows(Path(data.eval_path), data.format, specials)
    elif data.eval_fraction:
        rows, held = dataset.split(rows, data.eval_fraction, recipe.train.seed)
    return rows, held[: recipe.evaluate.rows]


def _held_out(judged: Fitted, renderer: Renderer) -> HeldOut:
    return HeldOut(examples=judged.examples, questions=tuple(renderer.question(row) for row in judged.rows))


def _load(recipe: Recipe, examples: Sequence[Example], held_out: HeldOut | None) -> Load:
    times = 2 + (recipe.train.steps or 0) // recipe.evaluate.every if recipe.evaluate.every else 2
    tokens = sum(len(example.ids) for example in held_out.examples) if held_out else 0
    answers = len(held_out.questions) if held_out and "exact_match" in recipe.evaluate.metrics else 0
    return Load(
        lengths=[len(example.ids) for example in examples],
        supervised=[sum(example.supervised) for example in examples],
        evaluated_tokens=times * tokens,
        generated_rows=answers,
    )
