"""Rows or steps of a recipe as ``data show`` presents them: the samples that training will take, with what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune import datashow, gather, prepare, schedule, store
from finetune.conversation import Conversation, RowFault
from finetune.dataset import Read, Reader, Row
from finetune.datashow import Shown
from finetune.errors import DataError, RecipeError
from finetune.plan import course_steps
from finetune.recipe import Recipe
from finetune.renderer import Renderer
from finetune.window import Window


def rows(path: Path, overrides: Sequence[str], number: int | None, most: int) -> list[Shown]:
    """Training row ``number`` (from 1, through all sources), or the first ``most`` rows.

    Raises:
        DataError: a row that cannot be used, or there is no such row.
    """
    located, renderer = prepare.open_renderer(path, overrides)
    chosen = located.recipe
    fitting = gather.window_of(chosen, renderer)
    readers = [gather.reader(chosen, place, renderer) for place in gather.training_sources(chosen)]
    seen = 0
    wanted = []
    for seen, read in enumerate((read for reader in readers for read in reader), 1):
        if number in (None, seen):
            wanted.append(read)
        if len(wanted) == (most if number is None else 1):
            break
    if not wanted:
        raise DataError(f"there is no row {number}, the data has {seen}", readers[-1].source.path, "count from 1")
    held = _held_out(chosen, readers, fitting)
    return [
        replace(one, note=", ".join(filter(None, (one.note, "held out: not trained" if read.where in held else ""))))
        for read in wanted
        for one in _row(read, fitting)
    ]


def _held_out(recipe: Recipe, readers: Sequence[Reader], fitting: Window) -> set[str]:
    """Places of the rows that ``eval_fraction`` holds out."""
    if not recipe.data.eval_fraction:
        return set()
    numbers = [gather.held_numbers(recipe, store.open_source(reader, fitting)) for reader in readers]
    return {read.where for reader, held in zip(readers, numbers, strict=True) for read in reader if read.number in held}


def _row(read: Read, fitting: Window) -> list[Shown]:
    if isinstance(read.found, RowFault):
        fault = read.found
        raise DataError(f"{fault.column}: {fault.what}" if fault.column else fault.what, read.where, fault.fix)
    made = []
    for index, turns in enumerate(read.found.endings()):
        conversation = replace(read.found, turns=turns, rejected=())
        side = "rejected" if index else "chosen" if read.found.rejected else ""
        made += _sides(conversation, read.where, fitting, side)
    return made


def _sides(conversation: Conversation, where: str, fitting: Window, side: str) -> list[Shown]:
    placed = fitting.place(Row(conversation=conversation, where=where))
    detail = f"{placed.named.done}: {placed.named.detail}" if placed.named else ""
    note = ", ".join(filter(None, (side, detail)))
    turns = [part.conversation.turns for part in placed.parts]
    if not placed.examples:  # left out: shown as it would be, with the reason
        whole = fitting.renderer.examples(Row(conversation=conversation, where=where))
        return [datashow.shown(one, conversation.turns, fitting.renderer, note=note) for one in whole]
    names = [part.where for part in placed.parts]
    return [
        datashow.shown(
            one, turns[names.index(one.where)] if one.where in names else turns[0], fitting.renderer, note=note
        )
        for one in placed.examples
    ]


def step(path: Path, overrides: Sequence[str], number: int) -> list[Shown]:
    """The samples of optimizer step ``number`` (from 1), as they are packed into micro-batches.

    Raises:
        RecipeError: the run has fewer steps.
    """
    renderer = prepare.open_renderer(path, overrides)[1]
    prepared = prepare.prepare(path, overrides, training=False)
    assert prepared.samples is not None  # the model is here: its renderer was opened
    samples, limit = prepared.samples, prepared.plan.micro_batch_tokens
    steps = course_steps(prepared.recipe, samples.lengths.tolist(), samples.part_list())
    if number > len(steps):
        raise RecipeError(f"there is no step {number}, the run has {len(steps)}", "--step", "count steps from 1")
    chosen = [samples[index] for index in steps[number - 1]]
    packs = schedule.pack([len(example.ids) for example in chosen], limit)
    turns = _turns(prepared.recipe, {example.where for example in chosen}, renderer)
    made, counted = [], prepared.plan.counted
    for place, pack in enumerate(packs, 1):
        size = sum(len(chosen[index].ids) for index in pack)
        heading = f"step {number}, micro-batch {place} of {len(packs)}: {len(pack)} {counted}, {size} of {limit} tokens"
        for index in pack:
            example = chosen[index]
            row = turns[example.where.partition("#")[0]]
            sides = ("chosen", "rejected") if example.half else ("",)
            for half, said, side in zip(example.halves(), row.endings(), sides, strict=True):
                made.append(datashow.shown(half, said, renderer, heading=heading, note=side))
                heading = ""
    return made


def _turns(chosen: Recipe, places: set[str], renderer: Renderer) -> dict[str, Conversation]:
    """The conversations of those rows, read once more."""
    wanted = {place.partition("#")[0] for place in places}
    readers = [gather.reader(chosen, place, renderer) for place in gather.training_sources(chosen)]
    return {
        read.where: read.found
        for reader in readers
        for read in reader
        if read.where in wanted and isinstance(read.found, Conversation)
    }
