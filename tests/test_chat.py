"""The conversation as somebody has it: through a pipe, as JSON, in a terminal; and what it saves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune import chat
from finetune.answer import Answer, Speaker
from finetune.model import Policy
from finetune.terminal import clean_lines
from tests import runs
from tests.runs import OUTPUT, finetune

RUN = str(OUTPUT)
SHORT = ("--max-new-tokens", "6")
HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J\u202eevil\u2066\u200b\nsecond line\x00\n\n- one\n\t- two"


@pytest.fixture
def awake(finished: Path) -> Path:
    """The finished run with an adapter that changes answers."""
    runs.awake(OUTPUT / "adapter")
    return finished


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The model answers with what it was asked for, "base: …" without its adapter. → what it was asked."""
    asked: list[tuple[int, bool]] = []

    def answer(self: Speaker, prompt: Any, asking: Any, say: Any, *, adapter: bool, stopped: Any) -> Answer:
        asked.append((len(prompt), adapter))
        text = f"{'answer' if adapter else 'base'} {len(asked)}"
        say(text)
        return Answer(text, (1, 2), "stop")

    monkeypatch.setattr(Speaker, "answer", answer)
    return asked


def test_a_pipe_holds_answers_alone(awake: Path) -> None:
    said = finetune("chat", RUN, *SHORT, "--quiet", stdin="What is 3 and 4?\nAnd now?\n\nWhat is 3 and 4?\n")
    assert (said.code, said.err) == (0, "")
    again = finetune("chat", RUN, *SHORT, "--quiet", "--prompt", "What is 3 and 4?")
    assert again.out
    assert said.out.startswith(again.out)
    assert said.out.endswith(again.out)  # an empty line begins anew
    assert len(said.out) > 2 * len(again.out)


def test_every_turn_has_those_before_it_as_context(awake: Path, scripted: list[tuple[int, bool]]) -> None:
    assert finetune("chat", RUN, "--system", "Be short.", stdin="a\nb\n/undo\nb\n/new\na\n").code == 0
    first, second, third, fourth = (length for length, _ in scripted)
    assert first < second == third
    assert fourth == first


def test_the_conversation_as_json(awake: Path) -> None:
    said = finetune("chat", RUN, "--json", *SHORT, "--system", "Be short.", stdin="a\nb\n\nc\n")
    found = json.loads(said.out)
    assert said.code == 0
    assert found["folder"] == RUN
    assert found["settings"]["temperature"] == 0
    first, second = found["conversations"]
    assert [message["role"] for message in first["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in second["messages"]][:2] == ["Be short.", "c"]
    assert (first["model"], second["finish_reasons"]) == ("adapter", ["length"])
    assert said.err.startswith(clean_lines(first["messages"][2]["content"]))  # a person may read along


def test_settings_are_heeded(awake: Path) -> None:
    def asked(*options: str) -> str:
        return finetune("chat", RUN, "--prompt", "What is 3?", "--quiet", *SHORT, *options).out

    greedy, drawn = asked(), asked("--temperature", "1.5", "--seed", "3")
    assert asked("--temperature", "1.5", "--seed", "3") == drawn != greedy
    assert asked("--temperature", "1.5", "--seed", "4") != drawn
    assert asked("--temperature", "1.5", "--top-k", "1") == asked("--temperature", "1.5", "--top-p", "0") == greedy
    inside = finetune("chat", RUN, "--quiet", *SHORT, stdin="/temperature 1.5\n/seed 3\nWhat is 3?\n")
    assert inside.out == drawn
    short = finetune("chat", RUN, "--prompt", "Hello", "--temperature", "2", "--seed", "3", "--max-new-tokens", "1")
    assert "(cut at 1 tokens" in short.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--temperature", "3"), 2, "temperature is 3.0: give 0 (greedy) to 2"),
        (("--top-p", "1.2"), 2, "top_p is 1.2"),
        (("--compare", "runs/two"), 2, "only the run's own base"),
        (("--port", "80"), 2, "goes with --serve"),
        (("--serve", "--prompt", "x"), 2, "a request brings its own"),
        (("--prompt", "x " * 2000), 3, "positions for it and its answer"),
    ],
)
def test_what_cannot_be(finished: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    said = finetune("chat", RUN, *arguments)
    assert said.code == code
    assert text in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/temperature warm", "/temperature warm: give a number"),
        ("/top-k -3", "top_k is -3"),
        ("/max-new-tokens 0", "max-new-tokens is 0"),
        ("/nonsense", "no such command: /nonsense; /help lists them"),
        ("/save", "no such command: /save"),
        ("/save out.jsonl", "nothing was said yet"),
        ("/save no/such/folder/x.jsonl", "nothing was said yet"),
    ],
)
def test_a_faulty_command_in_a_pipe_ends_it(finished: Path, line: str, text: str) -> None:
    said = finetune("chat", RUN, stdin=f"{line}\nhi\n")
    assert said.code == 3
    assert text in said.err
    assert said.out == ""


