"""A recipe's data: its sources as stores of samples, the rows that are held out, and what is to be said of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import dataset, evals, heldout, hubdata, manifest, store, window
from finetune.budget import Load
from finetune.dataset import Reader, Row, Source
from finetune.errors import DataError, Fault
from finetune.evaluate import HeldOut
from finetune.recipe import Recipe
from finetune.renderer import Renderer
from finetune.samples import Samples, Stored
from finetune.window import Named, Window

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a run trains on and is judged by, the rows not taken as they stand, and what to say of all that."""

    samples: Samples
    held_out: HeldOut | None
    named: tuple[Named, ...]
    notes: tuple[str, ...]

    def left_out(self) -> set[str]:
        """Places of the rows that are not trained."""
        return {one.where for one in self.named if one.done == "left out"}


def training_sources(recipe: Recipe) -> list[Source]:
    """Where the training rows come from; a data set on the hub is pinned to a commit. Raises DataError."""
    data = recipe.data
    if data.train_path is not None:
        return [_pinned(Source(path=data.train_path, format=data.format, columns=data.columns))]
    return [_pinned(Source(**source.model_dump())) for source in data.sources]


def judging_source(recipe: Recipe) -> Source | None:
    """Where the held-out rows come from, if the recipe names a place. Raises DataError."""
    data = recipe.data
    if data.eval_path is None:
        return None
    return _pinned(Source(path=data.eval_path, format=data.format, columns=data.columns, split=data.eval_split))


def _pinned(source: Source) -> Source:
    return replace(source, revision=hubdata.commit(source.path, source.revision)) if source.on_hub else source


def special_tokens(renderer: Renderer) -> list[str]:
    """The tokenizer's control tokens, which no row may hold as text unless it is declared."""
    return [token.content for token in renderer.tokenizer.added_tokens_decoder.values() if token.special]


def reader(recipe: Recipe, source: Source, renderer: Renderer) -> Reader:
    return Reader(source, special_tokens(renderer), recipe.data.literal_tokens)


def window_of(recipe: Recipe, renderer: Renderer) -> Window:
    return Window(
        renderer=renderer, max_length=recipe.train.max_length, policy=recipe.data.over_length,
        rows=recipe.objective.rows,
    )  # fmt: skip


def gather(recipe: Recipe, renderer: Renderer, progress: dataset.Progress = dataset.silent) -> Gathered:
    """Everything that is trained on and judged by, as ids.

    Raises:
        DataError: rows that cannot be used, each by its place.
        EnvironmentFault: the cache cannot be written.
    """
    fitting = window_of(recipe, renderer)
    stores: list[Stored] = []
    faults: list[Fault] = []
    for source in training_sources(recipe):
        try:
            stores.append(store.open_source(reader(recipe, source, renderer), fitting, progress))
        except DataError as error:  # those of the other sources are told with it
            faults += error.faults
    if faults:
        raise DataError.of(faults)
    numbers = [held_numbers(recipe, stored) for stored in stores]
    rows = _held_rows(recipe, renderer, stores, numbers)
    judged = window.fit(rows, fitting)
    wanted = recipe.evaluate
    held_out = heldout.make(judged, renderer, wanted.metrics, wanted.asked()) if rows else None
    samples = Samples([(stored, _kept(stored, held)) for stored, held in zip(stores, numbers, strict=True)])
    named = [one for stored in stores for one in stored.named()]
    notes = [
        *(f"{stored.source.path} is read as {stored.mapping}" for stored in stores),
        *_repeats(stores, numbers, rows),
        *window.notes(named, "the training data"),
        *window.notes(judged.named, "the held-out rows"),
    ]
    return Gathered(samples=samples, held_out=held_out, named=(*named, *judged.named), notes=tuple(notes))


def held_numbers(recipe: Recipe, stored: Stored) -> set[int]:
    """Numbers of the rows that ``eval_fraction`` holds out."""
    fraction = recipe.data.eval_fraction
    if not fraction:
        return set()
    return dataset.draw(stored.meta["rows"], fraction, recipe.train.seed, stored.source.path)


def _held_rows(recipe: Recipe, renderer: Renderer, stores: Sequence[Stored], numbers: Sequence[set[int]]) -> list[Row]:
    """The held-out rows, of several sources in turn, at most ``evaluate.rows`` of them."""
    judging, options = judging_source(recipe), recipe.evaluate.multiple_choice
    keep = options if isinstance(options, str) else None
    if judging is not None:
        return dataset.read_rows(reader(recipe, judging, renderer), keep=keep)[: recipe.evaluate.rows]
    found = [
        dataset.read_rows(reader(recipe, stored.source, renderer), wanted, keep) if wanted else []
        for stored, wanted in zip(stores, numbers, strict=True)
    ]
    most = max(map(len, found), default=0)
    in_turn = [rows[index] for index in range(most) for rows in found if index < len(rows)]
    return in_turn[: recipe.evaluate.rows]


