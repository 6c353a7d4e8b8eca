"""Rows that say nearly the same: copies with a few words changed, which a digest does not see.

A row has two parts, what is asked and what is answered, and both must be near: a template filled with other values and
answered otherwise is no copy. A part is the set of its runs of five characters, white space and case aside, so a short
question and a long page, with or without blanks between words, are measured alike. MinHash keeps 72 bytes of each part:
two of them agree in about as many places as the Jaccard similarity of the two sets (Broder, "On the resemblance and
containment of documents", 1997). Rows are candidates where six bytes agree, three of each part.

Memory holds 300 to 350 bytes a row, whatever its length. Same rows in, same answers out: the seed is fixed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.conversation import TEXT, Conversation, Turn
from finetune.errors import EnvironmentFault

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Numbers = NDArray[np.int64]

THRESHOLD = 0.8
"""Least estimated Jaccard similarity of a near copy, over both parts. All rows with 3 other words of 100 reach it, of
those with 6 about half do, of those with 10 hardly any."""
FLOOR = 0.75
"""… and least of each part, so that a long question does not hide another answer."""
_RUN, _SEED = 5, 20_240
"""Characters of a run. Runs begin in the blanks before a part and end in those after it, so short parts have some."""
_BANDS, _BYTES = 24, 6
"""24 chances to be a candidate: 99.9 % of pairs at the threshold are one, and a few of a million unrelated pairs."""
_HALF = _BANDS * _BYTES // 2
_SHAPE = (2, _BANDS, _BYTES // 2)
_STEPS = 8
"""Earlier rows tried for each band: in a file of one template very many share a band, and any of them will do."""
_FIRST_CAPACITY, _PORTION, _CHARACTERS = 4096, 512, 1 << 16
"""Rows there is room for at first; rows and characters worked on at once."""
_NONE = -1

Pair = tuple[str, str]
"""What is asked and what is answered; a text that is only one of them stands in both places."""


def available() -> bool:
    """Whether the package that this needs is installed."""
    return find_spec("rensa") is not None


def parts(conversation: Conversation) -> Pair:
    """What a row asks and what it answers. A system prompt counts only where nothing else is asked."""
    *before, last = conversation.turns
    answer = "\n".join(_said(turn) for turn in (last, *conversation.rejected[-1:]))
    if last.role == TEXT:
        return answer, answer
    asked = [turn for turn in before if turn.role != "system"] or before
    return "\n".join(map(_said, asked)) or answer, answer


def _said(turn: Turn) -> str:
    calls = (f"{call.name} {json.dumps(call.arguments, default=str, sort_keys=True)}" for call in turn.calls)
    return "\n".join(filter(None, (turn.thinking, turn.content, *calls)))


class Similar:
    """Rows that were met, and which of them a new one nearly repeats.

    A batch of hundreds of rows costs far less than as many calls.

    Raises:
        EnvironmentFault: the package rensa is missing.
    """

    def __init__(self) -> None:
        if not available():
            what, fix = "the package rensa is not installed", 'pip install "finetune-qwen[data]"'
            raise EnvironmentFault(what, where="the search for near copies", fix=fix)
        self._numbers = array("q")
        self._shelf = _Shelf()

    def __len__(self) -> int:
        return len(self._numbers)

    def add_many(self, numbers: Sequence[int], rows: Sequence[Pair]) -> list[int | None]:
        """For each row the number of the most similar earlier one that it nearly repeats; all are remembered."""
        self._numbers.extend(numbers)
        found: list[int | None] = []
        for part in _portions(rows):
            found += self._named(self._shelf.add(_signatures(part)))
        return found

    def find_many(self, rows: Sequence[Pair]) -> list[int | None]:
        """For each row the number of the remembered one that it nearly repeats; none is remembered."""
        found: list[int | None] = []
        for part in _portions(rows):
            found += self._named(self._shelf.find(_signatures(part)))
        return found

    def _named(self, places: Numbers) -> list[int | None]:
        return [None if place == _NONE else self._numbers[place] for place in places.tolist()]


def _portions(rows: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """The rows in portions that are worked on at once, so that memory does not grow with the batch."""
    start = size = 0
    for place, (asked, answered) in enumerate(rows):
        size += len(asked) + len(answered)
        if size > _CHARACTERS or place - start == _PORTION - 1:
            yield rows[start : place + 1]
            start, size = place + 1, 0
    if start < len(rows):
        yield rows[start:]


def _signatures(rows: Sequence[Pair]) -> Bytes:
    """What is kept of the rows. → [rows, 2, 24, 3]"""
    asked = answered = _Runs([_folded(row[0]) for row in rows])
    if any(row[0] is not row[1] for row in rows):
        answered = _Runs([_folded(row[1]) for row in rows])
    # Another seed for the second part: where both parts are one text, they are two looks at it.
    sketches = asked.sketch(_SEED), answered.sketch(_SEED + 1)
    return np.stack(sketches, axis=1).reshape(-1, *_SHAPE)


def _folded(text: str) -> str:
    """White space, case and a closing mark aside."""
    return " ".join(text.casefold().split()).rstrip(".!?…。！？")


class _Runs:
    """Hashes of the runs of characters of some texts, one text after the other."""

    def __init__(self, texts: Sequence[str]) -> None:
        blank = " " * (_RUN - 1)
        joined = blank + blank.join(texts) + blank
        points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
        runs = len(points) - len(blank)
        hashes = points[:runs].copy()
        for place in range(1, _RUN):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += points[place : runs + place]
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        # The blanks between two texts belong to both: a text has a run for each character and each blank before it.
        sizes = (len(text) + len(blank) for text in texts)
        self._hashes, self._ends = hashes, np.fromiter(accumulate(sizes, initial=0), np.uint64, len(texts) + 1)

    def sketch(self, seed: int) -> Bytes:
        """MinHash of each text, the top byte of each place. → [texts, 72]"""
        minhash: Any = import_module("rensa").RMinHash
        matrix = minhash.digest_matrix_from_flat_token_hashes(self._hashes, self._ends, _HALF, seed)
        mixed = np.array(matrix.to_rows(), dtype=np.uint32) * np.uint32(0x9E3779B1)
        return (mixed >> np.uint32(24)).astype(np.uint8)


class _Shelf:
    """Signatures by place, and for each band the chains of those that may agree in it, the latest first."""

    def __init__(self) -> None:
        self._count = 0
        self._make_room(_FIRST_CAPACITY)

    def add(self, signatures: Bytes) -> Numbers:
        """The place of the nearest earlier row for each, or -1; all take the next places. → [rows]"""
        first, self._count = self._count, self._count + len(signatures)
        if self._count > self._capacity:
            self._make_room(max(2 * self._capacity, self._count), kept=first)
        self._rows[first : self._count] = signatures
        self._chain(first, self._count)
        return self._nearest(signatures, self._before[first : self._count])

    def find(self, signatures: Bytes) -> Numbers:
        """The place of the nearest row for each, or -1. → [rows]"""
        slots = self._slots(signatures)
        return self._nearest(signatures, self._heads[slots])

    def _make_room(self, capacity: int, kept: int = 0) -> None:
        rows = np.empty((capacity, *_SHAPE), dtype=np.uint8)
        if kept:
            rows[:kept] = self._rows[:kept]
        self._rows: Bytes = rows
        self._capacity = capacity
        self._before = np.empty((capacity, _BANDS), dtype=np.int32)
        self._heads = np.full(_BANDS * (capacity // 2), _NONE, dtype=np.int32)
        for start in range(0, kept, _FIRST_CAPACITY):
            self._chain(start, min(start + _FIRST_CAPACITY, kept))

    def _slots(self, signatures: Bytes) -> Numbers:
        """Where the chain of each band starts. → [rows, 24]"""
        keys = np.zeros((len(signatures), _BANDS), dtype=np.uint64)
        for part, place in product(range(2), range(_BYTES // 2)):
            keys = keys * np.uint64(0x100000001B3) + signatures[:, part, :, place]
        keys *= np.uint64(0x9E3779B97F4A7C15)
        own = len(self._heads) // _BANDS
        return ((keys >> np.uint64(24)) % np.uint64(own)).astype(np.int64) + np.arange(_BANDS) * own

    def _chain(self, start: int, end: int) -> None:
        """Put the rows of these places, in their order, before those that were there."""
        slots = self._slots(self._rows[start:end]).ravel()
        order = np.argsort(slots, kind="stable")
        slots, (rows, bands) = slots[order], np.divmod(order, _BANDS)
        places = rows + start
        again = slots[1:] == slots[:-1]
        before = self._heads[slots]
        before[1:][again] = places[:-1][again]
        self._before[places, bands] = before
        latest = np.append(~again, True)
        self._heads[slots[latest]] = places[latest]

    def _nearest(self, signatures: Bytes, starts: NDArray[np.int32]) -> Numbers:
        """The most similar row on the chains that start there, the earliest of equals, or -1. → [rows]"""
        asking, bands = np.nonzero(starts != _NONE)
        places, pairs = starts[asking, bands].astype(np.int64), []
        for _ in range(_STEPS):
            same = (self._rows[places, :, bands] == signatures[asking, :, bands]).all(axis=(1, 2))
            pairs.append(asking[same] * self._count + places[same])
            places = self._before[places, bands].astype(np.int64)
            going = places != _NONE
            asking, bands, places = asking[going], bands[going], places[going]
        asking, places = np.divmod(np.unique(np.concatenate(pairs)), max(self._count, 1))
        agree = _agreements(self._rows[places], signatures[asking])
        total = agree.sum(axis=1)
        near = (total >= THRESHOLD * 2 * _HALF) & (agree.min(axis=1) >= FLOOR * _HALF)
        asking, places, total = asking[near], places[near], total[near]
        order = np.lexsort((places, -total, asking))
        rows, firsts = np.unique(asking[order], return_index=True)
        found = np.full(len(signatures), _NONE, dtype=np.int64)
        found[rows] = places[order][firsts]
        return found


def _agreements(one: Bytes, other: Bytes) -> Numbers:
    """In how many of its bytes each part agrees. → [rows, 2]"""
    # Eight bytes at once: nine words of noughts and ones are added, then the bytes of the sum by a multiplication.
    words: NDArray[np.uint64] = (one == other).reshape(-1, 2, _HALF).view(np.uint64).sum(axis=2)
    words *= np.uint64(0x0101010101010101)
    return (words >> np.uint64(56)).astype(np.int64)
