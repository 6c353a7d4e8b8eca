"""Sources → examples: read rows, understand their format, let the renderer make ids of them, hold rows out.

Every row is kept whole or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import conversation, formats, records
from finetune.errors import DataError, Fault
from finetune.records import Record

if TYPE_CHECKING:
    from finetune.conversation import Conversation

_MOST_FAULTS = 50


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample: token ids, which of them are supervised, and where it came from (``file:row``)."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    where: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out row as it is asked: the prompt's ids, and the answer that is right."""

    prompt: tuple[int, ...]
    answer: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source: its conversation and its place."""

    conversation: Conversation
    where: str


def read_rows(path: Path, format_name: str = "auto", special_tokens: Sequence[str] = ()) -> list[Row]:
    """Read a JSONL, JSON, CSV or Parquet file.

    Args:
        format_name: a file of ``formats/``, or ``auto`` to recognise it from the first row.
        special_tokens: texts that a row's content must not contain (turn injection).

    Raises:
        DataError: every row that cannot be used, by number.
    """
    rows: list[Row] = []
    faults: list[Fault] = []
    for record, read in conversations(path, format_name, special_tokens):
        where = f"{path}:{record.place}"
        if isinstance(read, conversation.RowFault):
            faults.append(Fault(f"{read.column}: {read.what}" if read.column else read.what, where, read.fix))
        else:
            rows.append(Row(conversation=read, where=where))
    if not rows and not faults:
        faults.append(Fault("there are no rows in this file", str(path), "give a file with at least one row"))
    if faults:
        raise capped(faults)
    return rows


def conversations(
    path: Path, format_name: str = "auto", special_tokens: Sequence[str] = ()
) -> Iterator[tuple[Record, Conversation | conversation.RowFault]]:
    """Each record of a file with its conversation, or with what is wrong with it. The first row's format holds for all.

    Raises:
        DataError: the file itself cannot be read.
    """
    reader = None
    for record in records.read(path):
        try:
            if record.value is None:
                assert record.fault is not None
                raise record.fault
            if reader is None:
                reader = formats.get(formats.detect(record.value) if format_name == "auto" else format_name)
            read = reader.read(record.value)
            conversation.check(read, special_tokens)
            yield record, read
        except conversation.RowFault as fault:
            yield record, fault


def capped(faults: list[Fault]) -> DataError:
    """One error of many rows' faults: the first ones, and how many more there are."""
    shown = faults[:_MOST_FAULTS]
    if len(faults) > _MOST_FAULTS:
        shown.append(Fault(f"and {len(faults) - _MOST_FAULTS} more rows like these"))
    error = DataError.of(shown)
    assert isinstance(error, DataError)
    return error


def split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): a fixed share of the rows, drawn by the seed."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(1, round(fraction * len(rows)))])
    if len(held) == len(rows):
        raise DataError(f"{len(rows)} rows leave nothing to train on", rows[0].where, "lower data.eval_fraction")
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def repeats(rows: Sequence[Row], held: Sequence[Row]) -> list[str]:
    """What to say of rows that come twice, white space and case aside: among the training rows, or held out as well."""
    first: dict[tuple[str, ...], str] = {}
    said = []
    for row in rows:
        first.setdefault(_folded(row), row.where)
    if len(first) < len(rows):
        said.append(f"{len(rows) - len(first)} of {len(rows)} training rows repeat an earlier one")
    known = [row for row in held if _folded(row) in first]
    if known:
        what = f"{len(known)} of {len(held)} held-out rows are training rows too, the first is {known[0].where}"
        said.append(f"{what} ({first[_folded(known[0])]}): scores on them flatter")
    return said


def _folded(row: Row) -> tuple[str, ...]:
    return tuple(" ".join(turn.content.split()).casefold() for turn in row.conversation)
