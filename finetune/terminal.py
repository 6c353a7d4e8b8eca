"""What a person sees: lines, one live status line with ETA, sizes and times in readable units.

Sample text is somebody else's data: control characters, terminal escapes and direction marks are taken out before
anything is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

_EVERY = 10.0
"""Seconds between status lines where there is no terminal to redraw (a log file, CI)."""


_BAR = 20
"""Characters of a bar where there is room."""
_SHORTEST_BAR = 5
_WORTH_A_BAR = 1_000_000_000
"""Bytes that take a second or two to read."""


def clean(text: str, limit: int = 200) -> str:
    """Printable text on one line: other characters become spaces."""
    kept = "".join(char if char.isprintable() else " " for char in text)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


_JOINERS = "\u200c\u200d"
"""Persian and Indic words and joined emoji are spelt with them; they move nothing on a screen."""


def clean_lines(text: str) -> str:
    """Printable text that keeps its lines, for answers with lists or code. May be given piece by piece.

    Tabs become four spaces, carriage returns nothing, other signs that are not printable a space.
    """
    text = text.replace("\t", "    ").replace("\r", "")
    return "".join(char if char.isprintable() or char == "\n" or char in _JOINERS else " " for char in text)


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def amount(count: float) -> str:
    """A number of parameters in the unit that shows it."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass
class Terminal:
    """Lines and one status line on ``out``; ``quiet`` keeps only the lines, ``silent`` not even those."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    quiet: bool = False
    silent: bool = False
    _last: float = 0.0
    _width: int = 0

    @property
    def live(self) -> bool:
        """Whether ``out`` is a terminal, whose last line can be drawn again."""
        return self.out.isatty()

    @property
    def columns(self) -> int:
        """Characters of a line; one that wraps could not be redrawn."""
        return max(1, shutil.get_terminal_size().columns - 1)

    @property
    def colour(self) -> bool:
        """Whether colours may be used: on a terminal that has some, and whose user has not said no (no-color.org)."""
        return self.live and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, text: str = "") -> None:
        if self.silent:
            return
        self._erase()
        self._write(text + "\n")

    def write(self, text: str) -> None:
        """A part of a line."""
        if self.silent:
            return
        self._erase()
        self._write(text)

    def _write(self, text: str) -> None:
        """Print; a reader that has gone away (``| head``) is no reason to stop the work."""
        try:
            self.out.write(text)
            self.out.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())

    def status(self, text: str, *, last: bool = False) -> None:
        """Redraw the status line; in a log, print it every few seconds and at the end, each with the time of day."""
        if self.quiet or self.silent:
            return
        now = time.monotonic()
        if self.live:
            text = text[: self.columns]
            self._write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = 0 if last else len(text)
        elif last or now - self._last >= _EVERY:
            self._last = now
            self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _erase(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0


@dataclass
class Progress:
    """Done of a known whole, with an ETA from the pace so far, and on a terminal a bar."""

    terminal: Terminal
    label: str
    began: float = field(default_factory=time.monotonic)
    start: int = 0

    def __call__(self, done: int, of: int, extra: str = "") -> None:
        spent = time.monotonic() - self.began
        worked = done - self.start
        eta = f"  ETA {duration(spent / worked * (of - done))}" if worked > 0 and done < of else ""
        numbers = f" {done}/{of}{'  ' + extra if extra else ''}{eta}"
        room = self.terminal.columns - len(self.label) - len(numbers) - 1  # the bar gives way, the numbers do not
        drawn = f" {bar(done, of, min(_BAR, room))}" if self.terminal.live and room >= _SHORTEST_BAR else ""
        self.terminal.status(f"{self.label}{drawn}{numbers}", last=done >= of)


class ByteBar:
    """Progress over bytes, in MB, where there are enough of them to wait for. Any thread may tell it."""

    def __init__(self, terminal: Terminal, label: str, of: int = 0) -> None:
        self._shown, self._of, self._done, self._one = Progress(terminal, f"{label}, MB"), of, 0, threading.Lock()

    @classmethod
    def over(cls, terminal: Terminal, label: str, files: Iterable[Path]) -> ByteBar:
        """Of what these files hold; folders among them count nothing."""
        return cls(terminal, label, sum(path.stat().st_size for path in files if path.is_file()))

    def more(self, count: int) -> None:
        """So many bytes more, of the whole that was said."""
        with self._one:
            self._done += count
            self.at(self._done, self._of)

    def at(self, done: int, of: int) -> None:
        if of > _WORTH_A_BAR:
            self._shown(done // 1_000_000, of // 1_000_000)


def bar(done: int, of: int, width: int = _BAR) -> str:
    """How much of a whole is done, as a line of ``width`` characters that fills."""
    full = width * min(done, of) // of if of > 0 else width
    return "━" * full + "─" * (width - full)


def reading(terminal: Terminal, verb: str) -> Callable[[str, int, float], None]:
    """Shows how far the reading of rows is, at what pace, and when it will end."""
    began: dict[str, float] = {}

    def show(source: str, rows: int, done: float) -> None:
        spent = time.monotonic() - began.setdefault(source, time.monotonic())
        if spent < 1:
            return
        eta = f"  ETA {duration(spent / done * (1 - done))}" if 0 < done < 1 else ""
        terminal.status(f"{verb} {source}: {rows:,} rows, {rows / spent:,.0f} rows/s{eta}")

    return show
