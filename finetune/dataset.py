"""Sources → rows: where data lies, which format its rows have, and each row as a conversation or as what is wrong.

A source is a file, a folder, or a data set's id on the hub. Every row is kept whole or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from finetune import datafolder, formats, hubdata, records, rowcheck
from finetune.conversation import Conversation, RowFault, shown
from finetune.errors import DataError, Fault
from finetune.recipe import paths
from finetune.records import Record

_MOST_FAULTS = 50


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample: token ids, each one's weight in the loss (0: context), and its place (``file:row``).

    ``apart``: its text in one piece would have other ids. ``half``: of a preference pair, how many tokens its chosen
    text has; the rejected one stands behind it, prompt and all. ``label``: whether a judged answer is wanted.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    where: str
    apart: bool = False
    half: int = 0
    label: bool | None = None

    def halves(self) -> tuple[Example, ...]:
        """The chosen and the rejected text of a pair as samples of their own; any other sample as it is."""
        if not self.half:
            return (self,)
        parts = slice(None, self.half), slice(self.half, None)
        return tuple(replace(self, ids=self.ids[part], weights=self.weights[part], half=0) for part in parts)

    @property
    def supervised(self) -> tuple[bool, ...]:
        """Which tokens are in the loss."""
        return tuple(weight > 0 for weight in self.weights)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out row as it is asked: the prompt's ids, and the answer that is right.

    ``content``: a digest of what the row says. Where it is equal two runs were asked the same, of whatever tokenizer.
    ``asked``: role and content of the turns before the answer. ``options``: answers to choose from, each as a sample
    whose answer alone is supervised; ``right`` is the place of the right one among them.
    """

    prompt: tuple[int, ...]
    answer: str
    where: str
    content: str = ""
    asked: tuple[tuple[str, str], ...] = ()
    options: tuple[Example, ...] = ()
    right: int = -1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source: its conversation and its place; ``kept``: what one more of its columns holds."""

    conversation: Conversation
    where: str
    kept: Any = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from. ``columns``: a format's own column name → the one that the source uses for it.

    ``revision`` is the commit of a data set on the hub; ``share`` of the tokens that this source is to give.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    share: float | None = None

    @property
    def on_hub(self) -> bool:
        return not Path(self.path).exists() and paths.is_data_id(self.path)

    def files(self) -> list[Path]:
        """The files that hold its rows; none for a data set on the hub. Raises DataError."""
        path = Path(self.path)
        if not path.is_dir():
            if path.exists() and not path.is_file():  # a pipe would wait for ever
                raise DataError("this is not a regular file", self.path, "name a file")
            return [] if self.on_hub else [path]
        if datafolder.stored(path):
            return sorted(file for file in path.rglob("*") if file.is_file())
        return datafolder.files(path, self.split)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Every record with its place, ``file:line`` or ``name:row``. Raises DataError."""
        path = Path(self.path)
        if self.on_hub or (path.is_dir() and datafolder.stored(path)):
            rows = (
                hubdata.stream(self.path, self.split, self.revision, self.subset)
                if self.on_hub
                else datafolder.rows(path, self.split)
            )
            for number, value in enumerate(rows, 1):
                yield f"{self.path}:{number}", Record(number=number, place=number, value=value)
            return
        before = 0
        files = self.files()
        for index, file in enumerate(files):
            number = 0
            for record in records.read(file):
                number = record.number
                if len(files) > 1:
                    record = replace(record, number=before + number, done=(index + record.done) / len(files))
                yield f"{file}:{record.place}", record
            before += number


@dataclass(frozen=True, kw_only=True)
class Read:
    """One row as it was read: its number from 1, its place, and its conversation or what is wrong with it.

    ``done``: the share of the source that was read, 0 where that is not known. ``columns``: all that the row holds.
    """

    number: int
    where: str
    found: Conversation | RowFault
    done: float
    columns: Mapping[str, Any] = field(default_factory=dict)


