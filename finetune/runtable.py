"""All runs below a folder as one table: where each stands, by its own files, whatever tracker it has.

Reads the ends of files and needs no torch, so that it can be asked every few seconds beside a training.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size

from finetune import ended, runstory, runview, scores
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder, read_json
from finetune.runstory import number
from finetune.terminal import clean, duration, size

_DEPTH = 4
"""Folders below the given one that are looked through: sweeps, and several adapters, are folders of runs."""
_TAIL = 16_384
_ORDER = (ended.RUNNING, ended.FAILED, ended.PAUSED, ended.INTERRUPTED, ended.FINISHED, ended.HALVED)
_GAP = "  "
_NARROWEST = 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run. ``loss``: of its last step; ``evaluation_loss``: of its last judgement, which ``judged`` names.

    ``tokens_per_second``: mean of its last steps; ``memory``: bytes; ``eta``: seconds that a running one needs yet, at
    the pace of its last steps and without judging; ``age``: seconds since it last wrote something.
    """

    name: str
    folder: str
    state: str
    why: str
    step: int
    total: int | None
    loss: float | None
    evaluation_loss: float | None
    judged: str | None
    tokens_per_second: float | None
    memory: int | None
    eta: float | None
    age: float


def folders(root: Path) -> Iterator[Path]:
    """Run folders at and below ``root``; what a run holds is not looked into."""
    for path, inner, files in os.walk(root):
        if "identity.json" in files:
            inner.clear()
            yield Path(path)
        deep = len(Path(path).relative_to(root).parts) >= _DEPTH
        inner[:] = [] if deep else sorted(name for name in inner if name[0] != ".")


def rows(root: Path) -> list[Row]:
    """Every run at and below ``root``: running ones first, then the newest.

    Raises:
        EnvironmentFault: there is none.
    """
    found = [_row(folder, root) for folder in folders(root)]
    if not found:
        raise EnvironmentFault("there is no run here", str(root), "name a run, or the folder that holds the runs")
    return sorted(found, key=lambda row: (_ORDER.index(row.state), row.age, row.name))


def _row(folder: Path, root: Path) -> Row:
    files = RunFolder(folder)
    state, why = ended.state(files)
    last = _last_lines(files.metrics)
    plan = read_json(files.plan)
    total = number(plan.get("steps")) if isinstance(plan, dict) else None
    step = max((int(number(line.get("step")) or 0) for line in last[-1:]), default=0)
    pace = _mean(last, "seconds")
    judged, loss = _judged(files)
    relative = folder.relative_to(root)
    return Row(
        name=str(relative) if relative.parts else folder.absolute().name, folder=str(folder), state=state, why=why,
        step=step, total=None if total is None else int(total), loss=number(last[-1].get("loss")) if last else None,
        evaluation_loss=loss, judged=judged, tokens_per_second=_speed(last),
        memory=int(number(last[-1].get("memory")) or 0) or None if last else None,
        eta=(total - step) * pace if state == ended.RUNNING and total is not None and pace is not None else None,
        age=max(0.0, time.time() - _newest(files)),
    )  # fmt: skip


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The steps at the end of metrics.jsonl; lines that are cut off at either end are left out."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            begin = file.seek(max(0, length - _TAIL))
            text = file.read(_TAIL)
    except OSError:
        return []
    lines = text.split(b"\n")[1 if begin else 0 : -1]
    return [line for line in map(runstory.parsed, lines) if line is not None and number(line.get("step")) is not None]


def _mean(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [value for line in lines if (value := number(line.get(key))) is not None]
    return math.fsum(values) / len(values) if values else None


def _speed(lines: Sequence[dict[str, Any]]) -> float | None:
    tokens, seconds = _mean(lines, "tokens"), _mean(lines, "seconds")
    return tokens / seconds if tokens is not None and seconds else None


def _judged(files: RunFolder) -> tuple[str | None, float | None]:
    """The newest judgement of trained weights that has a loss."""
    stored = {name: values for name, values in scores.read(files).items() if isinstance(values, dict)}
    losses = {name: number(values.get("loss")) for name, values in stored.items()}
    steps = {name: step for name, loss in losses.items() if loss is not None and (step := runview.step_of(name))}
    name = runview.END if losses.get(runview.END) is not None else max(steps, key=steps.__getitem__, default=None)
    return (name, losses[name]) if name is not None else (None, None)


def _newest(files: RunFolder) -> float:
    times = [0.0]
    for path in (files.identity, files.metrics, files.scores, files.finished, files.stopped):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)


