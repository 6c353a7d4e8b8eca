"""Rounds of a benchmark: contestants take turns on the same rows, each with new caches; ratios are within a round."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import made_rows
from benchmarks.contestants.rows import ROOT, Worker

BASE = "data/bases/smollm2-135m-instruct"
WINDOW = 1024
"""TRL's own default of the longest sample."""
SEED = 20_261
OURS, OWN, PEERS = "finetune", "rows_ours", "rows_peers"
"""The first contestant of a section, its module, and that of most others."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """``module`` runs it, in a process that it shares with the others of that module; ``call`` is what it is asked."""

    name: str
    module: str
    task: str
    call: dict[str, Any]


class Bench:
    """The made rows, the workers, and the rounds. ``many``: rows of the one large check."""

    def __init__(self, count: int, rounds: int, many: int, folder: Path) -> None:
        self.count, self.turns, self.many, self.folder = count, rounds, many, folder
        self.file = folder / "rows.jsonl"
        self.made = made_rows.make(self.file, count, SEED)
        self.workers = {name: Worker(name, folder / f"{name}.log") for name in (OWN, PEERS)}
        if find_spec("datasketch"):
            self.workers["rows_datasketch"] = Worker("rows_datasketch", folder / "rows_datasketch.log")
        self._caches = 0
        for name in (OWN, PEERS):
            self.workers[name].ask("warm", {"base": str(ROOT / BASE)})

    def close(self) -> None:
        for worker in self.workers.values():
            worker.__exit__(None, None, None)

    def cache(self) -> Path:
        self._caches += 1
        made = self.folder / f"cache-{self._caches}"
        made.mkdir()
        return made

    def ask(self, one: Contestant, file: Path, cache: Path, **options: Any) -> dict[str, Any]:
        call = {"file": str(file), "folder": str(cache), "base": str(ROOT / BASE), "window": WINDOW, **one.call}
        call["options"] = {**one.call.get("options", {}), **options}
        return self.workers[one.module].ask(one.task, call)

    def rounds(self, what: str, contestants: Sequence[Contestant], *, again: bool = False) -> list[dict[str, Any]]:
        """Every contestant in turn, each round from another one on; ``again``: a second time with the caches filled."""
        found: list[dict[str, Any]] = []
        for number in range(self.turns):
            found.append({})
            at = number % len(contestants)
            for one in (*contestants[at:], *contestants[:at]):
                cache = self.cache()
                result = self.ask(one, self.file, cache)
                if again:
                    result["again"] = self.ask(one, self.file, cache)["seconds"]
                shutil.rmtree(cache)
                found[-1][one.name] = result
                said = f"{self.count / result['seconds']:9.0f} rows/s"
                print(f"{what}  round {number + 1}/{self.turns}  {one.name:44} {said}", flush=True)
        return found


def summed(rounds: list[dict[str, Any]], *, first: str = OURS, again: bool = False) -> dict[str, Any]:
    """The rounds, and how many times the time of ``first`` each other one took: median and range over the rounds."""
    ratios = {}
    for name in rounds[0]:
        ratios[name] = {
            key: _spread([one[name][key] / one[first][key] for one in rounds])
            for key in ("seconds", "cpu_seconds", *(["again"] if again else []))
        }
    return {"rounds": rounds, "first": first, "ratios": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}