def test_a_conversation_that_has_outgrown_the_model_begins_anew(
    awake: Path, scripted: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "positions", 60)
    said = finetune("chat", RUN, "--json", stdin="abcdefgh\nabcdefgh\nabcdefgh\n")
    assert said.code == 0
    assert "the conversation begins anew with this message" in said.err
    found = json.loads(said.out)["conversations"]
    assert sum(len(row["finish_reasons"]) for row in found) == 3  # no message was lost
    assert len(found) > 1


def test_saved_conversations_are_rows_to_train_on(awake: Path, scripted: list[tuple[int, bool]]) -> None:
    Path("mine.jsonl").write_text(json.dumps(runs.chat("old", "row")))  # without a newline at its end
    lines = (
        'a\n"""\nb\n\n  c\n"""\n/save mine.jsonl\n/system Sei kurz: é.\n//etc/hosts?\n/save mine.jsonl\n/quit\nnever\n'
    )
    said = finetune("chat", RUN, stdin=lines)
    assert (said.code, len(scripted)) == (0, 3)
    rows = [row.conversation.turns for row in runs.read_rows(Path("mine.jsonl"))]
    assert [[turn.content for turn in turns] for turns in rows] == [
        ["old", "row"],
        ["a", "answer 1", "b\n\n  c", "answer 2"],
        ["Sei kurz: é.", "/etc/hosts?", "answer 3"],
    ]
    assert finetune("data", "check", "mine.jsonl").code == 0


def test_base_and_adapter_answer_the_same_turn_each_with_its_own_history(awake: Path) -> None:
    said = finetune("chat", RUN, "--compare", "base", "--json", *SHORT, stdin="What is 3?\nAnd 4?\n")
    base, adapter = json.loads(said.out)["conversations"]
    assert (base["model"], adapter["model"]) == ("base", "adapter")
    alone = json.loads(finetune("chat", RUN, "--json", *SHORT, stdin="What is 3?\nAnd 4?\n").out)["conversations"]
    assert alone == [adapter]
    assert base["messages"] != adapter["messages"]
    bare = json.loads(finetune("chat", "base", "--json", "--prompt", "What is 3?", *SHORT).out)["conversations"]
    assert bare[0]["model"] == "model"
    # the run's base is the 4-bit one that it trained on: by its own answer, not by the folder's in fp32
    assert [message["role"] for message in base["messages"]] == ["user", "assistant"] * 2


def test_two_answers_under_each_other_where_there_is_no_terminal(awake: Path, scripted: list[tuple[int, bool]]) -> None:
    said = finetune("chat", RUN, "--compare", "base", stdin="a\n/undo\na\n")
    assert said.out == "[base]\nbase 1\n[adapter]\nanswer 2\n[base]\nbase 3\n[adapter]\nanswer 4\n"
    assert [adapter for _, adapter in scripted] == [False, True] * 2
    assert len({length for length, _ in scripted}) == 1


def test_two_answers_beside_each_other() -> None:
    from rich.console import Console

    out = io.StringIO()
    texts = [f"left {HOSTILE}", "right [bold]one[/bold] :smile:\n" + "word " * 40 + "日本語" * 20]
    chat.columns(["base", "adapter"], texts, Console(file=out, width=100, markup=False, highlight=False, emoji=False))
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["base", "adapter"]
    middle = lines[0].index("adapter")
    assert 40 < middle < 60
    assert "right [bold]one[/bold] :smile:" in lines[1][middle:]
    assert lines[1].startswith("left")
    assert [line[:middle].rstrip() for line in lines[2:6]] == ["second line", "", "- one", "    - two"]
    assert all(char.isprintable() for line in lines for char in line)
    assert sum(line.count("日本語") * 3 + line.count("日") for line in lines) >= 20  # nothing is cut off
    assert all(len(line) <= 100 for line in lines)


def test_a_model_folder_has_no_base_to_compare(finished: Path) -> None:
    said = finetune("chat", "base", "--compare", "base")
    assert said.code == 4
    assert "no adapter to compare with" in said.err