_HEADS = ("run", "state", "step", "loss", "eval loss", "tokens/s", "memory", "ETA", "age")
_FIRST_TO_GO = ("memory", "tokens/s", "age", "eval loss", "loss", "ETA")
"""Columns that give way to a narrow terminal, once names are short."""


def table(found: Sequence[Row], width: int) -> list[str]:
    """The rows as lines of at most ``width`` cells of a terminal, the heads first; below, why runs failed."""
    cells = [dict(zip(_HEADS, _cells(row), strict=True)) for row in found]
    heads = list(_HEADS)
    wide = {head: max(len(head), *(cell_len(cell[head]) for cell in cells)) for head in heads}

    def room() -> int:
        return width - sum(wide[head] + len(_GAP) for head in heads[1:])

    for head in _FIRST_TO_GO:
        if room() < min(wide["run"], _NARROWEST):
            heads.remove(head)
    wide["run"] = max(1, min(wide["run"], room()))
    lines = [_line({head: head for head in _HEADS}, heads, wide), *(_line(cell, heads, wide) for cell in cells)]
    lines += [f"{row.name}: {row.why}" for row in found if row.state == ended.FAILED and row.why]
    return [_cut(clean(line, width), width) for line in lines]


def _cut(text: str, width: int) -> str:
    """The beginning of a text in at most ``width`` cells; a Chinese sign takes two."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _end(text: str, width: int) -> str:
    """The end of one: ends tell runs apart."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:]
    return "…" + text


def _line(cell: dict[str, str], heads: Sequence[str], wide: dict[str, int]) -> str:
    shown = [set_cell_size(_end(cell["run"], wide["run"]), wide["run"])]
    shown += [cell[head].ljust(wide[head]) if head == "state" else cell[head].rjust(wide[head]) for head in heads[1:]]
    return _GAP.join(shown).rstrip()


def _cells(row: Row) -> list[str]:
    return [
        clean(row.name), row.state, f"{row.step}/{'?' if row.total is None else row.total}", _short(row.loss),
        _short(row.evaluation_loss), "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
        "-" if row.memory is None else size(row.memory), "-" if row.eta is None else duration(row.eta),
        _age(row.age),
    ]  # fmt: skip


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f}d" if seconds >= 172_800 else duration(seconds)


def to_dict(root: Path) -> dict[str, Any]:
    return {"folder": str(root), "runs": [asdict(row) for row in rows(root)]}


def lines(root: Path) -> list[str]:
    return table(rows(root), max(_NARROWEST, shutil.get_terminal_size((120, 24)).columns))


def watch(root: Path, out: TextIO, every: float) -> None:
    """Show the table again every few seconds, until Ctrl-C; on what is no terminal each time under the time of day."""
    if not out.isatty():
        while True:
            out.write("\n".join([time.strftime("%Y-%m-%d %H:%M:%S"), *lines(root), "", ""]))
            out.flush()
            time.sleep(every)
    out.write("\x1b[?1049h\x1b[H")  # the other screen, as `top` does: what stood there comes back
    try:
        while True:
            out.write(_screen(lines(root), every))
            out.flush()
            time.sleep(every)
    finally:
        out.write("\x1b[?1049l")
        out.flush()


def _screen(shown: Sequence[str], every: float) -> str:
    """One picture over the last one; rows that a low terminal has no room for are counted."""
    height = max(3, shutil.get_terminal_size().lines) - 2
    more = len(shown) - height
    kept = [*shown[: height - 1], f"… and {more + 1} lines more"] if more > 0 else list(shown)
    kept.append(f"{time.strftime('%H:%M:%S')}, every {every:g} s; Ctrl-C ends")
    return "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in kept[:-1]) + f"{kept[-1]}\x1b[K\x1b[J"
