"""Sources → examples: read rows, understand their format, let the renderer make ids of them, hold rows out.

Every row is kept whole or refused by name.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import conversation, formats
from finetune.errors import DataError, Fault

if TYPE_CHECKING:
    from finetune.conversation import Conversation
    from finetune.renderer import Renderer

_MOST_FAULTS = 50
_GZIP = b"\x1f\x8b"


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
    reader = None
    for number, record in _records(path, faults):
        where = f"{path}:{number}"
        try:
            if reader is None:
                reader = formats.get(formats.detect(record) if format_name == "auto" else format_name)
            read = reader.read(record)
            conversation.check(read, special_tokens)
            rows.append(Row(conversation=read, where=where))
        except conversation.RowFault as fault:
            faults.append(Fault(f"{fault.column}: {fault.what}" if fault.column else fault.what, where, fault.fix))
    if not rows and not faults:
        faults.append(Fault("there are no rows in this file", str(path), "give a file with at least one row"))
    if faults:
        raise _capped(faults)
    return rows


def _capped(faults: list[Fault]) -> DataError:
    shown = faults[:_MOST_FAULTS]
    if len(faults) > _MOST_FAULTS:
        shown.append(Fault(f"and {len(faults) - _MOST_FAULTS} more rows like these"))
    error = DataError.of(shown)
    assert isinstance(error, DataError)
    return error


def _records(path: Path, faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, record) of each readable row; unreadable ones are added to ``faults``."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            raise DataError("this is a gzip file", str(path), "unpack it and name the unpacked file")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(path), "check the path") from None
    except UnicodeDecodeError as error:
        row = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"not UTF-8 ({error.reason})", f"{path}:{row}", "save the file as UTF-8") from None
    if suffix == ".csv":
        yield from _csv(text, path, faults)
        return
    if suffix == ".json" and text.lstrip().startswith("["):
        lines: Iterator[tuple[int, Any]] = enumerate(_json(text, f"{path}:1", faults) or [], 1)
    else:
        numbered = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        lines = ((number, _json(line, f"{path}:{number}", faults)) for number, line in numbered)
    for number, record in lines:
        if isinstance(record, dict):
            yield number, record
        elif record is not None:
            what = f"a row must be a JSON object, this one is {type(record).__name__}"
            faults.append(Fault(what, f"{path}:{number}", 'write rows like {"messages": […]}'))


def _json(text: str, where: str, faults: list[Fault]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "a number has thousands of digits" if "set_int_max_str_digits" in str(error) else error
        faults.append(Fault(f"not valid JSON: {reason}", where, "mend or remove the row"))
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _csv(text: str, path: Path, faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Cells as the texts they are: a reader that guesses types would make 7 of "007" and nothing of "null"."""
    csv.field_size_limit(len(text) + 1)  # the library's own limit would refuse a cell of 128 KiB
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"column {twice[0]!r} occurs twice", f"{path}:1", "keep one")
        for number, record in enumerate(reader, 1):
            if None in record or None in record.values():
                what = (
                    f"has {'more' if None in record else 'fewer'} cells than the {len(reader.fieldnames or ())} columns"
                )
                faults.append(Fault(what, f"{path}:{number}", 'put cells with commas or newlines in "quotes"'))
            else:
                yield number, record
    except csv.Error as error:
        raise DataError(f"not valid CSV: {error}", f"{path}, line {reader.line_num}", "mend the line") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"cannot be read: {error.__cause__ or error}", str(path), "check the file") from None


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


def render(rows: Sequence[Row], renderer: Renderer, max_length: int) -> list[Example]:
    """All rows as examples.

    Raises:
        DataError: rows longer than ``max_length`` (nothing is ever cut silently) or without a supervised token.
    """
    examples: list[Example] = []
    faults: list[Fault] = []
    for row in rows:
        try:
            made = renderer.examples(row)
        except DataError as error:
            faults += error.faults
            continue
        for example in made:
            if len(example.ids) > max_length:
                what = f"{len(example.ids)} tokens, more than train.max_length {max_length}"
                faults.append(Fault(what, row.where, "raise train.max_length or shorten the row"))
        examples += made
    if faults:
        raise _capped(faults)
    return examples
