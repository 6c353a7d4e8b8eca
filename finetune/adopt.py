"""A recipe from another trainer's settings: read, settled by the rows' number, checked, written with its comments.

Nothing is fetched, nothing that is there is replaced, and a recipe that would not load is not written.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import base, draft, foreign, hftrainer, importers, known_models, recipe, records, source
from finetune.errors import DataError, Fault, ModelError, RecipeError
from finetune.foreign import Draft, Place
from finetune.recipe.sections import Data, Evaluate, Objective, Quantize
from finetune.recipe.training import Train
from finetune.terminal import Terminal, clean

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_LATER = ("model", "data.train_path", "data.eval_path", "data.sources")
"""Keys that name what may be on another machine: a recipe is written although it is not here."""
_REWARDS = "objective.rewards"
"""What a recipe is written without, where it was a program there: nothing plans before somebody has filled it in."""
_SECTIONS = {
    "quantize": ("how the frozen base weights are held", tuple(Quantize.model_fields)),
    "adapter": ("what is trained: a PEFT method and that method's own fields", ()),
    "objective": ("what is minimised", tuple(Objective.model_fields)),
    "data": ("where the rows come from", tuple(Data.model_fields)),
    "train": ("how long, how fast, how much at a time", tuple(Train.model_fields)),
    "evaluate": ("how the result is judged", tuple(Evaluate.model_fields)),
}
_KINDS = {
    "lost": "no counterpart here",
    "differs": "what it silently meant there, or what is otherwise here",
}


def begin(path: Path, out: Path, name: str | None, devices: int | None, terminal: Terminal) -> dict[str, Any]:
    """Read another trainer's settings, write the recipe, and say what became of every key.

    Raises:
        RecipeError: as of ``importers.read``, or settings that no recipe can have.
        EnvironmentFault: something is at ``out`` already.
    """
    draft.refuse_existing(out)
    made = importers.read(path, name, devices, Place(columns=_columns, reach=_reach))
    hftrainer.settle(made, _count(made))
    made.settings.refuse()
    _names_here(made)
    text = "\n".join(_lines(made, out)) + "\n"
    missing = _check(text, made)
    draft.place(out, text)
    for line in _said(made, out, missing):
        terminal.say(clean(line, 1000))
    return {
        "recipe": str(out), "trainer": made.settings.trainer, "version": made.version,
        "taken": [one._asdict() for one in made.taken],
        "lost": [one._asdict() for one in made.remarks if one.kind == "lost"],
        "differs": [one._asdict() for one in made.remarks if one.kind == "differs"],
        "missing": [fault._asdict() for fault in missing],
    }  # fmt: skip


def _columns(path: str) -> list[str] | None:
    """Of the first row of a file on this disk."""
    if not Path(path).is_file():
        return None
    try:
        first = next(iter(records.read(Path(path))), None)
    except DataError:
        return None
    return list(first.value) if first is not None and first.value is not None else None


def _reach(name: str) -> int | None:
    """A model's longest context, where the model is on this disk or known."""
    known = known_models.find(name)
    if known is not None:
        return source.reach_of(known, None) or known.max_position_embeddings
    found = source.find(name, None)
    try:
        return base.inspect(found.folder).shape.max_positions if found is not None else None
    except ModelError:
        return None


def _count(made: Draft) -> int | None:
    """Rows of the training files; None where one is no file of this disk."""
    path, sources = made.lines.get("data.train_path"), made.lines.get("data.sources")
    paths = [path[0]] if path else [one["path"] for one in sources[0]] if sources else []
    if not paths or any(not Path(one).is_file() for one in paths):
        return None
    try:
        return sum(1 for one in paths for record in records.read(Path(one)) if record.value is not None) or None
    except DataError:
        return None


def _names_here(made: Draft) -> None:
    """What every recipe says, where the other trainer had nothing to say."""
    scored = made.lines.get("objective.method", ("",))[0] == "reward"
    more = "how many pairs are ranked right" if scored else "exact_match compares short answers"
    made.add("evaluate.metrics", ["loss"], f"on held-out rows, base against adapter; {more}")
    folder = made.lines["output"][0]
    if Path(folder).exists():
        made.differs("output_dir", f"{foreign.short(folder)} is there already: give the run a folder of its own")


def _lines(made: Draft, out: Path) -> Iterator[str]:
    yield f"# Taken over by `finetune import` from {clean(str(made.settings.file))} ({made.settings.trainer})."
    yield f"# Defaults that were not written there are those of {made.version}. Beside each key: what it was there."
    for kind, title in _KINDS.items():
        said = [remark for remark in made.remarks if remark.kind == kind]
        yield from [f"# {title[0].upper()}{title[1:]}:"] if said else []
        yield from (f"# - {clean(str(one), 400)}" for one in said)
    yield f"# Next: finetune plan {clean(str(out))}"
    yield ""
    for key in ("model", "revision", "rope"):
        yield from _line(made, key, "")
    for section, (meaning, order) in _SECTIONS.items():
        keys = [key for key in made.lines if key.startswith(f"{section}.")]
        keys.sort(key=lambda key: order.index(key.partition(".")[2]) if order else 0)
        if not keys:
            continue
        yield ""
        yield f"{section}: # {meaning}"
        for key in keys:
            yield from _line(made, key, "  ")
        if section == "adapter":
            yield ""
            yield from _line(made, "trainable_tokens", "")
    yield ""
    yield from _line(made, "tracker", "")
    yield from _line(made, "output", "")


def _line(made: Draft, key: str, indent: str) -> Iterator[str]:
    if key in made.lines:
        value, comment = made.lines[key]
        yield f"{indent}{key.rpartition('.')[2]}: {_written(value)} # {clean(comment, 300)}"


def _written(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        value = int(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(one)}' for key, one in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _check(text: str, made: Draft) -> list[Fault]:
    """What the recipe lacks yet, on this disk or in itself; anything else that is wrong is refused, by their keys."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            recipe.load(file)
        except RecipeError as error:
            faults = [_theirs(fault, made) for fault in error.faults]
            wrong = [fault for fault, later in faults if not later]
            if wrong:
                raise RecipeError.of(wrong) from None
            return [fault for fault, _ in faults]
    return []


def _theirs(fault: Fault, made: Draft) -> tuple[Fault, bool]:
    """A fault of the recipe at the key that it came from; and whether it only names what is not here yet."""
    key = fault.where.rpartition(": ")[2]
    plain = re.sub(r"\[\d+\].*", "", key)
    later = plain in _LATER and ("no such file" in fault.what or "neither a folder" in fault.what)
    later = later or (plain == _REWARDS and made.lines.get(_REWARDS, ("",))[0] is None)
    keys = next((one.keys for one in made.taken if one.recipe == plain), None)
    where = made.settings.where(keys[0]) if keys else str(made.settings.file)
    return fault._replace(where=f"{where} (here {key})"), later


def _said(made: Draft, out: Path, missing: list[Fault]) -> Iterator[str]:
    yield f"{made.settings.file}: {made.version}"
    yield "taken over:"
    yield from (f"  {one}" for one in made.taken)
    for kind, title in _KINDS.items():
        said = [remark for remark in made.remarks if remark.kind == kind]
        if said:
            yield f"{title}:"
        yield from (f"  {remark}" for remark in said)
    if missing:
        yield "not here yet:"
    yield from (f"  {fault}" for fault in missing)
    yield f"written: {out}"
    yield f"next: finetune plan {out}"