def _kept(stored: Stored, held: set[int]) -> np.ndarray[Any, Any]:
    """Indices of the samples whose rows are not held out."""
    import numpy as np

    rows = stored.columns["rows"]
    return np.flatnonzero(~np.isin(rows, list(held))) if held else np.arange(len(rows))


def _repeats(stores: Sequence[Stored], held_numbers: Sequence[set[int]], held: Sequence[Row]) -> list[str]:
    """What to say of rows that come twice, white space and case aside: among the training rows, or held out as well."""
    import numpy as np

    digests = []
    for stored, numbers in zip(stores, held_numbers, strict=True):
        found = stored.columns["folded"]
        digests.append(np.delete(found, [number - 1 for number in numbers]) if numbers else np.asarray(found))
    every = np.concatenate(digests)
    known = np.unique(every)
    said = []
    if len(known) < len(every):
        said.append(f"{len(every) - len(known)} of {len(every)} training rows repeat an earlier one")
    asked = np.array([int.from_bytes(dataset.folded(row.conversation), "little") for row in held], dtype="u8")
    twice = np.flatnonzero(np.isin(asked, known))
    if len(twice):
        first = int(twice[0])
        place = _place(stores, asked[first])
        what = f"{len(twice)} of {len(held)} held-out rows are training rows too, the first is {held[first].where}"
        said.append(f"{what} ({place}): scores on them flatter")
    return said


def _place(stores: Sequence[Stored], digest: object) -> str:
    """Where the first row with that digest stands."""
    import numpy as np

    for stored in stores:
        found = np.flatnonzero(stored.columns["folded"] == digest)
        samples = np.flatnonzero(stored.columns["rows"] == found[0] + 1) if len(found) else found
        if len(samples):
            return stored.example(int(samples[0])).where
    return "left out"


def digests(recipe: Recipe) -> dict[str, str]:
    """What the data were, for a run's identity: each file's sha-256, or the commit of a data set on the hub."""
    judging = judging_source(recipe)
    found: dict[str, str] = {}
    for source in [*training_sources(recipe), *([judging] if judging else [])]:
        if source.on_hub:
            found[source.path] = str(source.revision)
        found |= {str(file): manifest.digest(file) for file in source.files()}
    if recipe.evaluate.json_schema is not None:
        found[recipe.evaluate.json_schema] = manifest.digest(Path(recipe.evaluate.json_schema))
    for reward in recipe.objective.rewards or ():  # what decides a reward decides the run
        found |= {str(file): manifest.digest(file) for file in reward.files()}
    return found


def read_only(recipe: Recipe) -> None:
    """Every row that can be judged without the model's tokenizer. Raises DataError."""
    judging = judging_source(recipe)
    for source in [*training_sources(recipe), *([judging] if judging else [])]:
        if not source.on_hub:  # nothing is fetched for a model that is not here
            dataset.read_rows(Reader(source), ())


def _evaluated(held_out: HeldOut, metrics: Sequence[str]) -> int:
    """Tokens that are read for the loss of the rows and of their options."""
    samples = [*(held_out.examples if "loss" in metrics else ()), *(o for q in held_out.questions for o in q.options)]
    return sum(len(example.ids) for example in samples)


def load_of(recipe: Recipe, gathered: Gathered, vocabulary: int) -> Load:
    """What of the rows decides a run's memory and time. ``vocabulary``: entries of the tokenizer."""
    held_out, samples = gathered.held_out, gathered.samples
    between = (recipe.train.steps or 0) // recipe.evaluate.every if recipe.evaluate.every else 0
    prompts = [len(question.prompt) for question in held_out.questions] if held_out else []
    return Load(
        lengths=samples.lengths.tolist(),
        supervised=samples.supervised.tolist(),
        parts=samples.part_list(),
        evaluations=2 + between if held_out else 0,
        evaluated_tokens=_evaluated(held_out, recipe.evaluate.metrics) if held_out else 0,
        generated_rows=len(prompts) if set(recipe.evaluate.metrics) & set(evals.ANSWERED) else 0,
        prompt_tokens=sum(prompts),
        longest_prompt=max(prompts, default=0),
        vocabulary=vocabulary,
    )
