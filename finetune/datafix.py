"""A repaired copy of a data file, and a log of each change: what is certain is mended, what is not is left out by name.

Mended are misspelt roles and NUL characters; rows that cannot be trained and rows that stand there twice are left out.
The source is never touched.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import dataset
from finetune.conversation import Conversation, RowFault
from finetune.dataset import Reader
from finetune.errors import DataError, EnvironmentFault
from finetune.records import Record
from finetune.repeats import exact_digest
from finetune.runfolder import disk_fault, sync_file, sync_folder

_TOLD = 1000
_MOST_REPAIRS = 50


def fix(reader: Reader, out: Path, progress: dataset.Progress = dataset.silent) -> dict[str, int]:
    """Write the repaired copy to ``out`` as JSONL and its log to ``out`` with ``.log.jsonl`` behind it.

    Returns how many rows were kept as they are, mended and left out.

    Raises:
        DataError: the source cannot be read, or its format is not seen.
        EnvironmentFault: a file is in the way, or the disk refuses.
    """
    log = out.with_name(f"{out.name}.log.jsonl")
    for path in (out, log):
        if path.exists():
            raise EnvironmentFault("something is there already", str(path), "give another --fix, or remove it")
    if out.suffix.lower() not in (".jsonl", ".json"):
        raise DataError("the repaired copy is JSONL", str(out), "name it .jsonl")
    parts = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in (out, log)]
    try:
        counts = _write(reader, parts, progress)
        for part, path in zip(parts, (out, log), strict=True):
            part.rename(path)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise disk_fault(error, out) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return counts


def _write(reader: Reader, parts: Sequence[Path], progress: dataset.Progress) -> dict[str, int]:
    counts = {"kept": 0, "mended": 0, "left out": 0}
    seen: set[int] = set()
    with parts[0].open("w", encoding="utf-8") as rows, parts[1].open("w", encoding="utf-8") as log:

        def tell(record: Record, done: str, fault: RowFault) -> None:
            entry = {"row": record.number, "line": record.place, "done": done, "code": fault.code,
                     "column": fault.column, "message": fault.what}  # fmt: skip
            log.write(json.dumps(entry, ensure_ascii=False) + "\n")

        for where, record in reader.source.records():
            if record.number % _TOLD == 0:
                progress(reader.source.path, record.number, record.done)
            value, changes, fault, says = record.value, list[RowFault](), record.fault, None
            if value is not None:
                value, changes, fault, says = _mended(value, record, reader)
            if fault is not None and fault.code in ("unknown_format", "ambiguous_format"):
                raise DataError(fault.what, where, fault.fix)
            text = json.dumps(value, ensure_ascii=False)
            digest = exact_digest(says) if says else 0
            if fault is None and digest in seen:
                fault = RowFault("", "says what an earlier row says", code="duplicate")
            for change in changes if fault is None else ():
                tell(record, "mended", change)
            if fault is not None:
                tell(record, "left out", fault)
                counts["left out"] += 1
                continue
            seen.add(digest)
            counts["mended" if changes else "kept"] += 1
            rows.write(text + "\n")
    for part in parts:
        sync_file(part)
    return counts


def _mended(
    value: dict[str, Any], record: Record, reader: Reader
) -> tuple[dict[str, Any], list[RowFault], RowFault | None, Conversation | None]:
    """(the row as it may be trained, what was changed in it, what cannot be mended, what it says)."""
    value, changes = copy.deepcopy(value), list[RowFault]()
    for _ in range(_MOST_REPAIRS):
        try:
            says = reader.conversation(replace(record, value=value))
        except RowFault as fault:
            if not _mend(value, fault, reader.source.columns):
                return value, changes, fault, None
            changes.append(fault)
        else:
            return value, changes, None, says
    return value, changes, changes[-1], None


def _mend(value: dict[str, Any], fault: RowFault, columns: Mapping[str, str]) -> bool:
    """Change the row where what it means is certain; whether it was. ``columns``: what the row calls the format's."""
    if fault.code == "nul":
        _strip_nul(value)
        return True
    guess = re.search(r"did you mean '(\w+)'", fault.fix)
    if fault.code != "unknown_role" or guess is None:
        return False
    first = re.match(r"\w*", fault.column)
    name = first[0] if first else ""
    holder, last = _place(value, columns.get(name, name) + fault.column[len(name) :])
    if holder is None:
        return False
    holder[last] = guess[1]
    return True


def _place(value: Any, column: str) -> tuple[Any, Any]:
    """The container and key that ``messages[2].role`` names."""
    steps: list[Any] = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", column)]
    for step in steps[:-1]:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None, None
    return value, steps[-1]


def _strip_nul(value: Any) -> None:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        if isinstance(item, str):
            value[key] = item.replace("\0", "")
        elif isinstance(item, dict | list):
            _strip_nul(item)
