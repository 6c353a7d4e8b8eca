"""Who teaches a distilled run (``objective.teacher``): found, and judged before anything loads.

A finished run or an adapter, over the run's own base or over another one of the same vocabulary; a model's folder; or
what ``finetune teach`` wrote. An adapter over the run's own base, and that base itself, need no second one in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import base as bases
from finetune import manifest, source, starting, taught, tokenizer
from finetune.base import Base
from finetune.budget import Beside
from finetune.decoder import DecoderShape
from finetune.errors import ModelError, RecipeError
from finetune.recipe import Located
from finetune.runfolder import json_bytes, read_json
from finetune.taught import Taught
from finetune.terminal import ByteBar, Terminal, clean

if TYPE_CHECKING:
    from finetune.gather import Gathered

KEY = "objective.teacher"
_SCORES, _WRITES = "this is a reward model, which says nothing of tokens", "name a model that writes"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Not loaded yet. Either a ``record``, or a model: ``base`` in ``weights``, where ``base`` is None the run's own,
    with or without an ``adapter`` folder. ``trained_over``: digests of the base that the adapter belongs to."""

    name: str
    vocabulary: str
    record: Taught | None = None
    base: Base | None = None
    weights: str | None = None
    adapter: Path | None = None
    trained_over: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    def digests(self, own: Mapping[str, str], terminal: Terminal) -> dict[str, str]:
        """What it is, by the files' names; ``own``: the digests of the run's base.

        Raises:
            ModelError: the adapter was trained on another base.
        """
        if self.record:
            return {f"teacher/{manifest.NAME}": self.record.digest}
        of_base = dict(own)
        if self.base is not None:
            bar = ByteBar.over(terminal, "verifying the teacher", self.base.files())
            of_base = self.base.digests(bar.more)
        if self.trained_over is not None and dict(self.trained_over) != of_base:
            what = "the teacher's adapter was trained on another base"
            raise ModelError(what, str(self.adapter), "put its base back, or name another teacher")
        found = {"teacher/base": manifest.digest_bytes(json_bytes(dict(sorted(of_base.items()))))}
        if self.adapter is not None:
            found[f"teacher/{starting.WEIGHTS}"] = manifest.digest(self.adapter / starting.WEIGHTS)
        return found


def beside(teacher: Teacher | None, own: DecoderShape) -> Beside | None:
    """What a teacher takes in memory; ``own``: the run's base. None where there is nothing to load."""
    if teacher is None or teacher.record is not None:
        return None
    adapter = (teacher.adapter / starting.WEIGHTS).stat().st_size if teacher.adapter else 0
    shape = own if teacher.base is None else teacher.base.shape
    return Beside(shape=shape, weights=teacher.weights if teacher.base is not None else None, adapter=adapter)


def notes(teacher: Teacher | None) -> Sequence[str]:
    return teacher.notes if teacher else ()


def unchecked(located: Located) -> list[str]:
    """Of a teacher that is not here, where the run's base is not here either."""
    name = located.recipe.objective.teacher
    return [] if name is None or Path(name).exists() else [f"the teacher {name}: not on this disk"]


def find(located: Located, own: Base | None, tokens: Any, gathered: Gathered | None) -> Teacher | None:
    """The teacher that the recipe names; None where it names none.

    ``own``, ``tokens``: the run's base and its tokenizer, ``gathered``: its rows; None where they are not here.

    Raises:
        RecipeError: nothing is there, or it was asked at another temperature.
        ModelError: it is damaged or not finished, has another vocabulary, or knows nothing of some rows.
    """
    name = located.recipe.objective.teacher
    if located.recipe.objective.method != "distill" or name is None or (own is None and not Path(name).exists()):
        return None
    ours = "" if tokens is None else vocabulary(tokens)
    if taught.is_one(Path(name)):
        return _recorded(located, name, ours, gathered)
    found = _model(located, name, own)
    if found.base is None:
        return Teacher(**{**found.__dict__, "vocabulary": ours})
    if own is not None:
        refuse_other_vocabulary(tokens, tokenizer.of(found.base), str(found.base.folder))
    if found.base.shape.max_positions < located.recipe.train.max_length:
        what = f"the teacher reaches {found.base.shape.max_positions} positions, fewer than train.max_length"
        raise ModelError(what, name, "lower train.max_length, or name another teacher")
    return Teacher(**{**found.__dict__, "vocabulary": ours})


def refuse_shards(located: Located, teacher: Teacher | None) -> None:
    """Raise RecipeError where a teacher would be loaded beside a base in shards, of which there is no second view."""
    if located.recipe.train.shard != "none" and teacher is not None and teacher.record is None:
        what = "a teacher in memory stands on a whole base"
        fix = "take shard: none, or as teacher what it said once: finetune teach"
        raise RecipeError(what, located.where("train.shard"), fix)


def vocabulary(tokens: Any) -> str:
    """A digest of a tokenizer's tokens by their ids."""
    return manifest.digest_bytes(json_bytes(sorted(tokens.get_vocab().items(), key=lambda one: one[1])))


