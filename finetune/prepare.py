"""Everything that can be known before weights load: recipe, machine, base folder, data, plan, disk.

``plan`` prints what this returns; ``train`` does the same first and goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import base as bases
from finetune import dataset, hardware, known_models, plan, recipe
from finetune.base import Base
from finetune.budget import Load
from finetune.dataset import Example, Renderer, Row
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault
from finetune.evaluate import HeldOut
from finetune.hardware import Hardware
from finetune.plan import Plan
from finetune.recipe import Located, Recipe
from finetune.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that passed every check. Without ``base`` the model is known by its numbers only."""

    located: Located
    hardware: Hardware
    base: Base | None
    plan: Plan
    examples: tuple[Example, ...]
    held_out: HeldOut | None

    @property
    def recipe(self) -> Recipe:
        return self.located.recipe


def prepare(path: Path, overrides: Sequence[str] = (), *, training: bool = True) -> Prepared:
    """Check a recipe with everything it names; and, where it is to be trained, that memory and disk are large enough.

    Raises:
        RecipeError, DataError, ModelError, EnvironmentFault: what is wrong; nothing has been written.
    """
    located = recipe.locate(path, overrides)
    machine = hardware.detect()
    folder = Path(located.recipe.model)
    if not folder.is_dir():
        return _by_numbers(located, machine)
    base = bases.inspect(folder)
    renderer = Renderer(load_tokenizer(folder), base.stop_token)
    rows, held = read(located.recipe, special_tokens(renderer))
    longest = located.recipe.train.max_length
    examples = tuple(dataset.render(rows, renderer, longest))
    held_out = held_out_rows(held, renderer, longest) if held else None
    load = _load(located.recipe, examples, held_out)
    made = plan.make(
        located, base.shape, machine, load, must_fit=training, notes=[*base.notes, *dataset.repeats(rows, held)]
    )
    free = hardware.free_disk(Path(made.output))
    if training and free < made.output_bytes:
        what = f"{free / 1e6:.0f} MB free, the run writes about {made.output_bytes / 1e6:.0f} MB"
        raise EnvironmentFault(what, made.output, "free some space, or lower train.keep_last")
    return Prepared(located=located, hardware=machine, base=base, plan=made, examples=examples, held_out=held_out)


def _by_numbers(located: Located, machine: Hardware) -> Prepared:
    """A known model that is not on the disk: the plan comes from committed config numbers."""
    known = known_models.find(located.recipe.model)
    assert known is not None, "recipe.locate lets only folders and known models pass"
    read(located.recipe, ())
    unchecked = (
        f"the weights, tokenizer and template of {known.name}: not on this disk (numbers: {known.evidence})",
        "token counts, and so steps per epoch and time: they need the tokenizer",
    )
    made = plan.make(located, DecoderShape.from_known(known), machine, None, must_fit=False, unchecked=unchecked)
    return Prepared(located=located, hardware=machine, base=None, plan=made, examples=(), held_out=None)


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


def held_out_rows(rows: Sequence[Row], renderer: Renderer, max_length: int) -> HeldOut:
    examples = dataset.render(rows, renderer, max_length)
    return HeldOut(examples=tuple(examples), questions=tuple(renderer.question(row) for row in rows))


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
