"""``finetune eval``: a run's base, adapter and merged model, or a bare model, on held-out rows and on tasks.

What was measured is kept by the digest of all that it hangs on (model, rows, settings, libraries) in the user's cache:
the same question is answered at once, also of a base that another run shares.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import finetune
from finetune import (
    bare,
    certify,
    checkpoint,
    evaluate,
    finished,
    gather,
    hardware,
    harness,
    heldout,
    manifest,
    runpage,
    scores,
    window,
)
from finetune import base as bases
from finetune.bare import Bare
from finetune.dataset import Reader, Source, read_rows
from finetune.errors import DataError, ModelError
from finetune.evaluate import HeldOut, How, Origin
from finetune.loading import BaseForm
from finetune.model import Policy
from finetune.runfolder import RunFolder, make_folder, read_json, user_cache, write_json
from finetune.terminal import Progress, Terminal, clean

_MICRO_BATCH = 2048
"""Tokens read at once of a bare model, whose recipe would say it."""
_BATCH_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is wanted. ``data``: rows to judge on, in place of the run's own; ``merged``: a merge of the run;
    ``overrides``: ``evaluate.key=value``; ``tasks`` of lm-eval, from ``task_path`` or its own; ``fresh``: measure anew.
    """

    data: Path | None = None
    merged: Path | None = None
    overrides: Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_path: Path | None = None
    chat: bool = False
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to judge: its name, what it is (digests and form), how it comes into memory."""

    name: str
    identity: Mapping[str, Any]
    load: Callable[[], Policy]
    adapter: bool = True


@dataclass(kw_only=True)
class Bench:
    """What every subject is asked, and the one model that is in memory meanwhile."""

    held_out: HeldOut | None
    how: How | None
    tasks: harness.Tasks | None
    fresh: bool
    terminal: Terminal
    origin: Origin | None = None
    """What the reference or the teacher said of the rows, where the run knows it."""
    known: list[str] = field(default_factory=list)
    _held: tuple[Callable[[], Policy], Policy] | None = None

    def measure(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        """Scores by subject, and numbers of tasks by task and subject."""
        found: dict[str, Any] = {"scores": {}, "tasks": {}}
        rows = _digest([_rows(self.held_out), _settings(self.how)]) if self.held_out and self.how else ""
        tasks = self.tasks.digest() if self.tasks else ""
        for subject in subjects:
            if rows:
                found["scores"][subject.name] = self._once(subject, rows, self._judge)
            if tasks:
                for task, numbers in self._once(subject, tasks, self._ask).items():
                    found["tasks"].setdefault(task, {})[subject.name] = numbers
        return found

    def _once(self, subject: Subject, what: str, measure: Callable[[Subject], dict[str, Any]]) -> dict[str, Any]:
        packages = hardware.environment(hardware.detect())
        key = _digest([what, subject.identity, packages, finetune.__version__])
        path = user_cache() / "evaluations" / f"{key}.json"
        stored = None if self.fresh else read_json(path)
        if isinstance(stored, dict):
            self.known.append(subject.name)
            return stored
        measured = measure(subject)
        make_folder(path.parent)
        write_json(path, measured)
        return measured

    def _policy(self, subject: Subject) -> Policy:
        if self._held is None or self._held[0] is not subject.load:
            self._held = None  # two models need not fit
            gc.collect()
            self._held = subject.load, subject.load()
        return self._held[1]

    def _judge(self, subject: Subject) -> dict[str, Any]:
        assert self.held_out is not None
        assert self.how is not None
        bars: dict[str, Progress] = {}

        def show(what: str, done: int, of: int) -> None:
            bars.setdefault(what, Progress(self.terminal, f"judging {subject.name}: {what}"))(done, of)

        policy = self._policy(subject)
        return evaluate.judge(
            policy, self.held_out, self.how, adapter=subject.adapter, progress=show, origin=self.origin
        ).scores

    def _ask(self, subject: Subject) -> dict[str, Any]:
        assert self.tasks is not None
        rows = self.how.batch_rows if self.how else _BATCH_ROWS
        return dict(self.tasks.run(self._policy(subject), rows, self.terminal, adapter=subject.adapter))


def judge(folder: Path, asked: Asked, terminal: Terminal) -> dict[str, Any]:
    """Judge a run or a bare model; → what was asked and found, with ``known``: the subjects not measured anew.

    A run's result is also written to its evaluation.json and shown in its report.

    Raises:
        ModelError, DataError, RecipeError, EnvironmentFault: as opening, reading rows and measuring say.
    """
    place = bare.find(folder)
    if asked.tasks:
        bases.refuse_scorer(place or folder, "a task of lm-eval")
    tasks = harness.Tasks(asked.tasks, asked.task_path, chat=asked.chat) if asked.tasks else None
    held_out, how, subjects, files, origin = (
        _of_run(folder, asked, terminal) if place is None else (*_of_model(place, asked, terminal), None)
    )
    if held_out is None and tasks is None:
        raise DataError("there are no rows to judge on", str(folder), "name a file with --data, or tasks with --tasks")
    bench = Bench(held_out=held_out, how=how, tasks=tasks, fresh=asked.fresh, terminal=terminal, origin=origin)
    found = bench.measure(subjects)
    result = {
        "run" if place is None else "model": str(folder),
        "data": str(asked.data) if asked.data else None,
        **found,
    }
    for line in lines(found):
        terminal.say(line)
    if bench.known:
        names = ", ".join(dict.fromkeys(bench.known))
        terminal.say(f"measured before, of the same files and settings: {names}; --fresh measures anew")
    if files is not None:
        write_json(files.evaluation, result)
        runpage.keep(files, terminal)
    return result | {"known": list(dict.fromkeys(bench.known))}


Opened = tuple[HeldOut | None, How | None, list[Subject], RunFolder | None]


def _of_run(folder: Path, asked: Asked, terminal: Terminal) -> tuple[*Opened, Origin | None]:
    """A run's base and adapter, and a merge of it where one stands; what its reference says of the rows."""
    overrides = list(asked.overrides)
    if asked.data is not None:
        overrides += [f"data.eval_path={json.dumps(str(asked.data))}", "data.eval_fraction=null", "evaluate.rows=null"]
    prepared, files = finished.open_run(folder, terminal, overrides)
    digest = manifest.digest(files.adapter / checkpoint.ADAPTER)
    this = finished.run_of(prepared, files, terminal)

    def load() -> Policy:
        terminal.say(f"loading {prepared.recipe.model} as {this.form().weights} on {this.form().device}")
        return finished.policy(this)

    identity = {"base": this.identity.base, "form": asdict(this.form()), "rope": prepared.recipe.rope}
    identity |= {"start": this.identity.start} if this.identity.start else {}
    subjects = [
        Subject(name="base", identity=identity, load=load, adapter=False),
        Subject(name="adapter", identity=identity | {"adapter": digest}, load=load),
    ]
    merged = asked.merged or (folder / "merged" if (folder / "merged" / "config.json").is_file() else None)
    if merged is not None:
        form = replace(this.form(), weights=this.form().compute, double=False)
        subjects += _merged(merged, form, digest, asked.merged is not None, terminal)
    origin = this.origin()
    if origin is None and this.identity.start and this.how().objective is not None:
        what = "the adapter that this run began from is its reference, and of these rows that said nothing"
        raise ModelError(what, str(folder), "judge it on its own rows")
    return prepared.held_out, this.how(), subjects, files, origin


