"""Conversations → ids with the model's own chat template, the answers marked.

What is trained is exactly what will be asked: the ids before an answer are the ids of the generation prompt, and the
answer ends with the turn's stop token, which is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from finetune.conversation import TEXT, THINKING, Conversation, Turn, without_thinking
from finetune.dataset import Example, Question, Row
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile("\ue000(\\d+)\ue001")
_REMEMBERED = 64
"""Stretches whose ids are remembered."""
_EDGE = 24
"""Characters of an answer within which a token that reaches back into the prompt would be seen."""
_REMOVE = "this template cannot be trained on such a row; remove it"


@dataclass(frozen=True)
class _Piece:
    """One trained answer: the prompt before it, its own ids with their weights, up to and with the stop token."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    apart: bool


class Renderer:
    """Turns conversations into ids with one tokenizer and its own chat template.

    ``piecewise``: a content's ids do not depend on what stands before it, as the original Qwen's chat encoding has it.
    ``train_on``: what is supervised, every assistant turn, the last one, or all of the row. ``thinking``: kept as the
    template renders it, stripped, or masked (read but not in the loss). ``literals``: special tokens that a content may
    hold as text; there they never become control tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token: str, *, piecewise: bool = False,
        train_on: str = "assistant", thinking: str = "keep", literals: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.stop_token = stop_token
        self.piecewise = piecewise
        self.train_on = train_on
        self.thinking = thinking
        self.literals = tuple(literals)
        self._backend: Any = tokenizer.backend_tokenizer
        self._frames: dict[str, tuple[int, ...]] = {}
        self._known: dict[str, list[int]] = {}
        self._separable = self._separates()

    def text(self, conversation: Conversation, where: str, *, prompt: bool) -> str:
        """The template's text; with ``prompt`` it ends where the assistant begins to answer. Raises DataError."""
        from jinja2 import TemplateError

        more: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
        if self.thinking == "strip":
            more["enable_thinking"] = False
        try:
            rendered = self.tokenizer.apply_chat_template(
                [self._message(turn) for turn in conversation.turns],
                tokenize=False, add_generation_prompt=prompt, **more,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template cannot render this: {error}", where, _REMOVE) from None
        assert isinstance(rendered, str)
        _refuse_lost(conversation, rendered, where)
        return rendered

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if self.thinking == "strip" and turn.role == "assistant":
            message["content"] = without_thinking(turn.content)
        elif turn.thinking:
            message["reasoning_content"] = turn.thinking
        if turn.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.calls
            ]
        return message

    def encode(self, text: str, sign: str = "") -> tuple[int, ...]:
        """The ids of rendered text. ``sign`` encloses the number of each literal that stands in it."""
        if not sign:
            *turns, rest = text.split(self.stop_token) if self._separable else [text]
            stretches = [turn + self.stop_token for turn in turns] + ([rest] if rest else [])
            return tuple(token for stretch in stretches for token in self._stretch(stretch))
        ids: list[int] = []
        for index, part in enumerate(re.split(f"{sign}(\\d+){sign}", text)):
            ids += self._plain(self.literals[int(part)]) if index % 2 else self.encode(part)
        return tuple(ids)

    def _stretch(self, text: str) -> list[int]:
        """Ids of a text. Earlier turns come again with each later prompt, system turns with each row."""
        known = self._known.get(text)
        if known is None:
            self._backend.encode_special_tokens = False  # the wrapper around the backend takes longer than the backend
            known = list(self._backend.encode(text, add_special_tokens=False).ids)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = known
        return known

    def _separates(self) -> bool:
        """Whether what follows a stop token has the ids that it has alone, so that stretches can be encoded apart."""
        token = self.tokenizer.added_tokens_decoder.get(self.tokenizer.convert_tokens_to_ids(self.stop_token))
        if token is None or not token.special or token.lstrip or token.rstrip or token.single_word:
            return False
        pairs = [(f"a{self.stop_token}", text) for text in (" b", "b", "\n\n b", "é", self.stop_token)]
        return all(self._stretch(one + two) == self._stretch(one) + self._stretch(two) for one, two in pairs)

    def normal(self, text: str) -> str:
        """The text as the tokenizer reads it: many, Qwen's among them, compose characters first (Unicode NFC)."""
        normalizer = None if text.isascii() else self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which no special token is known."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def prompt(self, conversation: Conversation, where: str = "") -> tuple[int, ...]:
        """Ids of the generation prompt: what the model sees before it answers."""
        if self.piecewise:
            return self._pieces(conversation, self.text(conversation, where, prompt=True), where)
        signed, sign = self._signed(conversation)
        return self.encode(self.text(signed, where, prompt=True), sign)

    def _pieces(self, conversation: Conversation, text: str, where: str) -> tuple[int, ...]:
        """Frame and contents tokenised apart: a content that opens with a newline must not fuse with the frame's, and
        a special token's name in it is text, not control."""
        turns = conversation.turns
        marked = tuple(replace(turn, content=f"\ue000{index}\ue001") for index, turn in enumerate(turns))
        parts = _MARK.split(self.text(replace(conversation, turns=marked), where, prompt=True))
        contents = [turns[int(index)].content for index in parts[1::2]]
        frame = parts[0::2]
        if "".join(one for pair in zip_longest(frame, contents, fillvalue="") for one in pair) != text:
            return self.encode(text)  # a template that changes its contents: only the whole can be tokenised
        ids = list(self.encode(frame[0]))
        for content, after in zip(contents, frame[1:], strict=True):
            ids += self._plain(content)
            ids += self.encode(after)
        return tuple(ids)

    def _signed(self, conversation: Conversation) -> tuple[Conversation, str]:
        """The conversation with each declared literal replaced by its number between two signs that it does not use."""
        texts = [text for turn in conversation.turns for text in (turn.content, turn.thinking)]
        if not any(literal in text for literal in self.literals for text in texts):
            return conversation, ""
        used = set("".join(texts))
        sign = next(chr(code) for code in range(0xE100, 0xF8FF) if chr(code) not in used)
        order = sorted(range(len(self.literals)), key=lambda i: -len(self.literals[i]))
        turns = []
        for turn in conversation.turns:
            content, thinking = turn.content, turn.thinking
            for index in order:
                number = f"{sign}{index}{sign}"
                content, thinking = (text.replace(self.literals[index], number) for text in (content, thinking))
            turns.append(replace(turn, content=content, thinking=thinking))
        return replace(conversation, turns=tuple(turns)), sign

    def question(self, row: Row) -> Question:
        """The row's last answer, asked."""
        turns = row.conversation.turns
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        if last is None:
            raise DataError("plain text asks nothing", row.where, "use evaluate.metrics: [loss]")
        signed, sign = self._signed(row.conversation)
        _, answer = self._halves(signed, last, row.where)
        if sign:
            answer = re.sub(f"{sign}(\\d+){sign}", lambda found: self.literals[int(found[1])], answer)
        answer = self.normal(without_thinking(answer))
        return Question(prompt=self.prompt(row.conversation.upto(last), row.where), answer=answer, where=row.where)

    def examples(self, row: Row) -> list[Example]:
        """The row as training samples: one, with every trained answer supervised.

        Where the template rewrites earlier turns once a later one follows (Qwen3 drops earlier thinking), no single
        text contains every prompt; the row then gives one sample per answer, each with the prompt it will really have.
        """
        turns = row.conversation.turns
        if turns[0].role == TEXT:
            return [self._plain_text(row)]
        everything = self.train_on == "all"  # answers of weight 0 stay context all the same
        answers = [i for i, turn in enumerate(turns) if turn.answers or (everything and turn.role == "assistant")]
        if self.train_on == "last":
            answers = answers[-1:]
        pieces = [self._answer(row, index) for index in answers]
        context = 1.0 if everything else 0.0
        whole = _joined(row, pieces, context)
        if whole is not None:
            return [whole]
        return [_alone(row, piece, context) for piece in pieces if any(piece.weights)]

    def _plain_text(self, row: Row) -> Example:
        """A text outside any template, as the tokenizer opens it (some have a token for that), and its end."""
        end = self.tokenizer.eos_token_id
        ids = list(self.tokenizer.encode(row.conversation.turns[0].content, add_special_tokens=True))
        if ids[-1] != end:
            ids.append(end)
        weight = row.conversation.turns[0].weight
        return Example(ids=tuple(ids), weights=(0.0, *(weight,) * (len(ids) - 1)), where=row.where)

    def _answer(self, row: Row, index: int) -> _Piece:
        conversation, sign = self._signed(row.conversation)
        turn = conversation.turns[index]
        prompt, answer = self._halves(conversation, index, row.where)
        self._refuse_unsaid(turn, answer, row.where)
        block = THINKING.match(answer) if self.thinking == "mask" else None
        unseen = self.encode(block.group(), sign) if block else ()
        said = self.encode(answer[block.end() if block else 0 :] + self.stop_token, sign)
        ids = self.prompt(row.conversation.upto(index), row.where) if self.piecewise else self.encode(prompt, sign)
        return _Piece(
            prompt=ids, ids=unseen + said, weights=(0.0,) * len(unseen) + (turn.weight,) * len(said),
            apart=bool(sign) or self._fuses(ids, prompt, answer),
        )  # fmt: skip

    def _halves(self, conversation: Conversation, index: int, where: str) -> tuple[str, str]:
        """The prompt of the answer at ``index``, and the answer as the template renders it before its stop token."""
        prompt = self.text(conversation.upto(index), where, prompt=True)
        full = self.text(conversation.upto(index + 1), where, prompt=False)
        if not full.startswith(prompt):
            what = "the chat template renders this answer differently from its own generation prompt"
            raise DataError(what, where, _REMOVE)
        answer, stop, _ = full[len(prompt) :].partition(self.stop_token)
        if not stop:
            what = f"the template ends the answer without {self.stop_token}: the model would never learn to stop"
            raise DataError(what, where, "use a chat template that closes each turn")
        return prompt, answer

    def _fuses(self, ids: tuple[int, ...], prompt: str, answer: str) -> bool:
        """Whether prompt and answer in one piece would have other ids."""
        if self.piecewise and ids != self.encode(prompt):
            return True
        frame = prompt[prompt.rfind(">") + 1 :]  # what follows the last control token
        if frame not in self._frames:
            self._frames = {frame: self.encode(frame)}  # nearly always the same one
        alone = self._frames[frame]
        return self.encode(frame + answer[:_EDGE])[: len(alone)] != alone

    def _refuse_unsaid(self, turn: Turn, answer: str, where: str) -> None:
        """What a turn has besides its content, and the template passes over."""
        if self.thinking != "strip" and turn.thinking.strip() not in answer:
            fix = "set data.thinking: strip, or use a template that renders it"
            raise DataError("the chat template leaves this answer's thinking out", where, fix)
        if self.thinking == "strip" and not turn.calls and not self._message(turn)["content"].strip():
            raise DataError("nothing is left of this answer without its thinking", where, "drop the row")
        if not all(call.name in answer for call in turn.calls):
            raise DataError("the chat template leaves this answer's tool calls out", where, _REMOVE)


