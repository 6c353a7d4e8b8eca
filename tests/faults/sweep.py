"""Whole training runs, broken and given again: the rig behind ``tests/test_kill*.py``.

A trial breaks a run at one point, gives the same command again, and compares every file with those of a run that
nobody broke. A ``Rig`` holds one warm server per lane; each lane has its own run folder and its own unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults import ROOT, Fault, Mode, Op, Outcome, Trials

TRAIN = "tests.faults.jobs:train"
SAVE_EVERY, STEPS = 4, 12
_TIMES = ("seconds", "waited", "tokens_per_second", "memory")
_UNLIKE = {"plan.json", ".lock", "report.html"}
"""Files that may differ between two equal runs: the plan tells today's free memory, the report how long steps took."""

CONFIGS: dict[str, dict[str, Any]] = {
    "packing": {},  # three rows a step, two to a micro-batch: accumulation in every step; epoch 2 from step 9 on
    "workers": {"train.workers": 2},
    "epochs": {"train.steps": None, "train.epochs": 2.0, "train.examples_per_step": 5},
    "tokens": {"train.examples_per_step": None, "train.tokens_per_step": 200},
    "fp16": {"quantize.compute": "fp16"},
    "no-dropout": {"adapter.lora_dropout": 0.0},  # another forward: the fused one
    "unaligned": {"evaluate.every": 3},  # judged between checkpoints
    "choosing": {  # stops after step 9 of 12, as nothing improves by so much; an earlier step's adapter may be kept
        "evaluate.every": 3,
        "evaluate.keep": "best",
        "evaluate.early_stopping_patience": 2,
        "evaluate.early_stopping_threshold": 100.0,
        "train.learning_rate": 0.05,
    },
}


