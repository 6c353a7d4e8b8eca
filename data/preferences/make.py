"""Make preference pairs of the dates task: the right ISO date is chosen, a date that is nearly right is rejected.

    python data/preferences/make.py         # writes the data files, LICENSE and digests.json beside this file

The rows come from data/dates. What is wrong in a rejected date goes by a digest of the row, so that the same rows give
the same bytes. The labelled rows are one answer of each pair, by the same digest the right one or the wrong one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATES = HERE.parent / "dates"
ROWS = {"train": 1200, "eval": 200}


def swapped(day: date) -> str:
    """Day and month the wrong way round, the mistake that people make too."""
    return f"{day.year:04d}-{day.day:02d}-{day.month:02d}"


def neighbour(day: date) -> str:
    return (day + timedelta(days=1)).isoformat()


def other_month(day: date) -> str:
    return f"{day.year:04d}-{day.month % 12 + 1:02d}-{day.day:02d}"


def other_year(day: date) -> str:
    return f"{day.year + 1:04d}-{day.month:02d}-{day.day:02d}"


MISTAKES: tuple[Callable[[date], str], ...] = (swapped, neighbour, other_month, other_year)


def rows(line: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of the dates task as a pair, and one answer of that pair with its label."""
    *asked, answer = json.loads(line)["messages"]
    right = answer["content"]
    turn = int(hashlib.sha256(line.encode()).hexdigest()[:8], 16)
    wrong = MISTAKES[turn % len(MISTAKES)](date.fromisoformat(right))
    if wrong == right:  # the fifth of May
        wrong = neighbour(date.fromisoformat(right))
    wanted = turn // len(MISTAKES) % 2 == 0
    labelled = {"prompt": asked, "completion": right if wanted else wrong, "label": wanted}
    return {"prompt": asked, "chosen": right, "rejected": wrong}, labelled


def make(folder: Path) -> dict[str, int]:
    """Write the files into ``folder``; how many rows each data file has."""
    digests = {}
    for split, count in ROWS.items():
        lines = (DATES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        pairs, labels = zip(*map(rows, lines), strict=True)
        for name, made in ((f"{split}.jsonl", pairs), (f"{split}-labels.jsonl", labels)):
            content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in made).encode()
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
    shutil.copyfile(DATES / "LICENSE", folder / "LICENSE")
    digests["LICENSE"] = hashlib.sha256((folder / "LICENSE").read_bytes()).hexdigest()
    (folder / "digests.json").write_text(json.dumps({"sha256": digests}, indent=2) + "\n")
    return ROWS


if __name__ == "__main__":
    print(make(HERE))
