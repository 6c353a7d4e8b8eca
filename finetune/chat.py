"""A conversation in the terminal with a run's model, or with its base and its adapter side by side.

Answers go to standard output and everything else to standard error, so that a pipe holds answers alone.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune import answer
from finetune.answer import Answer
from finetune.conversation import Turn
from finetune.errors import DataError, ModelError
from finetune.session import NUMBERS, Session, Settings, Side
from finetune.terminal import Terminal, clean, clean_lines

_BLOCK = '"""'
"""Opens and closes a message of several lines."""
_WIDE = 100
"""Columns from which two answers fit beside each other."""
_HELP = """\
/new, or an empty line    begin anew
/undo                     take the last question and its answer back
/system TEXT              begin anew under this system prompt (without TEXT: under none)
/save FILE                append the conversation to FILE, as a chat row to train on
/quit, or Ctrl-D          leave; Ctrl-C ends an answer
\"\"\"                       opens and closes a message of several lines; // begins one with a slash"""


def talk(
    folder: Path, settings: Settings, out: Terminal, notes: Terminal, *, compare: bool = False,
    message: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Converse until the input ends, or answer ``message`` alone. → the conversations, for ``--json``.

    Raises:
        ModelError: no model is there, or ``compare`` where there is no adapter.
        DataError: a message that cannot be asked, where nobody is there to write another.
    """
    if compare and (folder / "config.json").is_file():
        raise ModelError("a model folder has no adapter to compare with", str(folder), "give the run's folder")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    session = Session(answer.load(folder, notes), settings, compare)
    chat = _Chat(session, out, notes)
    if message is None:
        chat.converse()
    else:
        chat.ask(message)
    asked = {word.replace("-", "_"): value for word, value in settings.shown().items()}
    return {"folder": str(folder), "settings": asked, "conversations": session.rows()}


class _Chat:
    def __init__(self, session: Session, out: Terminal, notes: Terminal) -> None:
        self._session, self._out, self._notes = session, out, notes
        self._typed = sys.stdin.isatty()

    def converse(self) -> None:
        """Until the end of the input or ``/quit``."""
        if not self._typed:
            while self._turn():
                pass
            return
        self._hint("type a message; /help lists what else, an empty line begins anew, Ctrl-D ends")
        going = True
        with _on_ctrl_c(signal.SIG_IGN):
            while going:
                with contextlib.suppress(KeyboardInterrupt):  # one that came while another was answered
                    going = self._typed_turn()

    def _typed_turn(self) -> bool:
        """A turn whose faults are told, and which Ctrl-C gives up: whatever it does, it leads back to the prompt."""
        try:
            # Python's own handler: one written in Python fails (SystemError) where two signals reach input() together.
            with _on_ctrl_c(signal.default_int_handler):
                return self._turn()
        except (DataError, OSError) as error:
            self._notes.say(clean(str(error)))
        except KeyboardInterrupt:
            self._notes.say("\n(Ctrl-D or /quit leaves)")
        return True

    def _turn(self) -> bool:
        """Read a message and heed it. → whether another one may follow."""
        text = self._message()
        if text is None or text == "/quit":
            return False
        self._heed(text)
        return True

    def _hint(self, text: str) -> None:
        if not self._notes.quiet:
            self._notes.say(text)

    def _heed(self, text: str) -> None:
        if not text or text == "/new":
            self._session.anew()
        elif text.startswith("/") and not text.startswith("//"):
            self._command(*text[1:].partition(" ")[::2])
        else:
            self.ask(text.removeprefix("/") if text.startswith("//") else text)

    def _command(self, word: str, rest: str) -> None:
        rest, settings = rest.strip(), self._session.settings
        if word == "undo":
            self._session.undo()
        elif word == "system":
            settings.system = rest
            self._session.anew()
        elif word == "save" and rest:
            self._session.save(Path(rest).expanduser())
            self._notes.say(f"saved: {clean(rest)}")
        elif word in NUMBERS and rest:
            try:
                settings.change(word, rest)
            except ValueError as error:
                raise DataError(str(error)) from None
        elif word == "help":
            now = settings.shown()
            self._notes.say(_HELP)
            for name in NUMBERS:
                self._notes.say(f"/{name + ' N':<25}now {now[name]}")
        else:
            raise DataError(f"no such command: {clean('/' + word)}", "", "/help lists them; // begins a message")

    def ask(self, text: str) -> None:
        """Ask, and print each side's answer. A conversation that has outgrown the model begins anew with this question.

        Raises:
            DataError: the question alone is too long, or the template cannot render it.
        """
        session, question = self._session, Turn("user", text)
        try:
            prompts = session.prompts(question)
        except DataError as error:
            if not session.begun:
                raise
            self._notes.say(f"{clean(error.faults[0].what)}: the conversation begins anew with this message")
            session.anew()
            prompts = session.prompts(question)
        with _ctrl_c_ends_the_answer() as stopped:
            answers = self._answers(prompts, stopped)
        session.record(question, answers)
        if any(said.ended == "length" for said in answers):
            longest = max(len(said.ids) for said in answers)
            more = longest >= session.settings.max_new_tokens
            why = "--max-new-tokens, or /max-new-tokens here, allows more" if more else "the model's context ends there"
            self._hint(f"(cut at {longest} tokens: {why})")

    def _answers(self, prompts: list[tuple[int, ...]], stopped: Callable[[], bool]) -> list[Answer]:
        speaker, asking = self._session.speaker, self._session.settings.asking()

        def one(side: Side, prompt: tuple[int, ...], say: Callable[[str], None]) -> Answer:
            return speaker.answer(prompt, asking, say, adapter=side.adapter, stopped=stopped)

        asked = list(zip(self._session.sides, prompts, strict=True))
        if self._session.compare and self._out.live and _console(self._out).width >= _WIDE:
            answers = [one(side, prompt, self._counting(side.name)) for side, prompt in asked]
            self._notes.say()
            columns([side.name for side, _ in asked], [said.text for said in answers], _console(self._out))
            return answers
        answers = []
        for side, prompt in asked:
            if self._session.compare:
                self._out.say(f"[{side.name}]")
            answers.append(one(side, prompt, lambda text: self._out.write(clean_lines(text))))
            self._out.say()
        return answers

    def _counting(self, name: str) -> Callable[[str], None]:
        """Says how far an answer is that is shown when it is whole."""
        count = 0

        def say(text: str) -> None:
            nonlocal count
            count += len(text)
            self._notes.status(f"{name}: {count} characters")

        return say

    def _message(self) -> str | None:
        """The next message, without the white space around it; None at the end of the input."""
        line = self._line("> ")
        if line is None or not line.strip().startswith(_BLOCK):
            return line if line is None else line.strip()
        lines = [line.strip().removeprefix(_BLOCK)]
        while not lines[-1].rstrip().endswith(_BLOCK) and (line := self._line(". ")) is not None:
            lines.append(line)
        return "\n".join(lines).rstrip().removesuffix(_BLOCK).strip("\n")

    def _line(self, sign: str) -> str | None:
        """The next line, with line editing where somebody types it into a terminal that shows it."""
        if self._typed and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines once it is there
            with contextlib.suppress(EOFError):
                return input(sign)
            self._notes.say()
            return None
        if self._typed:
            self._notes.write(sign)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None


def columns(names: list[str], texts: list[str], console: Any) -> None:
    """Texts beside each other, each under its name, in equal columns of the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(clean_lines(text)) for text in texts))
    console.print(table)


def _console(terminal: Terminal) -> Any:
    from rich.console import Console

    return Console(file=terminal.out, markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def _ctrl_c_ends_the_answer() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes what is given true; a second one gives the question up."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    with _on_ctrl_c(handle):
        yield lambda: asked


@contextlib.contextmanager
def _on_ctrl_c(handle: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    former = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