def refuse_other_vocabulary(ours: Any, theirs: Any, where: str) -> None:
    """Raise ModelError where two tokenizers give an id to different tokens, with the first of them."""
    one, other = ({number: token for token, number in tokens.get_vocab().items()} for tokens in (ours, theirs))
    apart = sorted(number for number in {*one, *other} if one.get(number) != other.get(number))
    if apart:
        said = [clean(repr(kind[apart[0]]), 40) if apart[0] in kind else "nothing" for kind in (other, one)]
        what = f"the teacher has another vocabulary: token {apart[0]} is {said[0]} there and {said[1]} here"
        more = f", and {len(apart) - 1:,} more differ" if len(apart) > 1 else ""
        raise ModelError(what + more, where, "distill from a model of the same tokenizer")


def _recorded(located: Located, name: str, ours: str, gathered: Gathered | None) -> Teacher:
    record, aim = taught.read(Path(name)), located.recipe.objective
    facts = record.facts
    if facts.temperature != aim.temperature:
        what = f"this teacher was asked at the temperature {facts.temperature:g}, the recipe says {aim.temperature:g}"
        raise RecipeError(what, located.where("objective.temperature"), "make them alike, or ask it again")
    if ours and facts.vocabulary != ours:
        raise ModelError("the stored teacher has another vocabulary", name, "write it again for this base")
    if gathered is not None:
        judged = gathered.held_out.examples if gathered.held_out else ()
        missing = record.missing(one for rows in (gathered.samples or (), judged) for one in rows)
        if missing:
            what = f"the stored teacher says nothing of {len(missing):,} samples, the first is {missing[0]}"
            raise ModelError(what, name, "write it again for these rows: finetune teach")
    said = (
        f"the teacher is what {clean(facts.name, 80)} said once of these rows: its {facts.top_k} likeliest tokens, all "
        "others as one; no teacher in memory"
    )
    return Teacher(name=name, vocabulary=facts.vocabulary, record=record, notes=(said,))


def _model(located: Located, name: str, own: Base | None) -> Teacher:
    """A model's folder, or an adapter over one; without its vocabulary."""
    path, recipe = Path(name), located.recipe
    is_adapter = (path / starting.CONFIG).is_file() or not (path / "config.json").is_file()
    here = None if path.is_dir() else source.find(name, None)
    if is_adapter and here is None:
        if not path.exists():
            fix = "name a finished run, an adapter, a model that is here, or what finetune teach wrote"
            raise RecipeError(f"there is no {name}", located.where(KEY), fix)
        return _adapter(located, path, own)
    folder = here.folder if here else path
    if faults := manifest.faults(folder) if (folder / manifest.NAME).is_file() else []:
        raise ModelError(faults[0], str(folder), "fetch it, or merge again")
    wanted = recipe.objective.teacher_weights
    weights = recipe.quantize.weights if wanted in ("auto", None) else str(wanted)
    if own is not None and _same(own.folder, folder) and weights == recipe.quantize.weights:
        said = "the teacher is this run's own base with the adapter switched off: no second model"
        return Teacher(name=name, vocabulary="", notes=(said,))
    base = bases.inspect(folder)
    if base.shape.scored:
        raise ModelError(_SCORES, str(folder), _WRITES)
    said = f"the teacher is {name} in {weights}, in memory beside the base"
    return Teacher(name=name, vocabulary="", base=base, weights=weights, notes=(said,))


def _adapter(located: Located, path: Path, own: Base | None) -> Teacher:
    recipe = located.recipe
    folder = starting.adapter_folder(path, located.where(KEY))
    config = starting.whole(folder)
    if config.get("task_type") == "SEQ_CLS":
        raise ModelError(_SCORES, str(folder), _WRITES)
    made = read_json(folder / starting.PROVENANCE)
    made = made if isinstance(made, dict) else {}
    form = made["form"] if isinstance(made.get("form"), dict) else {}
    digests = made["base_sha256"] if isinstance(made.get("base_sha256"), dict) else None
    asked = made.get("base") or config.get("base_model_name_or_path") or recipe.model
    there = source.find(str(asked), made.get("commit"))
    wanted = recipe.objective.teacher_weights
    mine = source.find(recipe.model, recipe.revision)
    is_own = asked == recipe.model or (there is not None and mine is not None and _same(there.folder, mine.folder))
    if is_own and wanted in ("auto", None, recipe.quantize.weights):
        said = [f"the teacher is the adapter of {path} over this run's own base: no second model"]
        if form.get("weights") not in (None, recipe.quantize.weights):
            said.append(
                f"that adapter was trained over {form['weights']}; teacher_weights: {form['weights']} has it so"
            )
        return Teacher(name=str(path), vocabulary="", adapter=folder, trained_over=digests, notes=tuple(said))
    if there is None:
        what = f"the base of this teacher, {clean(str(asked), 80)}, is not on this disk"
        raise ModelError(what, str(folder), "fetch it, or merge the teacher and name the merged model")
    known = form.get("weights") if isinstance(form.get("weights"), str) else recipe.quantize.weights
    weights = str(known if wanted in ("auto", None) else wanted)
    said = [f"the teacher is the adapter of {path} over {clean(str(asked), 80)} in {weights}, beside the base"]
    return Teacher(
        name=str(path), vocabulary="", base=bases.inspect(there.folder, made.get("rope")), weights=weights,
        adapter=folder, trained_over=digests, notes=tuple(said),
    )  # fmt: skip


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
