"""A run folder's files, read for people: what was trained, how it went, and what may be said about it.

Every value may have been written by somebody else: what is not of the kind that stands there is taken as not there, so
that a damaged or hostile file makes a poorer story and never an error.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import ended, evals, scores
from finetune.runfolder import RunFolder, read_json
from finetune.terminal import amount, clean, duration

_LARGEST = 1e18
CURVES = (
    "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory", "seconds", "tokens", "rewards/chosen",
    "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl",
    "divergence", "cross_entropy",
    "reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio",
    *(f"rewards/{metric}/mean" for metric in evals.ANSWERED),
)  # fmt: skip
"""From the seventh on they are of objectives: of judged answers, of a teacher's students, of answers of one's own."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is known of a run. ``curves``: (step, value) by the metric's name; ``checkpoint``: the newest step saved."""

    folder: str
    plan: dict[str, Any]
    identity: dict[str, Any]
    recipe: str
    curves: dict[str, list[tuple[float, float]]]
    scores: dict[str, dict[str, Any]]
    answers: list[dict[str, str]]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    end: dict[str, Any]
    checkpoint: int
    digests: dict[str, str]
    left: dict[str, int]

    @property
    def name(self) -> str:
        return clean(Path(self.folder).name or self.folder, 80)

    @property
    def finished(self) -> bool:
        return bool(self.end)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.curves["loss"][-1][0]) if self.curves["loss"] else 0

    @property
    def total(self) -> int:
        return int(number(self.plan.get("steps")) or 0)

    @property
    def seconds(self) -> float:
        """What the logged steps took, without loading and judging."""
        return math.fsum(value for _, value in self.curves["seconds"])

    @property
    def peak(self) -> float:
        return max((value for _, value in self.curves["memory"]), default=0.0)

    def judged(self) -> list[tuple[str, dict[str, Any]]]:
        return list(self.scores.items())

    def at_steps(self, metric: str) -> list[tuple[float, float]]:
        """A score by the step at which it was measured."""
        found = []
        last = int(number(self.end.get("steps")) or self.total)
        for name, values in self.scores.items():
            value = number(values.get(metric))
            step = last if name == ended.LAST else _step_of(name, self.total)
            if name == ended.AFTER and ("of" in self.end or "kept" in self.end):
                continue  # it is of a step that has its own judgement
            if value is not None and step is not None:
                found.append((float(step), value))
        return sorted(found)

    def first_and_last(self) -> tuple[str, str] | None:
        """The names of the judgements before and after (or of the newest one in between)."""
        placed = [(step, name) for name in self.scores if (step := _step_of(name, self.total or 10**9)) is not None]
        names = [name for _, name in sorted(placed)]
        return (names[0], names[-1]) if len(names) > 1 and names[0] == "before" else None


def _step_of(name: str, total: int) -> int | None:
    if name in ("before", "after"):
        return 0 if name == "before" else total
    words = name.split(" ")
    return int(words[1]) if len(words) == 2 and words[0] == "step" and words[1].isdecimal() else None