class Reader:
    """Iterates over a source's rows; the format found in the first one holds for all, ``mapping`` says what it reads.

    ``special_tokens``: texts that no content may hold (turn injection), but for the ``literals``. Raises DataError
    where the source itself cannot be read.
    """

    def __init__(self, source: Source, special_tokens: Sequence[str] = (), literals: Sequence[str] = ()) -> None:
        self.source, self.special_tokens, self.literals = source, tuple(special_tokens), tuple(literals)
        self.mapping = ""
        self.format: formats.Format | None = None

    def __iter__(self) -> Iterator[Read]:
        for where, record in self.source.records():
            found: Conversation | RowFault
            try:
                found = self.conversation(record)
            except RowFault as fault:
                found = fault
            columns = record.value or {}
            yield Read(number=record.number, where=where, found=found, done=record.done, columns=columns)

    def renamed(self, row: dict[str, object]) -> dict[str, object]:
        """The row with its columns called as the format calls them."""
        if not self.source.columns:
            return row
        theirs = self.source.columns.values()
        kept = {name: value for name, value in row.items() if name not in theirs}
        for ours, name in self.source.columns.items():
            if name not in row:
                what = f"is missing (found {', '.join(map(shown, row)) or 'none'})"
                raise RowFault(name, what, "see data.columns", code="missing_column")
            kept[ours] = row[name]
        return kept

    def conversation(self, record: Record) -> Conversation:
        """What a record says. The first one that has a format decides it for all. Raises RowFault."""
        if record.value is None:
            assert record.fault is not None
            raise record.fault
        row = self.renamed(record.value)
        if self.format is None:
            name = formats.detect(row) if self.source.format == "auto" else self.source.format
            self.format = formats.get(name)
            self.mapping = formats.mapping(name, row)
        read = self.format.read(row)
        rowcheck.check(read, self.special_tokens, self.literals)
        return read


def read_rows(reader: Reader, wanted: Iterable[int] | None = None, keep: str | None = None) -> list[Row]:
    """A source's rows in memory, those of the ``wanted`` numbers or all; with what their column ``keep`` holds.

    Raises:
        DataError: every row that cannot be used, by its place.
    """
    numbers = None if wanted is None else set(wanted)
    rows: list[Row] = []
    faults = Faults(reader.source.path)
    for read in reader:
        if isinstance(read.found, RowFault):
            faults.add(read.where, read.found)
        elif numbers is None or read.number in numbers:
            kept = read.columns.get(keep) if keep is not None else None
            rows.append(Row(conversation=read.found, where=read.where, kept=kept))
        faults.rows += 1
    faults.raise_if_any()
    return rows


class Faults:
    """Faults of many rows, bounded: the first ones as they are, and how many more there were."""

    def __init__(self, place: str) -> None:
        self.place, self.rows, self.more = place, 0, 0
        self.first: list[Fault] = []

    def add(self, where: str, fault: RowFault) -> None:
        self.put(Fault(f"{fault.column}: {fault.what}" if fault.column else fault.what, where, fault.fix))

    def put(self, fault: Fault) -> None:
        if len(self.first) < _MOST_FAULTS:
            self.first.append(fault)
        else:
            self.more += 1

    def raise_if_any(self) -> None:
        """Raises DataError with what was added, or where there was no row at all."""
        if not self.rows and not self.first:
            self.put(Fault("there are no rows in this file", self.place, "give a file with at least one row"))
        if self.first:
            more = [Fault(f"and {self.more} more rows like these")] if self.more else []
            raise DataError.of([*self.first, *more])


def draw(rows: int, fraction: float, seed: int, place: str) -> set[int]:
    """The numbers, from 1, of the rows that are held out: a fixed share, drawn by the seed. Raises DataError."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    held = {index + 1 for index in order[: max(1, round(fraction * rows))]}
    if len(held) == rows:
        raise DataError(f"{rows} rows leave nothing to train on", place, "lower data.eval_fraction")
    return held


def folded(found: Conversation) -> bytes:
    """A digest of what a row says, white space and case aside. → 8 bytes"""
    text = "\1".join(f"{turn.role}\0{' '.join(turn.says().split()).casefold()}" for turn in found.every_turn())
    return blake2b(f"{text}{found.described()}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def content(found: Conversation) -> str:
    """A digest of what a row says, to the character: the same row is known again in another file."""
    text = "\1".join(f"{turn.role}\0{turn.says()}" for turn in found.turns) + found.described()
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


Progress = Callable[[str, int, float], None]
"""Told the source, the rows read so far, and the share of it that they are (0 where that is not known)."""


def silent(source: str, rows: int, done: float) -> None:
    """A progress that says nothing."""
