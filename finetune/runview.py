"""A run as its own files tell it, finished or not: what it is, its curve, its judgements and each row behind them.

Read without torch and without trust: a field of another type counts as absent, a line that cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import ended, evals, identity, runstory, scores
from finetune.errors import EnvironmentFault
from finetune.evals.exact_match import is_right
from finetune.identity import Identity
from finetune.runfolder import RunFolder, read_json

END = ended.AFTER
"""The name of a finished run's judgement."""
_ABSURD = 1e100
"""Beyond it a number is none: sums of such would overflow."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judgement. ``name``: after, or "step N" of a run that is under way.

    ``right`` and ``losses`` (summed loss, weight) by the row's content and how often that came before; ``verdicts``
    likewise, by metric.
    """

    name: str
    scores: dict[str, Any]
    right: dict[tuple[str, int], bool] = field(default_factory=dict)
    losses: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    verdicts: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        return _finite(self.scores.get(key))


@dataclass(frozen=True, kw_only=True)
class View:
    """A run. ``chosen``: where it stopped early, and whose adapter was kept.

    ``curve``: (step, training loss); ``held_out``: (step, loss) of its judgements on the way."""

    folder: Path
    name: str
    identity: Identity
    steps: int
    total: int | None
    finished: bool
    chosen: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    judged: Judgement | None

    @property
    def state(self) -> str:
        of = f" of {self.total}" if self.total else ""
        if self.finished and self.chosen:
            return "; ".join(self.chosen)
        return f"finished, {self.steps} steps" if self.finished else f"unfinished, step {self.steps}{of}"


def view(folder: Path) -> View:
    """Read a run's folder.

    Raises:
        EnvironmentFault: no run is there, or its identity is damaged.
    """
    files = RunFolder(folder)
    known = _identity(files)
    if known is None:
        below = sorted(path.parent.name for path in folder.glob("*/identity.json")) if folder.is_dir() else []
        fix = f"name its runs: {', '.join(below[:4])}" if below else "give the `output:` folder of a run"
        raise EnvironmentFault("this is not a run folder", str(folder), fix)
    plan, done = read_json(files.plan), read_json(files.finished)
    total = plan.get("steps") if isinstance(plan, dict) else None
    curve = tuple(_points(files.metrics))
    end = done.get("steps") if isinstance(done, dict) else None
    steps = end if isinstance(end, int) else max((step for step, _ in curve), default=0)
    stored = {name: value for name, value in scores.read(files).items() if isinstance(value, dict)}
    return View(
        folder=folder, name=str(folder), identity=known, steps=steps, total=total if isinstance(total, int) else None,
        finished=isinstance(end, int), curve=curve, held_out=tuple(_losses_on_the_way(stored, steps, done)),
        chosen=tuple(ended.sentences(done)) if isinstance(done, dict) else (),
        judged=_newest(files, stored),
    )  # fmt: skip


def _identity(files: RunFolder) -> Identity | None:
    known = identity.read(files.identity)
    parts = (known.recipe, known.resolved, known.data, known.base, known.environment) if known else ()
    if not all(isinstance(part, dict) for part in parts):
        raise EnvironmentFault("this run's identity cannot be read", str(files.identity), "leave this run out")
    return known


def step_of(name: str) -> int | None:
    """The step that a judgement's name tells: 0 of the bare base, None of an end or of a merged model."""
    word, _, number = name.partition(" ")
    if name == "before":
        return 0
    return int(number) if word == "step" and number.isdecimal() and len(number) < 12 else None


def _losses_on_the_way(stored: dict[str, Any], steps: int, done: Any) -> list[tuple[int, float]]:
    chosen = isinstance(done, dict) and ("of" in done or "kept" in done)  # then the end's is a step's own
    at_end = (ended.LAST,) if chosen else (END,)
    places = {name: steps if name in at_end else step_of(name) for name in stored}
    found = ((place, _finite(stored[name].get("loss"))) for name, place in places.items() if place is not None)
    return sorted((place, loss) for place, loss in found if loss is not None)


def _newest(files: RunFolder, stored: dict[str, Any]) -> Judgement | None:
    """How the run was judged last, with the rows behind it."""
    steps = {name: step for name in stored if (step := step_of(name))}
    name = END if END in stored else max(steps, key=steps.__getitem__, default=None)
    if name is None:
        return None
    right: dict[tuple[str, int], bool] = {}
    losses: dict[tuple[str, int], tuple[float, float]] = {}
    verdicts: dict[str, dict[tuple[str, int], float]] = {}
    for key, row in _by_content(files.samples):
        said = runstory.part(runstory.part(row, scores.VERDICTS), name)
        for metric in evals.ROWWISE:
            if (value := _finite(said.get(metric))) is not None:
                verdicts.setdefault(metric, {})[key] = value
        if isinstance(row.get(name), str) and isinstance(row.get("expected"), str):
            right[key] = is_right(row["expected"], row[name])
    for key, row in _by_content(files.losses):
        loss, weight = _finite(row.get(name)), _finite(row.get("weight"))
        if loss is not None and weight is not None and weight > 0:
            losses[key] = loss, weight
    return Judgement(name=name, scores=stored[name], right=right, losses=losses, verdicts=verdicts)


def _by_content(path: Path) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Rows that say what they are of, each with a key: the content, and how often it came before."""
    seen: dict[str, int] = {}
    for row in runstory.lines(path):
        content = row.get("content")
        if isinstance(content, str) and content:
            yield (content, seen.setdefault(content, 0)), row
            seen[content] += 1


def _points(path: Path) -> Iterator[tuple[int, float]]:
    for row in runstory.lines(path):
        step, loss = row.get("step"), _finite(row.get("loss"))
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 10**12 and loss is not None:
            yield step, loss


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < _ABSURD else None  # NaN is not below either
