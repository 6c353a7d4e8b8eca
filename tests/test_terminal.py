"""What a person sees: readable numbers, a status line with the time left, and no tricks from other people's text."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from finetune import terminal
from finetune.terminal import Progress, Terminal, amount, clean, clean_lines, duration, size


def test_every_character_that_steers_a_terminal_is_taken_out() -> None:
    """All of Unicode: control, format (bidi, zero width), private, line separators."""
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            assert clean(f"a{char}b") == "a b", hex(code)


def test_an_answer_keeps_its_lines_and_nothing_else_that_steers_a_terminal() -> None:
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            kept = {"\n": "\n", "\t": "    ", "\r": "", "\u200c": "\u200c", "\u200d": "\u200d"}.get(char, " ")
            assert clean_lines(f"a{char}b") == f"a{kept}b", hex(code)
    text = "1. eins\r\n2. zwei\n\n```\n    x = 'é 日本 🧑\u200d💻'\n```\n"
    assert clean_lines(text) == text.replace("\r", "") == "".join(map(clean_lines, text))


@pytest.mark.parametrize("text", ["plain", "Ünïcode", "日本語", "🙂", "a  b", "«»", "שלום", "e\u0301"])
def test_text_stays(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    "payload",
    [
        "\x1b[2J",
        "\x1b]8;;http://x\x07link",
        "\x9b31m",
        "\r overwritten",
        "\x08\x08",
        "\u202ecod.exe",
        "\u2066x\u2069",
        "a\nb",
    ],
)
def test_payloads_lose_their_power(payload: str) -> None:
    cleaned = clean(payload)
    assert cleaned.isprintable()
    assert not {"\x1b", "\r", "\n", "\u202e"} & set(cleaned)


def test_long_text_is_cut_visibly() -> None:
    assert clean("x" * 300) == "x" * 199 + "…"
    assert clean("x" * 200) == "x" * 200
    assert clean("x" * 300, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (28.3e9, "28.3 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (0.4, "0s"), (59.6, "1m00s"), (90, "1m30s"), (3600, "1h00m"), (90_000, "25h00m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_redraws_one_line() -> None:
    out = _Tty()
    shown = Terminal(out=out)
    shown.status("a longer text")
    shown.status("short")
    assert out.getvalue() == "\ra longer text\rshort        "
    shown.say("a line")
    assert out.getvalue().endswith("\r     \ra line\n")
    shown.status("done", last=True)
    assert out.getvalue().endswith("\rdone\n")


def test_a_log_gets_a_line_now_and_then_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    shown = Terminal(out=out)
    progress = Progress(shown, "step", began=now)
    for step in range(1, 31):
        now += 1
        progress(step, 30)
    lines = out.getvalue().splitlines()
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)
    assert [line[20:] for line in lines] == [
        "step 1/30  ETA 29s",
        "step 11/30  ETA 19s",
        "step 21/30  ETA 9s",
        "step 30/30",
    ]
    assert terminal._EVERY == 10


def test_a_resumed_run_counts_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = Progress(Terminal(out=out), "step", began=now, start=50)
    now += 20
    progress(60, 100, "loss 1.0")
    assert out.getvalue()[20:] == "step 60/100  loss 1.0  ETA 1m20s\n"


def test_a_terminal_sees_a_bar() -> None:
    out = _Tty()
    progress = Progress(Terminal(out=out), "step", start=0)
    progress(0, 40)
    progress(10, 40)
    progress(40, 40)
    drawn = [part.rstrip() for part in out.getvalue().split("\r")[1:]]
    assert drawn == [f"step {'─' * 20} 0/40", f"step {'━' * 5}{'─' * 15} 10/40  ETA 0s", f"step {'━' * 20} 40/40"]
    assert terminal.bar(0, 0) == terminal.bar(3, 2) == "━" * 20  # nothing to do, and more than was promised


def test_in_a_narrow_terminal_the_bar_gives_way_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, bars in ((80, 20), (38, 5), (33, 0)):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = _Tty()
        Progress(Terminal(out=out), "step", start=0)(10, 40, "loss 1.0000")
        (drawn,) = out.getvalue().split("\r")[1:]
        assert len(drawn) < columns
        assert sum(drawn.count(one) for one in "━─") == bars
        assert drawn.endswith(" 10/40  loss 1.0000  ETA 0s")


@pytest.mark.parametrize(
    ("out", "no_color", "term", "colour"),
    [(_Tty(), "", "xterm", True), (_Tty(), "1", "xterm", False), (_Tty(), "", "dumb", False),
     (io.StringIO(), "", "xterm", False)],
)  # fmt: skip
def test_colours_are_for_terminals_that_want_them(
    out: io.StringIO, no_color: str, term: str, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    assert Terminal(out=out).colour is colour


def test_silent_says_nothing() -> None:
    out = io.StringIO()
    shown = Terminal(out=out, silent=True)
    shown.status("x", last=True)
    shown.say("y")
    assert out.getvalue() == ""


def test_quiet_keeps_the_lines_only() -> None:
    out = io.StringIO()
    shown = Terminal(out=out, quiet=True)
    shown.status("x", last=True)
    shown.say("y")
    assert out.getvalue() == "y\n"


def test_a_reader_that_has_gone_away_does_not_stop_the_work(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from finetune.terminal import Terminal; terminal = Terminal()\n"
        "for number in range(2000): terminal.say('x' * 100); terminal.status('y')\n"
        "pathlib.Path(sys.argv[1]).write_text('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "end")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (0, b"")
    assert (tmp_path / "end").read_text() == "done"


def test_amounts_are_shown_in_the_unit_that_shows_them() -> None:
    assert [amount(count) for count in (0, 999, 1000, 65_432, 14_167_290_880)] == [
        "0", "999", "1.0 k", "65.4 k", "14,167.3 M",
    ]  # fmt: skip
