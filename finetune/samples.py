"""Samples mapped from disk: one source's as they were stored, and a run's as one sequence."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.dataset import Example, Source
from finetune.runfolder import read_json
from finetune.schedule import Part
from finetune.window import Named

if TYPE_CHECKING:
    import numpy as np

COLUMNS = {
    "ids": "i", "marks": "B", "ends": "q", "supervised": "q", "halves": "q", "labels": "b", "rows": "q", "places": "B",
    "place_ends": "q", "folded": "Q",
}  # fmt: skip
"""File → its number format: ids and weights' numbers per token; ends, counts, a chosen text's tokens, labels (or -1),
rows and places per sample; a digest per row."""


@dataclass(frozen=True)
class Stored:
    """One source's samples. ``lengths``, ``supervised``, ``rows``: one number a sample; ``folded``: one a row."""

    source: Source
    folder: Path
    meta: dict[str, Any]
    columns: dict[str, np.ndarray[Any, Any]]

    @property
    def mapping(self) -> str:
        """What became of the columns, in words."""
        return str(self.meta["mapping"])

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.diff(self.columns["ends"], prepend=0)

    def named(self) -> list[Named]:
        """Rows that were not taken as they stand."""
        lines = (self.folder / "named.jsonl").read_text(encoding="utf-8").splitlines()
        return [Named(**json.loads(line)) for line in lines]

    def example(self, index: int) -> Example:
        tokens, place = self._span("ends", index), self._span("place_ends", index)
        weights, label = self.meta["weights"], int(self.columns["labels"][index])
        return Example(
            ids=tuple(self.columns["ids"][tokens].tolist()),
            weights=tuple(weights[mark] for mark in self.columns["marks"][tokens]),
            where=self.columns["places"][place].tobytes().decode("utf-8", "surrogateescape"),
            half=int(self.columns["halves"][index]), label=None if label < 0 else bool(label),
        )  # fmt: skip

    def _span(self, name: str, index: int) -> slice:
        ends = self.columns[name]
        return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


class Samples(Sequence[Example]):
    """The chosen samples of several stores, one after the other, read from disk when they are asked for."""

    def __init__(self, parts: Sequence[tuple[Stored, np.ndarray[Any, Any]]]) -> None:
        import numpy as np

        self.parts = tuple(parts)
        self.lengths = np.concatenate([stored.lengths[chosen] for stored, chosen in parts])
        self.supervised = np.concatenate([stored.columns["supervised"][chosen] for stored, chosen in parts])
        self._starts = np.cumsum([0, *(len(chosen) for _, chosen in parts)])

    def part_list(self) -> list[Part]:
        """Whose samples these are, in order."""
        return [Part(name=one.source.path, samples=len(chosen), share=one.source.share) for one, chosen in self.parts]

    def added_tokens(self) -> set[int]:
        """Which of the tokenizer's added tokens occur."""
        return {token for stored, _ in self.parts for token in stored.meta["added_tokens"]}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        import numpy as np

        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        stored, chosen = self.parts[part]
        return stored.example(int(chosen[index - self._starts[part]]))


def load(folder: Path, source: Source) -> Stored:
    """The store in that folder, mapped."""
    import numpy as np

    os.utime(folder)  # used now: pruning takes the longest unused
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for name, form in COLUMNS.items():
        path, kind = folder / name, np.dtype(form)
        columns[name] = np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, dtype=kind)
    return Stored(source=source, folder=folder, meta=read_json(folder / "meta.json"), columns=columns)
