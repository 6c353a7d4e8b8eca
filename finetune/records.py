"""Files → records: JSONL, JSON, CSV and Parquet, also gzipped; a record that cannot be read is a fault with its place.

JSONL and CSV are read as they come, so that a file may be larger than the memory.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.conversation import RowFault, shown
from finetune.errors import DataError

_MOST_CELL = 64 * 1024 * 1024
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record: its number from 1, its place as ``file:N`` names it (a line of JSONL, else the record), and its
    value, or why there is none. ``done``: the share of the file that was read, 0 where that is not known."""

    number: int
    place: int
    value: dict[str, Any] | None
    fault: RowFault | None = None
    done: float = 0.0


def read(path: Path) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        DataError: the file itself cannot be read.
    """
    _refuse_device(path)
    kind = path.suffixes[-2].lower() if path.suffix.lower() == ".gz" and len(path.suffixes) > 1 else path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind == ".csv":
        yield from _csv(path)
    elif kind == ".json" and _first_sign(path) == "[":
        yield from _array(path)
    else:
        yield from _lines(path)


def _refuse_device(path: Path) -> None:
    """A pipe would wait for ever, a device never ends."""
    if path.exists() and not path.is_file():
        raise DataError("this is not a regular file", str(path), "name a file")


def _lines(path: Path) -> Iterator[Record]:
    number = read = 0
    size = _size(path)
    for place, raw in enumerate(_raw_lines(path), 1):
        try:
            line = raw.decode("utf-8-sig" if place == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, place, raw, error) from None
        read += len(raw)
        if line.strip():
            number += 1
            yield _parsed(line, number, place, read / size if size else 0.0)


def _size(path: Path) -> int:
    """Bytes that will be read, 0 where that is not known."""
    return 0 if path.suffix.lower() == ".gz" or not path.is_file() else path.stat().st_size


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed and path.suffix.lower() != ".gz":
                raise DataError("this is a gzip file", str(path), "name it .gz, or unpack it")
            yield from gzip.GzipFile(fileobj=file) if packed else file
    except (OSError, EOFError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", str(path), "check it") from None


def _first_sign(path: Path) -> str:
    for raw in _raw_lines(path):
        text = raw.decode("utf-8-sig", errors="replace").lstrip()
        if text:
            return text[0]
    return ""


def _not_utf8(path: Path, place: int, raw: bytes, error: UnicodeDecodeError) -> DataError:
    known = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(raw[:2], "latin-1 or another 8-bit encoding")
    what = f"not UTF-8 but perhaps {known} ({error.reason})"
    return DataError(what, f"{path}:{place}", "save the file as UTF-8")


def _parsed(text: str, number: int, place: int, done: float) -> Record:
    try:
        value = _DECODER.decode(text)
    except RowFault as fault:
        return Record(number=number, place=place, value=None, fault=fault)
    except (ValueError, RecursionError) as error:
        reason = "a number has thousands of digits" if "set_int_max_str_digits" in str(error) else error
        broken = RowFault("", f"not valid JSON: {reason}", "mend or remove the row", code="broken_json")
        return Record(number=number, place=place, value=None, fault=broken)
    return _record(value, number, place, done)


def _record(value: Any, number: int, place: int, done: float) -> Record:
    if isinstance(value, dict):
        return Record(number=number, place=place, value=value, done=done)
    what = f"a row must be a JSON object, this one is {type(value).__name__}"
    fault = RowFault("", what, 'write rows like {"messages": […]}', code="not_an_object")
    return Record(number=number, place=place, value=None, fault=fault)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        what = f"not valid JSON: key {shown(twice)} occurs twice"
        raise RowFault("", what, "mend or remove the row", code="duplicate_key")
    return record


def _refuse_constant(name: str) -> Any:
    what = f"not valid JSON: {name} is not a JSON number"
    raise RowFault("", what, "mend or remove the row", code="not_a_number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _array(path: Path) -> Iterator[Record]:
    raw = b"".join(_raw_lines(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = raw[: error.start].count(b"\n") + 1
        raise _not_utf8(path, place, raw, error) from None
    try:
        rows = _DECODER.decode(text)
    except RowFault as fault:
        raise DataError(fault.what, f"{path}:1", fault.fix) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", f"{path}:1", "mend it, or write one object a line") from None
    for number, value in enumerate(rows, 1):
        yield _record(value, number, number, number / len(rows))


def _csv(path: Path) -> Iterator[Record]:
    """Cells as the texts they are: a reader that guesses types would make 7 of "007" and nothing of "null"."""
    csv.field_size_limit(_MOST_CELL)  # the library's own limit would refuse a cell of 128 KiB
    line = read = 0
    size = _size(path)

    def lines() -> Iterator[str]:
        nonlocal line, read
        for line, raw in enumerate(_raw_lines(path), 1):
            read += len(raw)
            try:
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line, raw, error) from None

    reader = csv.DictReader(lines(), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"column {twice[0]!r} occurs twice", f"{path}:1", "keep one")
        last = reader.line_num
        for number, record in enumerate(reader, 1):
            yield replace(_cells(record, number, last + 1, len(names)), done=read / size if size else 0.0)
            last = reader.line_num
    except csv.Error as error:
        raise DataError(f"not valid CSV: {error}", f"{path}, line {reader.line_num}", "mend the line") from None


def _cells(record: dict[Any, Any], number: int, line: int, columns: int) -> Record:
    if None not in record and None not in record.values():
        return Record(number=number, place=line, value=record)
    what = f"has {'more' if None in record else 'fewer'} cells than the {columns} columns"
    fault = RowFault("", what, 'put cells with commas or newlines in "quotes"', code="cells")
    return Record(number=number, place=line, value=None, fault=fault)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number, rows = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number=number, place=number, value=value, done=number / rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot be read: {error}", str(path), "check the file") from None
