"""The record of a plan's grid, planned again with the formulas of today and set beside what was measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from finetune import plan, recipe, speed
from finetune.budget import Load
from finetune.decoder import DecoderShape
from finetune.hardware import Hardware
from finetune.recipe import Located
from finetune.schedule import Part

RATES = ("flops", "flops_fp32", "bandwidth")
_RESTING = 1.0
"""Load of the machine before the grid below which its wall times count."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One point: predicted and measured bytes at the peak, and seconds of the steps behind the first."""

    name: str
    bytes: tuple[int, int]
    seconds: tuple[float, float]

    @property
    def memory(self) -> float:
        """Predicted / measured."""
        return self.bytes[0] / self.bytes[1]

    @property
    def time(self) -> float:
        return self.seconds[0] / self.seconds[1]

    def line(self) -> str:
        memory = f"{self.bytes[0] / 1e9:6.2f} {self.bytes[1] / 1e9:6.2f} GB {self.memory - 1:+5.0%}"
        return f"{self.name:34} {memory}   {self.seconds[0]:6.2f} {self.seconds[1]:6.2f} s {self.time - 1:+5.0%}"


def judge(record: Mapping[str, Any]) -> list[Judged]:
    """Every point of a record. The machine's rates are the medians of all points' own looks at it."""
    points = record["points"]
    rates = {name: median(point["inputs"]["hardware"][name] for point in points) for name in RATES}
    return [_judged(point, rates, resting=resting(record)) for point in points]


def table(record: Mapping[str, Any]) -> list[str]:
    """The record as a Markdown table."""
    lines = ["| run | GB predicted | measured | | seconds predicted | measured | |", "|---|---|---|---|---|---|---|"]
    for one in judge(record):
        memory = f"{one.bytes[0] / 1e9:.2f} | {one.bytes[1] / 1e9:.2f} | {one.memory - 1:+.0%}"
        lines.append(f"| {one.name} | {memory} | {one.seconds[0]:.2f} | {one.seconds[1]:.2f} | {one.time - 1:+.0%} |")
    return lines


def resting(record: Mapping[str, Any]) -> bool:
    """Whether the machine did little else, so that wall time is the run's own."""
    return bool(record["load_before"][0] < _RESTING)


def _judged(point: Mapping[str, Any], rates: Mapping[str, float], *, resting: bool) -> Judged:
    inputs, measured = point["inputs"], point["measured"]
    located, load = _located(inputs["recipe"]), _load(inputs["load"])
    machine = replace(Hardware(**inputs["hardware"]), **rates)
    shape = DecoderShape(**(inputs["shape"] | {"biased": tuple(inputs["shape"]["biased"])}))
    made = plan.make(located, shape, machine, load, must_fit=False)
    need = plan.need_of(located, shape, machine, load, None)
    later = plan.course_steps(located.recipe, load.lengths)[1 : len(measured["steps"])]
    work = speed.work(later, load, made.micro_batch_tokens)
    predicted = speed.training_seconds(need, made.recomputed_layers, work)
    assert predicted is not None
    # Beside other work a step's wall time is the neighbours'; its processor time, spread over the threads, is not.
    spent = [one["seconds"] if resting else one["cpu"] / machine.threads for one in measured["steps"][1:]]
    judged = "judging_peak" in measured
    peak = max(measured["training_peak"], measured["judging_peak"] if judged else 0)
    return Judged(
        name=point["name"], bytes=(made.budget.total if judged else made.budget.training, peak),
        seconds=(predicted, sum(spent)),
    )  # fmt: skip


def _located(tree: Mapping[str, Any]) -> Located:
    """A recorded recipe, located again. A recipe's paths must exist, a record's need not: empty ones stand for them."""
    with tempfile.TemporaryDirectory() as folder:
        base, file = Path(folder) / "base", Path(folder) / "recipe.yaml"
        base.mkdir()
        data = {key: f"{folder}/{key}.jsonl" for key in ("train_path", "eval_path") if tree["data"][key]}
        for rows in data.values():
            Path(rows).touch()
        file.write_text(json.dumps({**tree, "model": str(base), "data": {**tree["data"], **data}}))  # JSON is YAML
        return recipe.locate(file)


def _load(stored: Mapping[str, Any]) -> Load:
    parts: Sequence[Part] = [Part(**part) for part in stored["parts"]]
    return Load(**(dict(stored) | {"parts": parts}))
