"""Made chat rows for the data benchmark, and the process that a contestant works in. Imports nothing of `finetune`.

A contestant's process is started once, imports what it needs, and is then asked for one task at a time, so that the
contestants can take turns within seconds. Only the task is timed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

WORDS, SPREAD, SHORTEST, LONGEST = 120, 0.8, 8, 3000
"""A row's words: the median and the sigma of a lognormal distribution, and its bounds."""
SERIAL = "@serial@"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One task. ``folder`` is for the caches: a new one makes the call a cold one, a used one a warm one."""

    file: str = ""
    folder: str = ""
    base: str = ""
    window: int = 0
    processes: int | None = None
    lengths: str = ""
    options: dict[str, Any] = field(default_factory=dict)


Told = Callable[[], dict[str, Any]]
"""What a task found, worked out after the clock has stopped."""
Task = Callable[[Call], Told]


def serve(tasks: Mapping[str, Task]) -> None:
    """Answer each line of the standard input with one line; whatever libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        gc.collect()
        wall, busy = time.perf_counter(), _busy()
        told = tasks[asked["task"]](Call(**asked["call"]))
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": _busy() - busy}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(spent | {"peak_memory": peak, "found": told()}) + "\n")
        answers.flush()


def _busy() -> float:
    """Processor seconds of this process and of those that it started and has seen the end of."""
    own, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime


def digest(ids: Sequence[int], trained: Sequence[bool], stop: int) -> str:
    """A sample's digest, whether or not the frame behind an answer's stop token is there, or in the loss."""
    after = {place + 1 for place, token in enumerate(ids) if token == stop}
    marks = [bool(mark) and place not in after for place, mark in enumerate(trained)]
    end = max(after, default=len(ids))
    text = json.dumps([list(ids[:end]), marks[:end]])
    return blake2b(text.encode(), digest_size=8).hexdigest()


def make(path: Path, count: int, seed: int) -> dict[str, Any]:
    """Write ``count`` rows of OpenAI messages; the same ones on every machine with the same Python. → what they are"""
    chance = random.Random(seed)
    pieces = passages()
    rows = [_row(chance, pieces) for _ in range(count)]
    write(path, rows)
    words = sorted(sum(len(message["content"].split()) for message in row["messages"]) for row in rows)
    return {
        "rows": count, "bytes": path.stat().st_size, "median_words": words[count // 2], "longest_words": words[-1],
        "several_exchanges": sum(len(row["messages"]) > 3 for row in rows) / count, "seed": seed,
    }  # fmt: skip


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def multiply(source: Path, path: Path, count: int) -> int:
    """A file of ``count`` rows that are all different, from one of fewer. → its bytes"""
    marked = [line.replace('"content": "', f'"content": "{SERIAL} ', 1) for line in source.open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(marked[number % len(marked)].replace(SERIAL, str(number), 1))
    return path.stat().st_size


def passages() -> list[str]:
    """Paragraphs of the texts that come with Python: its reference, and its modules' own documentation."""
    texts = list(topics.values())
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts += re.findall(r'"""(.*?)"""', file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = [part.strip() for text in texts for part in re.split(r"\n\s*\n", text)]
    # A word between such brackets may be a control token of the model, which no row may hold.
    return [part for part in found if 6 <= len(part.split()) <= 120 and not re.search(r"<[\w|]+>", part)]


def _row(chance: random.Random, pieces: Sequence[str]) -> dict[str, Any]:
    words = min(LONGEST, max(SHORTEST, round(chance.lognormvariate(0, SPREAD) * WORDS)))
    exchanges = chance.choices((1, 2, 3, 4), (75, 15, 7, 3))[0]
    messages = [{"role": "system", "content": _text(chance, pieces, 12)}] if chance.random() < 0.2 else []
    for _ in range(exchanges):
        asked = max(3, round(words / exchanges * chance.uniform(0.1, 0.5)))
        messages.append({"role": "user", "content": _text(chance, pieces, asked)})
        answered = max(4, round(words / exchanges) - asked)
        messages.append({"role": "assistant", "content": _text(chance, pieces, answered)})
    return {"messages": messages}


def _text(chance: random.Random, pieces: Sequence[str], words: int) -> str:
    """So many words of passages drawn anew, with their own white space."""
    parts: list[str] = []
    left = words
    while left > 0:
        taken = re.match(rf"(?:\S+\s*){{1,{left}}}", chance.choice(pieces))
        assert taken is not None
        parts.append(taken[0].strip())
        left -= len(parts[-1].split())
    return "\n\n".join(parts)


def plant(source: Path, path: Path, share: float, seed: int) -> list[tuple[int, int]]:
    """The same rows and, strewn among them, copies of some with a few words changed. → (original, copy), from 0"""
    chance = random.Random(seed)
    rows = [json.loads(line) for line in source.open(encoding="utf-8")]
    long = [number for number, row in enumerate(rows) if sum(len(m["content"].split()) for m in row["messages"]) >= 80]
    pairs = []
    for number in chance.sample(long, round(share * len(rows))):
        pairs.append((number, len(rows)))
        rows.append({"messages": [_changed(message, chance) for message in rows[number]["messages"]]})
    order = list(range(len(rows)))
    chance.shuffle(order)
    place = {number: at for at, number in enumerate(order)}
    write(path, [rows[number] for number in order])
    return [(place[one], place[other]) for one, other in pairs]


def _changed(message: Mapping[str, str], chance: random.Random) -> dict[str, str]:
    """Every hundredth word another one, at least one: each touches as many shingles as a shingle has words."""
    words = list(_split(message["content"]))
    spots = [at for at, word in enumerate(words) if word.strip()]
    for at in chance.sample(spots, max(1, len(spots) // 100)) if len(spots) > 30 else ():
        words[at] = f"w{chance.randrange(10**6)}"
    return {**message, "content": "".join(words)}


def _split(text: str) -> Iterator[str]:
    yield from re.findall(r"\S+|\s+", text)
