"""Rows that were met before: exactly, but for white space and case, or nearly; in a source or among trained rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from finetune import dataset, similar
from finetune.conversation import Conversation, RowFault
from finetune.dataset import Read
from finetune.similar import Pair, Similar

_BATCH = 512
"""Rows that wait for the search for near copies: it takes many at once."""

Found = tuple[Read, RowFault]


class Met:
    """Rows that were met, in some 150 bytes each, and 350 more where near copies are looked for."""

    def __init__(self, *, near: bool) -> None:
        self._folded: dict[bytes, int] = {}
        self._exact = array("Q")
        self._sources: list[tuple[int, str]] = []
        self.near = Similar() if near else None

    def begin(self, source: str) -> None:
        """The rows to come are this source's."""
        self._sources.append((len(self._exact), source))

    def add(self, folded: bytes, exact: int) -> int:
        """Remember a row; → its number among all."""
        self._folded.setdefault(folded, len(self._exact))
        self._exact.append(exact)
        return len(self._exact) - 1

    def skip(self) -> None:
        """A row that says nothing: its number is taken all the same."""
        self._exact.append(0)

    def find(self, folded: bytes, exact: int) -> tuple[str, bool] | None:
        """The first row that says this, by its place, and whether it does so exactly."""
        at = self._folded.get(folded)
        return None if at is None else (self.place(at), self._exact[at] == exact)

    def place(self, number: int) -> str:
        first, source = next(one for one in reversed(self._sources) if one[0] <= number)
        return f"{number - first + 1} of {source}"


class Repeats:
    """Looks each row of a source up among those met, and among those that are trained."""

    def __init__(self, met: Met, trained: Met | None) -> None:
        self._met, self._trained = met, trained
        self._waiting: list[tuple[Read, int, Pair]] = []

    def look(self, read: Read, conversation: Conversation) -> Iterator[Found]:
        """What a row repeats. Near copies of it, and of rows before it, may come with a later row or from ``rest``."""
        folded, exact = dataset.folded(conversation), exact_digest(conversation)
        known = False
        if again := self._met.find(folded, exact):
            known = True
            place, same = again
            what = f"is row {place} again" + ("" if same else " but for white space and case")
            yield read, RowFault("", what, "drop one", code="duplicate" if same else "near_duplicate")
        if self._trained and (again := self._trained.find(folded, exact)):
            known = True
            place, same = again
            yield read, _leak(f"is training row {place}" + (" too" if same else " but for white space and case"))
        number = self._met.add(folded, exact)
        if self._met.near is not None and not known:
            self._waiting.append((read, number, similar.parts(conversation)))
            if len(self._waiting) == _BATCH:
                yield from self.rest()

    def rest(self) -> Iterator[Found]:
        """The near copies among the rows that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self._met.near is None:
            return
        pairs = [pair for _, _, pair in waiting]
        copies = self._met.near.add_many([number for _, number, _ in waiting], pairs)
        leaks = self._leaks(pairs)
        for (read, _, _), copy, leak in zip(waiting, copies, leaks, strict=True):
            if copy is not None:
                what = f"says nearly what row {self._met.place(copy)} says"
                yield read, RowFault("", what, "see whether both are wanted", code="near_duplicate")
            if leak is not None:
                yield read, _leak(f"says nearly what training row {leak} says")

    def _leaks(self, pairs: Sequence[Pair]) -> list[str | None]:
        if self._trained is None or self._trained.near is None:
            return [None] * len(pairs)
        found = self._trained.near.find_many(pairs)
        return [None if number is None else self._trained.place(number) for number in found]


def _leak(what: str) -> RowFault:
    return RowFault("", f"{what}: a score on it flatters", "hold it out", code="leak")


def exact_digest(conversation: Conversation) -> int:
    """A digest of what a row says, to the character."""
    text = "\1".join(f"{turn.role}\0{turn.says()}" for turn in conversation.every_turn())
    whole = f"{text}{conversation.described()}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "little")