def _refuse_lost(conversation: Conversation, text: str, where: str) -> None:
    """A template that drops a content or the tools trains something other than the row. Raises DataError.

    Thinking may go: templates drop that of earlier answers.
    """
    for number, turn in enumerate(conversation.turns, 1):
        if turn.content.rpartition("</think>")[2].strip() not in text:
            raise DataError(f"the chat template leaves out or changes turn {number} ({turn.role})", where, _REMOVE)
    for tool in conversation.tools:
        if str(tool["function"]["name"]) not in text:
            raise DataError("the chat template leaves the tools out", where, _REMOVE)


def _alone(row: Row, piece: _Piece, context: float) -> Example:
    weights = _from_second((context,) * len(piece.prompt) + piece.weights)
    return Example(ids=piece.prompt + piece.ids, weights=weights, where=row.where, apart=piece.apart)


def _from_second(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Nothing precedes the first token, so nothing can predict it."""
    return 0.0, *weights[1:]


def _joined(row: Row, pieces: list[_Piece], context: float) -> Example | None:
    """All answers in one sample, if each later prompt continues, id by id, what came before it."""
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    for piece in pieces:
        if piece.prompt[: len(ids)] != ids:
            return None
        between = piece.prompt[len(ids) :]
        ids += between + piece.ids
        weights += (context,) * len(between) + piece.weights
    return Example(ids=ids, weights=_from_second(weights), where=row.where, apart=any(piece.apart for piece in pieces))
