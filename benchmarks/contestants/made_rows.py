"""Chat rows for the data benchmark, made of the texts that come with Python: the same ones on every machine with it."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

WORDS, SPREAD, SHORTEST, LONGEST = 120, 0.8, 8, 3000
"""A row's words: the median and the sigma of a lognormal distribution, and its bounds."""
SERIAL = "@serial@"
CHANGED = 0.03
"""Share of the words that a planted copy has other than its original."""


def make(path: Path, count: int, seed: int) -> dict[str, Any]:
    """Write ``count`` rows of OpenAI messages. → what they are"""
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
    """A long message with a few other words; a short one as it stands."""
    words = re.findall(r"\S+|\s+", message["content"])
    spots = [at for at, word in enumerate(words) if word.strip()]
    for at in chance.sample(spots, max(1, round(CHANGED * len(spots)))) if len(spots) > 30 else ():
        words[at] = f"w{chance.randrange(10**6)}"
    return {**message, "content": "".join(words)}


def shingles(text: str) -> set[str]:
    """The runs of five characters, white space and case aside."""
    folded = " ".join(text.casefold().split())
    return {folded[at : at + 5] for at in range(max(1, len(folded) - 4))}


def whole(row: Mapping[str, Any]) -> str:
    """What a row says but for its system prompt."""
    return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")


def judge(file: Path, planted: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many planted pairs were found, and how similar the other ones that were found really are."""
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    named = {tuple(sorted(pair)) for pair in found}
    wanted = {tuple(sorted(pair)) for pair in planted}
    others = [_jaccard(rows[one], rows[other]) for one, other in sorted(named - wanted)]
    real = sorted(_jaccard(rows[one], rows[other]) for one, other in sorted(wanted))
    return {
        "planted": len(wanted), "planted_found": len(named & wanted),
        "planted_jaccard": {"min": real[0], "median": real[len(real) // 2]},
        "others": len(others), "others_below_0.8": sum(one < 0.8 for one in others),
        "others_below_0.6": sum(one < 0.6 for one in others),
    }  # fmt: skip


def _jaccard(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    first, second = shingles(whole(one)), shingles(whole(other))
    return len(first & second) / len(first | second)