def _merged(folder: Path, form: BaseForm, adapter: str, named: bool, terminal: Terminal) -> list[Subject]:
    """The merge as a subject, if it is of this adapter and can be held here; one that was named must be."""
    note, why = read_json(folder / checkpoint.PROVENANCE), ""
    found = None
    if not (folder / "config.json").is_file():
        why = "is not there"
    elif not isinstance(note, dict) or note.get("adapter_sha256") != adapter:
        why = "is not the merge of this run's adapter"
    else:
        found = bare.inspect(folder, form)
        why = "" if certify.fits(found.base, form) else "does not fit this machine"
    if why and named:
        raise ModelError(f"this model {why}", str(folder), "merge the run (finetune merge), or leave --merged out")
    if found is None or why:
        terminal.say(f"{folder} {why}: it is left out")
        return []
    return [_plain("merged", found, terminal)]


def _plain(name: str, found: Bare, terminal: Terminal) -> Subject:
    return Subject(name=name, identity=found.identity(terminal), load=lambda: found.load(terminal))


def _of_model(folder: Path, asked: Asked, terminal: Terminal) -> Opened:
    """A bare model folder, merged or a base, in the number format that this machine computes in."""
    if asked.merged is not None:
        raise ModelError("--merged goes with a run", str(folder), "name the run, or leave it out")
    found = bare.inspect(folder)
    wanted = found.wanted(asked.overrides)
    subject = _plain("model", found, terminal)
    how = How(
        metrics=wanted.metrics, max_new_tokens=wanted.max_new_tokens, batch_rows=wanted.batch_rows,
        micro_batch_tokens=_MICRO_BATCH, asked=wanted.asked(), objective=found.objective(wanted.metrics),
    )  # fmt: skip
    if asked.data is None:
        return None, how, [subject], None
    made, most = found.renderer(), found.base.shape.max_positions
    keep = wanted.multiple_choice if isinstance(wanted.multiple_choice, str) else None
    rows = read_rows(Reader(Source(path=str(asked.data)), gather.special_tokens(made)), keep=keep)[: wanted.rows]
    fit = window.Window(renderer=made, max_length=most, rows="pairs" if how.objective else "answers")
    held_out = heldout.make(window.fit(rows, fit), made, wanted.metrics, wanted.asked())
    longest = max((len(question.prompt) for question in held_out.questions), default=0)
    if longest + wanted.max_new_tokens > most:
        what = f"a prompt of {longest} tokens and {wanted.max_new_tokens} of answer exceed the model's positions"
        raise DataError(what, str(asked.data), "--set evaluate.max_new_tokens=N")
    return held_out, how, [subject], None


