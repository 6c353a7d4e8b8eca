"""Contestants of the step benchmark side by side: each a process that has loaded its model, and takes one step in turn.

Neighbours on a shared machine slow everybody down at once; a step of one beside the same step of another, seconds
apart, is what can be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants.job import Job
from finetune import hardware

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-bench" / "bin" / "python"
"""The peers' own environment: see ``make bench``."""
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads ruin every timing on a shared machine; `finetune` sets it itself
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
PLACES = ("ours", "reference")
"""Contestants that run in the project's own environment; all others run in the peers'."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant. ``title``: what it is; ``module`` and ``arguments``: how it is run; ``levers``: switched off."""

    title: str
    module: str
    arguments: tuple[str, ...] = ()
    levers: tuple[str, ...] = ()


class Running:
    """A contestant's process, waiting before its next step.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """

    def __init__(self, name: str, entry: Entry, job: Job, folder: Path, huge_pages: bool = False) -> None:
        self.name, self.result, self.log = name, folder / f"{name}.json", folder / f"{name}.log"
        handed = folder / f"{name}-job.json"
        replace(job, result=str(self.result), levers=list(entry.levers)).write(handed)
        python = sys.executable if entry.module in PLACES else str(PEERS)
        own = hardware.LIBRARIES if entry.module in PLACES else {}  # as the command sets them
        pages = {"THP_MEM_ALLOC_ENABLE": "1"} if huge_pages else {}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.contestants.{entry.module}", str(handed), *entry.arguments],
                cwd=ROOT, env=os.environ | ENVIRONMENT | own | pages, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip

    def ready(self) -> None:
        """Wait until it stands before its first step."""
        self._answer()

    def step(self) -> float:
        """Let it take one step; its wall seconds."""
        self._go()
        return float(self._answer()["seconds"])

    def finish(self) -> dict[str, Any]:
        """Its result, once all its steps are taken."""
        self._go()
        self._process.wait()
        if self._process.returncode or not self.result.exists():
            self._failed()
        found: dict[str, Any] = json.loads(self.result.read_text())
        return found

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self) -> None:
        raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-4000:]}")


def alone(name: str, entry: Entry, job: Job, folder: Path, huge_pages: bool = False) -> dict[str, Any]:
    """One contestant from its first step to its last."""
    running = Running(name, entry, replace(job, turns=False), folder, huge_pages)
    return running.finish()


def compete(entries: Mapping[str, Entry], job: Job, huge_pages: bool, told: str) -> dict[str, dict[str, Any]]:
    """Every contestant's result; each step is taken by all of them in turn, from another one on each time."""
    with tempfile.TemporaryDirectory() as scratch:
        running: list[Running] = []
        try:
            for name, entry in entries.items():
                running.append(Running(name, entry, replace(job, turns=True), Path(scratch), huge_pages))
            for one in running:
                one.ready()
            for number in range(len(job.steps)):
                at = number % len(running)
                spent = {one.name: one.step() for one in (*running[at:], *running[:at])}
                said = "  ".join(f"{name} {spent[name]:.2f} s" for name in entries)
                print(f"{told}  step {number + 1}/{len(job.steps)}  {said}", flush=True)
            found = {one.name: one.finish() for one in running}
            return {name: one | {"tokens_per_second": speeds(one, job)} for name, one in found.items()}
        finally:
            for one in running:
                one.stop()


def peer_versions() -> dict[str, str]:
    """What the peers' environment has beside the packages that both share."""
    asked = "import importlib.metadata as m; print(m.version('trl'), m.version('torch'), m.version('transformers'))"
    done = subprocess.run([PEERS, "-c", asked], capture_output=True, text=True, check=True)
    return dict(zip(("trl", "torch of the peers", "transformers of the peers"), done.stdout.split(), strict=True))


def speeds(found: Mapping[str, Any], job: Job) -> list[float]:
    """Real tokens per second of each timed step."""
    own = [sum(len(sample["ids"]) for sample in step) for step in job.steps]
    tokens = found["tokens"] or own
    return [count / spent for count, spent in zip(tokens, found["seconds"], strict=True)][job.skip :]


def ratios(results: Mapping[str, dict[str, Any]], job: Job, ours: str) -> dict[str, Any]:
    """ours / each other one: speed step by step (more is better) and peak memory (less is better)."""
    found = {}
    for name, one in results.items():
        pairs = [a / b for a, b in zip(speeds(results[ours], job), speeds(one, job), strict=True)]
        busy = [sum(result["cpu_seconds"][job.skip :]) for result in (results[ours], one)]
        found[name] = {
            "speed": {"min": min(pairs), "median": median(pairs), "max": max(pairs)},
            "memory": results[ours]["peak_memory"] / one["peak_memory"], "processor_time": busy[0] / busy[1],
        }  # fmt: skip
        if not one["tokens"]:
            gaps = [abs(a - b) for a, b in zip(results[ours]["losses"], one["losses"], strict=True)]
            found[name]["loss_difference"] = max(gaps)
    return found
