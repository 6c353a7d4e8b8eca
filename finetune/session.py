"""What a chat remembers: its settings, what was said, and by whom."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.answer import Answer, Asking, Speaker
from finetune.conversation import Conversation, Turn
from finetune.errors import DataError
from finetune.sampling import GREEDY, Sampling

NUMBERS = {"temperature": float, "top-p": float, "top-k": int, "seed": int, "max-new-tokens": int}
"""What can be set in a conversation, under the command line's own words."""


@dataclass
class Settings:
    """How every question is asked from now on."""

    system: str = ""
    sampling: Sampling = GREEDY
    max_new_tokens: int = 512

    def asking(self) -> Asking:
        return Asking(sampling=self.sampling, max_new_tokens=self.max_new_tokens)

    def change(self, word: str, text: str) -> None:
        """Set one of ``NUMBERS``. Raises ValueError, whose text says what it may be."""
        try:
            value = NUMBERS[word](text)
        except ValueError:
            raise ValueError(f"/{word} {text}: give a number") from None
        if word != "max-new-tokens":
            self.sampling = replace(self.sampling, **{word.replace("-", "_"): value})
        elif value < 1:
            raise ValueError(f"max-new-tokens is {value}: give 1 or more")
        else:
            self.max_new_tokens = int(value)

    def shown(self) -> dict[str, Any]:
        """As the command line calls them."""
        known = {word: getattr(self.sampling, word.replace("-", "_"), None) for word in NUMBERS}
        return known | {"max-new-tokens": self.max_new_tokens}


@dataclass
class Side:
    """One of those who answer, with its own history. ``finish``: how each of its answers ended."""

    name: str
    adapter: bool
    turns: tuple[Turn, ...] = ()
    finish: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        messages = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return {"model": self.name, "messages": messages, "finish_reasons": list(self.finish)}


@dataclass
class Session:
    """One side answers, or with ``compare`` the base and the adapter."""

    speaker: Speaker
    settings: Settings
    compare: bool = False
    sides: list[Side] = field(default_factory=list)
    past: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.anew()

    def anew(self) -> None:
        """Begin again, with the system prompt alone."""
        self.past += [side.row() for side in self.sides if side.finish]
        system = (Turn("system", self.settings.system),) if self.settings.system else ()
        own = "adapter" if self.speaker.base else "model"
        names = (("base", False), ("adapter", True)) if self.compare else ((own, True),)
        self.sides = [Side(name, adapter, system) for name, adapter in names]

    @property
    def begun(self) -> bool:
        return bool(self.sides[0].finish)

    def undo(self) -> None:
        """Take the last question and its answers back, where there is one."""
        if self.begun:
            for side in self.sides:
                side.turns, side.finish = side.turns[:-2], side.finish[:-1]

    def prompts(self, question: Turn) -> list[tuple[int, ...]]:
        """What each side is asked. Raises DataError as ``Speaker.prompt``."""
        return [self.speaker.prompt(Conversation((*side.turns, question))) for side in self.sides]

    def record(self, question: Turn, answers: list[Answer]) -> None:
        for side, said in zip(self.sides, answers, strict=True):
            side.turns = (*side.turns, question, Turn("assistant", said.text))
            side.finish = (*side.finish, said.ended)

    def rows(self) -> list[dict[str, Any]]:
        """Every conversation that was had."""
        return self.past + [side.row() for side in self.sides if side.finish]

    def save(self, path: Path) -> None:
        """Append the conversation (the adapter's) to a JSONL file, as one row to train on.

        Raises:
            DataError: nothing was said yet.
            OSError: as the disk says.
        """
        if not self.begun:
            raise DataError("nothing was said yet", str(path))
        line = json.dumps({"messages": self.sides[-1].row()["messages"]}, ensure_ascii=False) + "\n"
        with path.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                line = "\n" + line
            file.write(line.encode())