def _rows(held_out: HeldOut) -> list[Any]:
    """All that the rows are to a model."""
    return [
        [[one.ids, one.weights, one.where, one.half, one.label] for one in held_out.examples], held_out.roles,
        [[one.prompt, one.answer, one.asked, [[o.ids, o.weights] for o in one.options], one.right]
         for one in held_out.questions],
    ]  # fmt: skip


def _settings(how: How | None) -> dict[str, Any]:
    """How it is judged, and the files that this hangs on: a schema, a command and its scripts."""
    assert how is not None
    words = [how.asked.get("json_schema")]
    words += [word for name in ("command", "unit_test") for word in (how.asked.get(name) or ((),))[0]]
    paths = [Path(place) for word in words if word and (place := shutil.which(word) or word)]
    files = {str(path): manifest.digest(path) for path in paths if path.is_file()}
    return asdict(how) | {"objective": repr(how.objective), "files": files}


def _digest(value: Any) -> str:
    return manifest.digest_bytes(json.dumps(value, sort_keys=True, default=dict).encode())


def lines(found: Mapping[str, Any]) -> list[str]:
    """The result for a terminal: one table of the held-out rows, one of the tasks."""
    said = scores.table(found["scores"]) if found["scores"] else []
    names = list(dict.fromkeys(name for by_name in found["tasks"].values() for name in by_name))
    if not names:
        return said
    rows = [("task", "metric", *names)]
    for task, by_name in found["tasks"].items():
        metrics = dict.fromkeys(metric for numbers in by_name.values() for metric in numbers)
        for metric in (one for one in metrics if "_stderr" not in one):
            cells = [_cell(by_name.get(name, {}), metric) for name in names]
            rows.append((clean(task, 40), clean(metric, 40), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*said, *([""] if said else []), *table]


def _cell(numbers: Mapping[str, float], metric: str) -> str:
    if metric not in numbers:
        return "-"
    name, _, how = metric.partition(" ")
    error = numbers.get(f"{name}_stderr{' ' + how if how else ''}")
    return f"{numbers[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