def number(value: Any) -> float | None:
    """A finite number of a size that occurs, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def read(folder: RunFolder, root: str = "") -> Story:
    """What the folder's files tell. ``root``: how to name it, as the recipe does where it is known."""
    plan, identity = _object(folder.plan), _object(folder.identity)
    return Story(
        folder=root or str(plan.get("output") or folder.root),
        plan=plan,
        identity=identity,
        recipe=_bytes(folder.recipe).decode("utf-8", "replace"),
        curves=_curves(folder.metrics),
        scores={str(name): values for name, values in scores.read(folder).items() if isinstance(values, dict)},
        answers=[
            {str(key): str(value) for key, value in line.items() if key != scores.VERDICTS}
            for line in lines(folder.samples)
        ],
        data=_object(folder.data),
        evaluation=_object(folder.evaluation),
        end=ended.end(folder),
        checkpoint=_newest(folder.checkpoints),
        digests={str(name): str(value) for name, value in _part(_object(folder.adapter / "manifest.json"), "sha256")},
        left=_left(folder.named_rows),
    )


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def part(of: dict[str, Any], key: str) -> dict[str, Any]:
    """A dictionary in a dictionary, empty where it is none."""
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _part(of: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    yield from sorted(part(of, key).items())


def listed(of: dict[str, Any], key: str) -> list[Any]:
    """A list in a dictionary, empty where it is none."""
    found = of.get(key)
    return found if isinstance(found, list) else []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn or foreign line is passed over."""
    for line in _bytes(path).splitlines():  # of text it would also split at U+2028, which an answer may hold
        found = parsed(line)
        if found is not None:
            yield found


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of one JSON line, None where it is something else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {name: {} for name in CURVES}
    for line in lines(path):
        step = number(line.get("step"))
        for name in CURVES if step is not None else ():
            value = number(line.get(name))
            if step is not None and value is not None:
                found[name][step] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def _newest(checkpoints: Path) -> int:
    names = [path.name[5:] for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _left(path: Path) -> dict[str, int]:
    """How many rows were not taken as they stand, by what was done with them."""
    counts: dict[str, int] = {}
    for line in lines(path):
        counts[str(line.get("done"))] = counts.get(str(line.get("done")), 0) + 1
    return counts


def summary(story: Story) -> str:
    """The run in a few sentences, each of facts that its files hold."""
    plan = story.plan
    recipe = part(story.identity, "recipe")
    method = {"lora": "LoRA"}.get(str(recipe.get("adapter.method")), str(recipe.get("adapter.method")))
    rank, trained = number(recipe.get("adapter.r")), number(plan.get("trainable_parameters"))
    what = f"A {method} adapter" if recipe.get("adapter.method") else "An adapter"
    what += f" of rank {rank:g}" if rank is not None else ""
    what += f" ({amount(trained)} parameters)" if trained is not None else ""
    size = number(plan.get("parameters"))
    base = f"{plan.get('model', 'an unknown base')}"
    base += f" ({plan.get('family')}, {amount(size)} parameters, held as {plan.get('weights')})" if size else ""
    sentences = [f"{what} {'was' if story.finished else 'is'} trained on {base}."]
    tokens, samples = number(plan.get("tokens")), number(plan.get("samples"))
    supervised = number(plan.get("supervised_tokens"))
    if story.total and tokens is not None and samples is not None:
        answers = f", {supervised:,.0f} of them supervised" if supervised is not None else ""
        sentences.append(
            f"The course is {story.total:,} steps over {samples:,.0f} {_counted(plan)}: {tokens:,.0f} tokens{answers}."
        )
    if story.seconds:
        place = f" on {plan['device_name']}" if plan.get("device_name") else ""
        sentences.append(f"{len(story.curves['seconds']):,} steps took {_took(story.seconds)}{place}.")
    chosen = [f"{one[0].upper()}{one[1:]}." for one in ended.sentences(story.end)]
    return " ".join(clean(one, 600) for one in [*sentences, *_result(story), *chosen])


def _counted(plan: dict[str, Any]) -> str:
    return "pairs" if plan.get("counted") == "pairs" else "samples"


def _took(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f}s"


def _result(story: Story) -> Iterator[str]:
    ends = story.first_and_last()
    if ends is None:
        return
    before, after = (story.scores[name] for name in ends)
    changes = []
    for key, name, shown in (
        ("loss", "loss", "{:.4f}"), ("exact_match", "exact match", "{:.1%}"),
        ("reward_accuracy", "the share of rewards that are right", "{:.1%}"),
    ):  # fmt: skip
        one, two = number(before.get(key)), number(after.get(key))
        if one is not None and two is not None:
            changes.append(f"{name} went from {shown.format(one)} to {shown.format(two)}")
    rows = number(after.get("rows"))
    if changes:
        yield f"On {rows or 0:,.0f} held-out rows {' and '.join(changes)}{_merged(story)}."


def _merged(story: Story) -> str:
    value = number(story.scores.get("merged", {}).get("exact_match"))
    return f" (merged: {value:.1%})" if value is not None else ""


def state(story: Story, *, training: bool) -> str:
    """Where an unfinished run stands and how it goes on; empty for a finished one."""
    if story.finished:
        return ""
    stands = f"step {story.step:,} of {story.total:,}" if story.total else f"step {story.step:,}"
    others = [str(name) for name in listed(story.identity, "together")]
    recipe = shlex.quote(f"{story.folder}/recipe.yaml")
    command = "the same `finetune train` command" if others else f"`finetune train {recipe}`"
    begins = f"goes on after step {story.checkpoint:,}" if story.checkpoint else "begins it again: no step is saved yet"
    whose = f" with {', '.join(others)}" if others else ""
    if training:
        said = f"This run was under way at {stands} when this page was written. If nothing trains it any more, it was "
        return clean(f"{said}cut off: {command}{whose} {begins}.", 600)
    return clean(f"This run was interrupted at {stands}. {command[0].upper()}{command[1:]}{whose} {begins}.", 600)
