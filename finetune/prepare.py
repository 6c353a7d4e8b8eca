"""Everything that can be known before weights load: recipe, machine, base folder, data, plan, disk.

``plan`` prints what this returns; ``train`` does the same first and goes on from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import (
    control_tokens,
    datacheck,
    dataset,
    devices,
    evals,
    forms,
    gather,
    hardware,
    joint_plan,
    known_models,
    objectives,
    plan,
    recipe,
    rollouts,
    source,
    starting,
    teaching,
    tokenizer,
)
from finetune.base import Base, as_scorer, inspect
from finetune.budget import Load
from finetune.dataset import Question, Reader
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault, ModelError, RecipeError
from finetune.evaluate import HeldOut
from finetune.hardware import Hardware
from finetune.objectives import Objective
from finetune.plan import Plan
from finetune.recipe import Located, Recipe
from finetune.renderer import Renderer
from finetune.repeats import Met
from finetune.runfolder import RunFolder
from finetune.samples import Samples
from finetune.starting import Start
from finetune.teaching import Teacher
from finetune.window import Named

_NO_CHOICE = "only the original Qwen has a choice here; this model's config.json says how far it reaches"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that passed every check. Without ``base`` the model is known by its numbers only.

    ``together``: other adapters trained in the same passes; ``start``: what it begins with; ``teacher``: who teaches;
    ``questions``: where answers are sampled, the training rows as they are asked, by their places.
    """

    located: Located
    hardware: Hardware
    base: Base | None
    shape: DecoderShape
    load: Load | None
    plan: Plan
    commit: str | None
    samples: Samples | None
    held_out: HeldOut | None
    named: tuple[Named, ...] = ()
    together: tuple[str, ...] = ()
    start: Start | None = None
    teacher: Teacher | None = None
    questions: Mapping[str, Question] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.located.recipe

    @property
    def objective(self) -> Objective:
        """What the run minimises, with the recipe's settings."""
        chosen, settings = self.recipe.objective, self.recipe.objective.settings()
        if chosen.rows == "prompts":
            settings = rollouts.settings(chosen, self.questions)
        more = {"longest": self.recipe.train.max_length} if chosen.rows == "labels" else {}
        return objectives.get(chosen.method, settings | more)


def prepare(
    path: Path, overrides: Sequence[str] = (), *, training: bool = True, card: float | None = None,
    machine: Hardware | None = None, progress: dataset.Progress = dataset.silent, processes: int = 1,
) -> Prepared:  # fmt: skip
    """Check a recipe with everything it names; and, where it is to be trained, that memory and disk are large enough.

    ``card``: GB of a CUDA card to plan for, instead of this machine; ``machine``: this one, looked at before.
    ``progress`` is told of rows read. ``processes``: how many are to train it.

    Raises:
        RecipeError, DataError, ModelError, EnvironmentFault: what is wrong; nothing has been written.
    """
    machine = hardware.imagined(card) if card else machine or hardware.detect()
    return _prepared(recipe.locate(path, overrides), machine, training, card, progress, processes=processes)


def prepare_all(
    path: Path, overrides: Sequence[str] = (), *, card: float | None = None,
    progress: dataset.Progress = dataset.silent, processes: int = 1,
) -> list[Prepared]:  # fmt: skip
    """Check every run of a recipe, as ``prepare`` does; several are fitted into the machine together.

    Raises: as ``prepare``; RecipeError also for what several adapters cannot have in one pass.
    """
    machine = hardware.imagined(card) if card else hardware.detect()
    runs = recipe.locate_all(path, overrides)
    if len(runs) > 1:
        joint_plan.refuse_unroutable(runs, processes)
    found = [
        _prepared(one, machine, True, card, progress, joint=len(runs) > 1, processes=processes) for one in runs
    ]  # fmt: skip
    if len(found) == 1:
        return found
    names = [one.located.name for one in found]
    members = [joint_plan.Member(one.located, one.plan, one.shape, one.load) for one in found]
    plans = joint_plan.fit(members, machine, must_fit=found[0].base is not None or card is not None)
    return [
        replace(one, plan=plan, together=tuple(name for name in names if name != one.located.name))
        for one, plan in zip(found, plans, strict=True)
    ]