def recipe(base: Path, data: Path, output: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run of 12 steps that takes about a second; ``changes`` are dotted keys."""
    tree: dict[str, Any] = {
        "model": str(base),
        "quantize": {"weights": "nf4", "compute": "fp32"},
        "adapter": {
            "method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
        },
        "data": {"train_path": str(data / "train.jsonl"), "eval_path": str(data / "eval.jsonl")},
        "train": {
            "steps": STEPS, "examples_per_step": 3, "learning_rate": 0.01, "max_length": 96, "micro_batch_tokens": 130,
            "recompute": "none", "save_every": SAVE_EVERY, "keep_last": 2, "seed": 7,
        },
        "evaluate": {"metrics": ["loss", "exact_match"], "every": SAVE_EVERY, "rows": 4, "max_new_tokens": 4},
        "tracker": "none",
        "output": str(output),
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return tree


def write_data(folder: Path) -> Path:
    """24 rows to train on and 4 to judge on, from the committed dates."""
    folder.mkdir(parents=True)
    for name, rows in (("train.jsonl", 24), ("eval.jsonl", 4)):
        lines = (ROOT / "data" / "dates" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]), encoding="utf-8")
    return folder


def snapshot(run: Path) -> dict[str, Any]:
    """Everything in a run folder by relative name: digests, and the metrics without their times."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir():
            found[name] = "folder"
        elif name == "metrics.jsonl":
            found[name] = [_without_times(line) for line in path.read_text().splitlines()]
        else:
            found[name] = None if name in _UNLIKE else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _without_times(line: str) -> Any:
    try:
        return {key: value for key, value in json.loads(line).items() if key not in _TIMES}
    except ValueError:
        return line  # torn: an unbroken run has none, so that it differs


def difference(whole: dict[str, Any], other: dict[str, Any]) -> str:
    """The first names that differ, or an empty string."""
    names = [name for name in sorted({*whole, *other}) if whole.get(name, "-") != other.get(name, "-")]
    return ", ".join(
        f"{name} ({'missing' if name not in other else 'additional' if name not in whole else 'differs'})"
        for name in names[:4]
    )


@dataclass(frozen=True)
class Whole:
    """The unbroken run: what it left, what it did to files, how long it took."""

    files: dict[str, Any]
    log: tuple[Op, ...]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """One trial. ``unaided``: the same command alone finished the run; ``why`` is empty where nothing is wrong."""

    point: str
    unaided: bool
    identical: bool
    why: str


@dataclass
class Lane:
    """One run folder with one warm server."""

    trials: Trials
    base: Path
    folder: Path
    plant: str = ""
    wholes: dict[str, Whole] = field(default_factory=dict)

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def recipe_file(self, config: str) -> Path:
        """The config's recipe, with this lane's run folder as its output."""
        file = self.folder / f"{config}.yaml"
        if not file.exists():
            tree = recipe(self.base, self.folder.parent / "data", self.run_folder, CONFIGS[config])
            file.write_text(json.dumps(tree, indent=1))
        return file

    def train(self, config: str, job: str = TRAIN, *, fresh: bool = False, **how: Any) -> Outcome:
        """Give the command; ``how`` goes to ``Trials.run``, ``args`` to the job."""
        if fresh:
            shutil.rmtree(self.run_folder, ignore_errors=True)
        args = {"recipe": str(self.recipe_file(config)), "plant": self.plant, **how.pop("args", {})}
        return self.trials.run(job, args, **how)

    def whole(self, config: str) -> Whole:
        """The unbroken run, made once for each config (and planted defect)."""
        key = f"{config}+{self.plant}"
        if key not in self.wholes:
            outcome = self.train(config, fresh=True, fault=Fault(Mode.COUNT, 0, self.run_folder))
            assert (outcome.exit_code, outcome.stderr) == (0, ""), outcome
            self.wholes[key] = Whole(snapshot(self.run_folder), outcome.log, outcome.seconds)
        return self.wholes[key]

    def again(self, config: str, point: str, *, broken: str = "", said: str = "", saves: bool = True) -> Verdict:
        """Give the same command again and compare.

        Args:
            broken: a fault that the broken run itself showed.
            said: what the command must print.
            saves: whether the same checkpoints must be left; a run stopped on request has one more to choose from.
        """
        outcome = self.train(config)
        unaided = (outcome.exit_code, outcome.stderr) == (0, "")
        if not unaided:
            why = f"the same command ended with {outcome.exit_code or outcome.signal}: {outcome.stderr[-300:]}"
            return Verdict(point, unaided, False, why)
        left, whole = snapshot(self.run_folder), self.whole(config).files
        if not saves:
            left, whole = (
                {name: value for name, value in files.items() if not name.startswith("checkpoints/step-")}
                for files in (left, whole)
            )
        apart = difference(whole, left)
        unsaid = "" if said in outcome.stdout else f"not said: {said}"
        return Verdict(point, unaided, not apart, broken or unsaid or apart)

    def faulted(self, config: str, mode: Mode, n: int) -> tuple[str, Outcome]:
        self.whole(config)
        outcome = self.train(config, fresh=True, fault=Fault(mode, n, self.run_folder))
        op = outcome.log[n - 1] if len(outcome.log) >= n else Op(0, "not reached", "", "")
        return f"{config} {mode.name} at {n} ({op.name} {Path(op.path).name})", outcome


class Rig:
    """Two lanes where the machine has two cores. One thread each: small products, and the same bits."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.lanes: list[Lane] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        write_data(self.folder / "data")
        count = min(2, os.cpu_count() or 1)
        servers = [Trials(["tests.faults.stack"], threads=1) for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            for number, server in enumerate(pool.map(self._stack.enter_context, servers)):
                folder = self.folder / f"lane-{number}"
                folder.mkdir()
                self.lanes.append(Lane(server, self.base, folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def sweep(self, trial: Callable[[Lane, Any], Verdict], points: Iterable[Any], plant: str = "") -> Sweep:
        """Run ``trial`` on every point, on all lanes at once; the order of points does not matter to any."""
        began = time.monotonic()
        free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in self.lanes:
            free.put(lane)

        def one(point: Any) -> Verdict:
            lane = free.get()
            try:
                lane.plant = plant
                return trial(lane, point)
            finally:
                free.put(lane)

        with ThreadPoolExecutor(len(self.lanes)) as pool:
            return Sweep(list(pool.map(one, points)), time.monotonic() - began)


@dataclass(frozen=True)
class Sweep:
    """The verdicts of many trials."""

    verdicts: Sequence[Verdict]
    seconds: float

    @property
    def faults(self) -> list[str]:
        return [f"{verdict.point}: {verdict.why}" for verdict in self.verdicts if verdict.why]

    def counts(self) -> dict[str, int | float]:
        return {
            "trials": len(self.verdicts),
            "identical": sum(verdict.identical for verdict in self.verdicts),
            "unaided": sum(verdict.unaided for verdict in self.verdicts),
            "faults": len(self.faults),
            "seconds": round(self.seconds, 1),
        }


def keep(folder: Path, name: str, sweep: Sweep) -> str:
    """Add a sweep's counts to ``kill-<date>.json`` in ``folder``; returns the line to print."""
    from finetune import hardware

    file = folder / f"kill-{date.today().isoformat()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.loads(file.read_text()) if file.exists() else {"sweeps": {}}
    stored["environment"] = {**hardware.environment(hardware.detect()), "cores": os.cpu_count(), "threads": 1}
    stored["sweeps"][name] = {**sweep.counts(), "first_faults": sweep.faults[:20]}
    file.write_text(json.dumps(stored, indent=2) + "\n")
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in sweep.counts().items())
