"""Conversations → ids with the model's own chat template, the answers marked.

What is trained is exactly what will be asked: the ids before an answer are the ids of the generation prompt, and the
answer ends with the turn's stop token, which is supervised.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from finetune.dataset import Example, Question, Row
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.conversation import Conversation

_MARK = re.compile("\ue000(\\d+)\ue001")


class Renderer:
    """Turns conversations into ids with one tokenizer and its own chat template.

    ``piecewise``: a content's ids do not depend on what stands before it, as the original Qwen's chat encoding has it.
    ``train_on``: what is supervised, every assistant turn, the last one, or all of the row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token: str,
        *,
        piecewise: bool = False,
        train_on: str = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_token = stop_token
        self.piecewise = piecewise
        self.train_on = train_on

    def text(self, turns: Conversation, where: str, *, prompt: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError) as error:
            what = f"the chat template cannot render this: {error}"
            raise DataError(what, where, "this template cannot be trained on such a row; remove it") from None
        assert isinstance(rendered, str)
        return rendered

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, turns: Conversation, where: str = "") -> tuple[int, ...]:
        """Ids of the generation prompt: what the model sees before it answers."""
        text = self.text(turns, where, prompt=True)
        return self._pieces(turns, text, where) if self.piecewise else self.encode(text)

    def _pieces(self, turns: Conversation, text: str, where: str) -> tuple[int, ...]:
        """Frame and contents tokenised apart: a content that opens with a newline must not fuse with the frame's, and
        a special token's name in it is text, not control."""
        marks = [f"\ue000{index}\ue001" for index in range(len(turns))]
        marked = [replace(turn, content=mark) for turn, mark in zip(turns, marks, strict=True)]
        parts = _MARK.split(self.text(tuple(marked), where, prompt=True))
        contents = [turns[int(index)].content for index in parts[1::2]]
        frame = parts[0::2]
        if "".join(one for pair in zip_longest(frame, contents, fillvalue="") for one in pair) != text:
            return self.encode(text)  # a template that changes its contents: only the whole can be tokenised
        ids = list(self.encode(frame[0]))
        for content, after in zip(contents, frame[1:], strict=True):
            ids += self.tokenizer.encode(content, add_special_tokens=False, split_special_tokens=True)
            ids += self.encode(after)
        return tuple(ids)

    def question(self, row: Row) -> Question:
        """The row's last answer, asked."""
        last = max(i for i, turn in enumerate(row.conversation) if turn.role == "assistant")
        turns = row.conversation[:last]
        return Question(prompt=self.prompt(turns, row.where), answer=row.conversation[last].content, where=row.where)

    def examples(self, row: Row) -> list[Example]:
        """The row as training samples: one, with every trained answer supervised.

        Where the template rewrites earlier turns once a later one follows (Qwen3 drops earlier thinking), no single
        text contains every prompt; the row then gives one sample per answer, each with the prompt it will really have.
        """
        answers = [i for i, turn in enumerate(row.conversation) if turn.role == "assistant" and turn.train]
        if self.train_on == "last":
            answers = answers[-1:]
        pieces = [self._answer(row, index) for index in answers]
        whole = self._joined(row, pieces)
        made = (
            [whole]
            if whole is not None
            else [
                Example(ids=prompt + answer, supervised=(False,) * len(prompt) + (True,) * len(answer), where=row.where)
                for _, prompt, answer in pieces
            ]
        )
        if self.train_on == "all":  # but the first token, which nothing precedes
            return [replace(one, supervised=(False, *(True,) * (len(one.ids) - 1))) for one in made]
        return made

    def _answer(self, row: Row, index: int) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """(prompt's text, prompt's ids, answer's ids up to and with the stop token) of the turn at ``index``."""
        prompt = self.text(row.conversation[:index], row.where, prompt=True)
        full = self.text(row.conversation[: index + 1], row.where, prompt=False)
        if not full.startswith(prompt):
            raise DataError(
                "the chat template renders this answer differently from its own generation prompt",
                row.where,
                "this template cannot be trained on such a row; remove it",
            )
        answer, stop, _ = full[len(prompt) :].partition(self.stop_token)
        if not stop:
            what = f"the template ends the answer without {self.stop_token}: the model would never learn to stop"
            raise DataError(what, row.where, "use a chat template that closes each turn")
        return prompt, self.prompt(row.conversation[:index], row.where), self.encode(answer + stop)

    def _joined(self, row: Row, pieces: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> Example | None:
        """All answers in one sample, if each later prompt continues, id by id, what came before it."""
        ids: tuple[int, ...] = ()
        supervised: tuple[bool, ...] = ()
        for _, prompt, answer in pieces:
            if prompt[: len(ids)] != ids:
                return None
            between = prompt[len(ids) :]
            ids += between + answer
            supervised += (False,) * len(between) + (True,) * len(answer)
        return Example(ids=ids, supervised=supervised, where=row.where)
