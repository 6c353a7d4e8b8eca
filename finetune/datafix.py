"""A repaired copy of a data file, and a log of each change: what is certain is mended, what is not is left out by name.

Mended are misspelt roles and NUL characters; rows that cannot be trained and rows that stand there twice are left out.
The source is never touched.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import conversation, formats, records
from finetune.conversation import RowFault
from finetune.errors import DataError, EnvironmentFault
from finetune.runfolder import disk_fault, sync_file, sync_folder

_MOST_REPAIRS = 50


def fix(
    source: Path, out: Path, format_name: str, special_tokens: Sequence[str],
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, int]:  # fmt: skip
    """Write the repaired copy to ``out`` as JSONL and its log to ``out`` with ``.log.jsonl`` behind it.

    Returns how many rows were kept as they are, mended and left out.

    Raises:
        DataError: the source cannot be read.
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
        counts = _write(source, parts, format_name, special_tokens, progress)
        for part, path in zip(parts, (out, log), strict=True):
            part.rename(path)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise disk_fault(error, out) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return counts


def _write(
    source: Path, parts: Sequence[Path], format_name: str, special_tokens: Sequence[str],
    progress: Callable[[int], None],
) -> dict[str, int]:  # fmt: skip
    counts = {"kept": 0, "mended": 0, "left out": 0}
    seen: set[str] = set()
    reader = None
    with parts[0].open("w", encoding="utf-8") as rows, parts[1].open("w", encoding="utf-8") as log:

        def tell(record: records.Record, done: str, fault: RowFault) -> None:
            entry = {"row": record.number, "line": record.place, "done": done, "code": fault.code,
                     "column": fault.column, "message": fault.what}  # fmt: skip
            log.write(json.dumps(entry, ensure_ascii=False) + "\n")

        for record in records.read(source):
            progress(record.number)
            value, changes, fault = record.value, list[RowFault](), record.fault
            if value is not None:
                if reader is None:
                    try:
                        reader = formats.get(formats.detect(value) if format_name == "auto" else format_name)
                    except RowFault as unread:
                        raise DataError(unread.what, f"{source}:{record.place}", unread.fix) from None
                value, changes, fault = _mended(value, reader, special_tokens)
            text = json.dumps(value, ensure_ascii=False)
            if fault is None and text in seen:
                fault = RowFault("", "stands there already", code="duplicate")
            for change in changes if fault is None else ():
                tell(record, "mended", change)
            if fault is not None:
                tell(record, "left out", fault)
                counts["left out"] += 1
                continue
            seen.add(text)
            counts["mended" if changes else "kept"] += 1
            rows.write(text + "\n")
    for part in parts:
        sync_file(part)
    return counts


def _mended(
    value: dict[str, Any], reader: formats.Format, special_tokens: Sequence[str]
) -> tuple[dict[str, Any], list[RowFault], RowFault | None]:
    """(the row as it may be trained, what was changed in it, what cannot be mended)."""
    value, changes = copy.deepcopy(value), list[RowFault]()
    for _ in range(_MOST_REPAIRS):
        try:
            conversation.check(reader.read(value), special_tokens)
        except RowFault as fault:
            if not _mend(value, fault):
                return value, changes, fault
            changes.append(fault)
        else:
            return value, changes, None
    return value, changes, changes[-1]


def _mend(value: dict[str, Any], fault: RowFault) -> bool:
    """Change the row where what it means is certain; whether it was."""
    if fault.code == "nul":
        _strip_nul(value)
        return True
    guess = re.search(r"did you mean '(\w+)'", fault.fix)
    if fault.code != "unknown_role" or guess is None:
        return False
    holder, last = _place(value, fault.column)
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