def _prepared(
    located: Located, machine: Hardware, training: bool, card: float | None, progress: dataset.Progress,
    *, joint: bool = False, processes: int = 1,
) -> Prepared:  # fmt: skip
    if training:
        _refuse_place(located, processes)
    output = Path(located.recipe.output)
    remarks = devices.remarks(located.recipe.tracker, output.parent if joint else output) if training else []
    if (found := source.find(located.recipe.model, located.recipe.revision)) is None:
        return _by_numbers(located, machine, remarks, must_fit=card is not None, processes=processes)
    base = _inspect(located, found.folder)
    renderer = _renderer(located, base)
    gathered = gather.gather(located.recipe, renderer, progress)
    _refuse_long_answers(located, base, gathered.held_out)
    questions = rollouts.questions(located, renderer, gathered.left_out())
    rows_trained = control_tokens.resolve(located, base, renderer, gathered.samples.added_tokens())
    load = gather.load_of(located.recipe, gathered, len(renderer.tokenizer))
    teacher = teaching.find(located, base, renderer.tokenizer, gathered) if training else None
    teaching.refuse_shards(located, teacher)
    made = plan.make(
        located, base.shape, machine, load, must_fit=training, rows=rows_trained.fields(base.shape.own_head),
        notes=[*found.notes, *base.notes, *rows_trained.notes, *gathered.notes, *remarks, *teaching.notes(teacher),
               *rollouts.notes(located.recipe, questions)],
        beside=teaching.beside(teacher, base.shape), processes=processes,
    )  # fmt: skip
    free = hardware.free_disk(Path(made.output))
    if training and free < made.output_bytes:
        what = f"{free / 1e6:.0f} MB free, the run writes about {made.output_bytes / 1e6:.0f} MB"
        raise EnvironmentFault(what, made.output, "free some space, or lower train.keep_last")
    return Prepared(
        located=located, hardware=machine, base=base, shape=base.shape, load=load, plan=made, commit=found.commit,
        samples=gathered.samples, held_out=gathered.held_out, named=gathered.named,
        start=starting.find(located, made.adapter_fields, base.folder) if training else None, teacher=teacher,
        questions=questions,
    )  # fmt: skip


def _renderer(located: Located, base: Base) -> Renderer:
    data = located.recipe.data
    made = Renderer(
        tokenizer.of(base), base.stop_token, piecewise=base.piecewise, thinking=data.thinking,
        train_on="last" if located.recipe.objective.rows == "prompts" else data.train_on, literals=data.literal_tokens,
    )  # fmt: skip
    known = gather.special_tokens(made)
    for index, token in enumerate(data.literal_tokens):
        if token not in known:
            what = f"{token!r} is no special token of {located.recipe.model}"
            where = located.where(f"data.literal_tokens.{index}")
            raise RecipeError(what, where, "remove it: it is text already")
    return made


def _refuse_place(located: Located, processes: int) -> None:
    """What a run would only meet once it has begun: an output that is no folder, a missing package, no processors."""
    chosen = located.recipe
    output = Path(chosen.output)
    blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise RecipeError(f"{blocked} is a file", located.where("output"), "name a folder")
    RunFolder(output).refuse_foreign()
    devices.refuse_unusable(chosen.tracker, located.where("tracker"))
    processors = os.cpu_count() or 1
    if chosen.train.workers > processors:
        what = f"{chosen.train.workers} processes on {processors} processors"
        raise EnvironmentFault(what, located.where("train.workers"), f"at most {processors} here")
    if processes > 1 and chosen.objective.rows == "prompts":
        what = "grpo samples and judges its answers in one process"
        raise RecipeError(what, "--processes", "leave it out, or take another objective.method")
    if chosen.train.shard != "none" and processes == 1:
        what = f"{chosen.train.shard} parts the base among several processes, and this is one"
        raise RecipeError(what, located.where("train.shard"), "add --processes N, or set it to none")


def _inspect(located: Located, folder: Path) -> Base:
    base = inspect(folder, located.recipe.rope)
    forms.refuse(located.recipe.quantize.weights, base.shape.packing, located.where("quantize.weights"))
    if located.recipe.rope and base.origin is None:
        raise RecipeError(_NO_CHOICE, located.where("rope"), "remove it")
    if located.recipe.objective.scored:
        return as_scorer(base)
    if base.shape.scored:
        what = f"this is a reward model, which {located.recipe.objective.method} cannot train: it writes no text"
        raise RecipeError(what, located.where("model"), "name another, or set objective.method: reward")
    return base