def test_chat_with_a_merged_folder(finished: Path) -> None:
    assert runs.merge_run().code == 0
    said = finetune("chat", "merged", "--prompt", "What is 3 and 4?", *SHORT)
    assert (said.code, said.err) == (0, "")
    assert said.out.strip()


def test_a_base_without_a_chat_template_says_so(finished: Path) -> None:
    (Path("base") / "chat_template.jinja").unlink()
    said = finetune("chat", "base", "--prompt", "hi")
    assert said.code == 4
    assert "no chat template" in said.err


def test_what_a_model_says_is_cleaned_and_keeps_its_lines(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hostile(self: Policy, prompts: Any, max_new_tokens: int, streamer: Any, sampling: Any) -> None:
        import torch

        streamer.put(torch.tensor(prompts))
        for token in self.tokenizer.encode(HOSTILE, add_special_tokens=False):
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(Policy, "generate", hostile)
    said = finetune("chat", RUN, stdin="hi\n")
    assert said.code == 0
    assert said.out.endswith("\nsecond line \n\n- one\n    - two\n")
    assert all(char.isprintable() or char == "\n" for char in said.out)
    assert "\u202e" not in said.out


class Screen:
    """A program in a terminal of its own; ``before``: what it does first."""

    def __init__(self, *arguments: str, columns: int = 80, before: str = "pass") -> None:
        self._terminal, inner = pty.openpty()
        program = f"{before}; import sys; from finetune import cli; sys.argv = ['finetune', *sys.argv[1:]]; cli.main()"
        environment = runs.ENVIRONMENT | {"COLUMNS": str(columns), "TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What came up to and with ``text``."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"no {text!r} in {self.seen[-2000:]!r}"
            if select.select([self._terminal], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self._terminal, 65536).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def until(self, act: Callable[[], None], text: str) -> str:
        """Do it again every few seconds until ``text`` comes: a signal between two readings of a key is not seen."""
        for _ in range(20):
            act()
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, seconds=3)
        raise AssertionError(f"no {text!r} in {self.seen[-2000:]!r}")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def screen(awake: Path) -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for one in opened:
        one.close()


def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(screen: list[Screen]) -> None:
    endless = "from finetune.model import Policy; Policy.stop_ids = lambda self: [-1]"  # no answer ends by itself
    screen.append(one := Screen("chat", RUN, "--max-new-tokens", "1000", before=endless))
    one.wait_for("Ctrl-D ends")
    one.wait_for("> ")
    one.type("hello\n")
    one.wait_for("hello\r\n")
    began = time.monotonic()
    one.interrupt()
    cut = one.until(lambda: one.type("/help\n"), "/max-new-tokens N")
    assert "(cut at" not in cut
    assert "now 1000" in one.wait_for("\n")
    assert time.monotonic() - began < 30
    one.until(one.interrupt, "(Ctrl-D or /quit leaves)")  # at the prompt it clears the line
    one.interrupt()
    one.interrupt()
    one.until(lambda: one.type("/nonsense\n"), "no such command: /nonsense")
    one.type("/max-new-tokens 3\nagain\n")
    one.wait_for("(cut at 3 tokens")
    one.wait_for("> ")
    one.type("\x04")
    assert one.process.wait(20) == 0


def test_ctrl_c_at_any_moment_leads_back_to_the_prompt(screen: list[Screen]) -> None:
    screen.append(one := Screen("chat", RUN, "--max-new-tokens", "2"))
    one.wait_for("> ")
    for number in range(60):
        one.type(("/help\n", "hello\n", "", "/nonsense\n")[number % 4])
        time.sleep(0.01 + 0.01 * (number % 7))  # each signal meets another moment; nothing is waited for
        one.interrupt()
    one.until(lambda: one.type("/temperature warm\n"), "give a number")
    one.until(lambda: one.type("\n/quit\n"), "/quit")
    assert one.process.wait(20) == 0


def test_a_wide_terminal_shows_two_columns(screen: list[Screen]) -> None:
    screen.append(one := Screen("chat", RUN, "--compare", "base", "--max-new-tokens", "4", columns=120))
    one.wait_for("> ")
    one.type("hello\n")
    heading = re.sub("\x1b\\[[0-9;]*m", "", one.wait_for("(cut at 4 tokens"))
    assert any(line.split() == ["base", "adapter"] for line in heading.splitlines())
    one.type("/quit\n")
    assert one.process.wait(20) == 0
