"""What a first recipe should say: the model that comes into question, its forms, and every number from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune import base as bases
from finetune import dataset, known_models, source
from finetune.base import Base
from finetune.decoder import DecoderShape
from finetune.errors import DataError, ModelError
from finetune.survey import Survey

_SMALL = 2e9
"""Parameters that a CPU trains in minutes to hours."""
_SEED = 7
_RANDOM = "data/bases/tiny"
STEPS = 50
"""Updates that a run should have at least, where the data are enough for so many."""
HELD_OUT = 200
"""Rows at most that are held out: with 200, a score of one half is known to about 0.07 (95 %)."""
_SHORT = 48
"""Tokens of the longest answer up to which answers are compared as a whole."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A base that comes into question. ``base``: where it is on this disk; ``positions``: the longest context;
    ``packed``: the form that its folder is in, where that is one of few bits."""

    name: str
    why: str
    base: Base | None
    parameters: int
    positions: int
    family: str
    packed: str = ""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the base is held: from the most that a card may hold to the least."""

    weights: str
    why: str


FORMS = {
    "cuda": (
        Form(weights="bf16", why="as published: it fits, and nothing is lost to quantisation"),
        Form(weights="nf4", why="4-bit NormalFloat: in 16 bits the model does not fit the memory"),
    ),
    "cpu": (Form(weights="nf4", why="4-bit NormalFloat: a quarter of the memory of 16 bits"),),
}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What is derived from the rows. ``cut``: rows that are longer than the window."""

    max_length: int
    cut: int
    fraction: float
    held: int
    epochs: int
    tokens_per_step: int
    steps: int
    exact: bool
    max_new_tokens: int
    seed: int


def choose(name: str | None, format_name: str, device: str) -> Model:
    """The base: the one that was named; on a card the first Qwen of 14B; else a small one that is on this disk.

    Raises:
        ModelError: there is none of that name, or no small one.
        EnvironmentFault: the hub cannot be asked about it.
    """
    if name is not None:
        return _described(name, "the one that you named")
    if device == "cuda" and format_name == "text":
        return _described("Qwen/Qwen-14B", "rows of plain text continue the pretraining of the base model")
    if device == "cuda":
        return _described("Qwen/Qwen-14B-Chat", "rows are conversations, and the Chat model has learned the turns")
    for known in known_models.MODELS:
        for word in (known.name, *known.aliases):
            small = DecoderShape.from_known(known).parameters() < _SMALL
            if word != _RANDOM and small and source.find(word, None) is not None:
                return _described(word, "the small model on this disk: there is no CUDA card here")
    fix = "name one: --model FOLDER or owner/name; or draft for a card that is elsewhere: --card 24"
    raise ModelError("no CUDA card here and no small model on this disk", "--model", fix)


def _described(name: str, why: str) -> Model:
    found, known = source.find(name, None), known_models.find(name)
    if found is not None:
        base = bases.inspect(found.folder)
        shape, reach = base.shape, base.shape.max_positions
    elif known is not None:
        base, shape = None, DecoderShape.from_known(known)
        reach = source.reach_of(known, None) or shape.max_positions
    else:
        base = None
        shape, longest = source.remote_shape(name, None, None)
        reach = longest or shape.max_positions
    return Model(
        name=name, why=why, base=base, parameters=shape.parameters(), positions=reach, family=shape.family,
        packed=shape.packing.kind if shape.packing else "",
    )  # fmt: skip


def forms_of(model: Model, device: str) -> tuple[Form, ...]:
    """The forms that the base may be held in, the best first."""
    if model.packed:
        return (Form(weights=model.packed, why="as the base lies in its folder: 4 bits, dequantised in each pass"),)
    return FORMS[device]


def derive(rows: Survey, model: Model) -> Numbers:
    """Every number of the recipe that hangs on the data."""
    window = min(max(8, -(-max(rows.lengths) // 64) * 64), model.positions)
    kept = [length for length in rows.lengths if length <= window]
    if not kept:
        what = f"no row fits the {window} tokens that this model has"
        raise DataError(what, "", "shorten the rows, or name another --model")
    fraction = 0.0 if rows.rows < 2 else 0.1 if rows.rows <= 10 * HELD_OUT else round(HELD_OUT / rows.rows, 6)
    seed = _seed(rows.lengths, window, fraction) if fraction else _SEED
    if seed is None:
        seed, fraction = _SEED, 0.0
    held = max(1, round(fraction * rows.rows)) if fraction else 0
    epochs = 3 if rows.rows < 2_000 else 2 if rows.rows < 10_000 else 1
    tokens = sum(kept) * (rows.rows - held) // rows.rows * epochs
    wanted = 1 << max(0, (tokens // STEPS).bit_length() - 1)
    per_step = max(window, min(16_384, max(512, wanted)))
    room = model.positions - max(kept)
    answer = -(-(rows.answer + 8) // 8) * 8
    exact = bool(fraction) and 0 < rows.answer <= _SHORT and answer <= room
    return Numbers(
        max_length=window, cut=rows.rows - len(kept), fraction=fraction, held=held, epochs=epochs,
        tokens_per_step=per_step, steps=max(1, -(-tokens // per_step)), exact=exact, max_new_tokens=answer, seed=seed,
    )  # fmt: skip


def _seed(lengths: Sequence[int], window: int, fraction: float) -> int | None:
    """The first seed whose draw holds out a row that fits the window, and trains on one; None where there is none."""
    fitting = {number for number, length in enumerate(lengths, 1) if length <= window}
    for seed in range(_SEED, _SEED + 100):
        held = dataset.draw(len(lengths), fraction, seed, "")
        if held & fitting and fitting - held:
            return seed
    return None