def _refuse_long_answers(located: Located, base: Base, held_out: HeldOut | None) -> None:
    """A generated answer must end within the positions that the model has."""
    wanted = located.recipe.evaluate
    if held_out is None or not set(wanted.metrics) & set(evals.ANSWERED):
        return
    longest = max(len(question.prompt) for question in held_out.questions)
    if longest + wanted.max_new_tokens > base.shape.max_positions:
        what = f"a prompt of {longest} tokens leaves no room for so many: the model has {base.shape.max_positions}"
        raise RecipeError(what, located.where("evaluate.max_new_tokens"), "lower it")


def _by_numbers(located: Located, machine: Hardware, notes: Sequence[str], **how: Any) -> Prepared:
    """A model that is not on the disk: planned by its numbers; ``how`` as of ``plan.make``."""
    name, rope = located.recipe.model, located.recipe.rope
    known = known_models.find(name)
    if known is not None:
        shape, evidence = DecoderShape.from_known(known), f"numbers: {known.evidence}"
        reach = source.reach_of(known, rope)
    else:
        shape, reach = source.remote_shape(name, located.recipe.revision, rope)
        evidence = "numbers: its config.json on the hub"
    forms.refuse(located.recipe.quantize.weights, shape.packing, located.where("quantize.weights"))
    if rope and reach is None:
        raise RecipeError(_NO_CHOICE, located.where("rope"), "remove it")
    if reach is not None:
        shape = replace(shape, family="qwen1", max_positions=reach)
    shape = replace(shape, scored=located.recipe.objective.scored)
    gather.read_only(located.recipe)
    unchecked = (
        f"the weights, tokenizer and template of {name}: not on this disk ({evidence})",
        "token counts, and so steps per epoch and time: they need the tokenizer",
        "whether the base has learned its template's control tokens: that is seen in the weights",
        *teaching.unchecked(located),
        *(["whether the adapter to begin from belongs to this base"] if located.recipe.adapter.start_from else []),
    )
    teacher = teaching.find(located, None, None, None)
    teaching.refuse_shards(located, teacher)
    made = plan.make(
        located, shape, machine, None, unchecked=unchecked, notes=[*notes, *teaching.notes(teacher)],
        beside=teaching.beside(teacher, shape), **how,
    )  # fmt: skip
    return Prepared(
        located=located, hardware=machine, base=None, shape=shape, load=None, plan=made, commit=None, samples=None,
        held_out=None, start=starting.find(located, made.adapter_fields), teacher=teacher,
    )  # fmt: skip


def check_data(
    path: Path, overrides: Sequence[str], progress: dataset.Progress, search: datacheck.Search | None = None
) -> list[datacheck.Report]:
    """The recipe's data, judged row by row: with the model's own tokenizer and window where the model is here."""
    located = recipe.locate(path, overrides)
    chosen = located.recipe
    specials: Sequence[str] = datacheck.CONTROL
    fitting = None
    if (found := source.find(chosen.model, chosen.revision)) is not None:
        renderer = _renderer(located, _inspect(located, found.folder))
        specials, fitting = gather.special_tokens(renderer), gather.window_of(chosen, renderer)
    judging = gather.judging_source(chosen)
    reports = []
    search = datacheck.Search() if search is None else search
    met = Met(near=search.near)
    for place in gather.training_sources(chosen):
        rows = Reader(place, specials, chosen.data.literal_tokens)
        reports.append(datacheck.check(rows, search=search, met=met, fitting=fitting, progress=progress))
    if judging is not None:
        rows = Reader(judging, specials, chosen.data.literal_tokens)
        reports.append(datacheck.check(rows, search=search, trained=met, fitting=fitting, progress=progress))
    return reports


def open_renderer(path: Path, overrides: Sequence[str]) -> tuple[Located, Renderer]:
    """The recipe and its model's renderer, without a plan or weights. Raises ModelError where the model is not here."""
    located = recipe.locate(path, overrides)
    if (found := source.find(located.recipe.model, located.recipe.revision)) is None:
        raise ModelError("the model is not on this disk", located.recipe.model, "fetch it: it decides what is trained")
    return located, _renderer(located, _inspect(located, found.folder))
