"""One answer of a loaded model, piece by piece: what a conversation and the endpoint share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import bare, finished, gather
from finetune import base as bases
from finetune.conversation import Conversation, strings
from finetune.errors import DataError
from finetune.model import Policy
from finetune.rowcheck import LONE_SURROGATE
from finetune.sampling import GREEDY, Sampling
from finetune.terminal import Terminal

_UNFINISHED = "\ufffd"
"""What a text ends with while a character still lacks some of its bytes."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a question is answered. ``stop``: texts that end the answer, and are not part of it."""

    sampling: Sampling = GREEDY
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """``ids``: its tokens without the stop token. ``ended``: by "stop", by "length", or "cut" off on request."""

    text: str
    ids: tuple[int, ...]
    ended: str


@dataclass(frozen=True)
class Speaker:
    """A loaded model. ``name``: the folder's. ``base``: how its base is called in the recipe; empty for a model folder,
    which has no adapter. ``converted``: that base is read from the original layout."""

    policy: Policy
    name: str
    base: str = ""
    converted: bool = False

    def prompt(self, conversation: Conversation) -> tuple[int, ...]:
        """The ids that ask for the next turn.

        Raises:
            DataError: the template cannot render it, or it leaves no room for an answer.
        """
        renderer = self.policy.renderer
        _refuse_unreadable(conversation, renderer.literals)
        return self.fitting(renderer.prompt(conversation))

    def plain(self, text: str | tuple[int, ...]) -> tuple[int, ...]:
        """The ids of a text outside any template, as the tokenizer opens it; or ids, as given.

        Raises:
            DataError: it is empty, no text, has unknown ids, or leaves no room for an answer.
        """
        if isinstance(text, str) and LONE_SURROGATE.search(text):
            raise DataError("the text has half a surrogate pair", "", "write the whole character")
        ids = tuple(self.policy.tokenizer.encode(text)) if isinstance(text, str) else text
        known: int = self.policy.causal_lm.get_input_embeddings().weight.shape[0]
        if not ids or not all(0 <= token < known for token in ids):
            raise DataError(f"the prompt is empty, or has ids that are not below {known}", "", "mend it")
        return self.fitting(ids)

    @property
    def calls_tools(self) -> bool:
        """Whether the template teaches calls in the form that ``openai_api`` reads."""
        return "<tool_call>" in str(self.policy.tokenizer.chat_template)

    def fitting(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The same ids. Raises DataError where they leave no room for an answer."""
        if len(ids) >= self.policy.positions:
            what = f"it has {len(ids)} tokens, and the model {self.policy.positions} positions for it and its answer"
            raise DataError(what, "", "shorten it, or begin anew")
        return ids

    def answer(
        self, prompt: Sequence[int], asking: Asking, say: Callable[[str], None] = lambda _: None, *,
        adapter: bool = True, stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:  # fmt: skip
        """Answer; ``say`` gets the text as it grows. ``stopped`` is asked at every token and ends the answer there."""
        stream = _Stream(self.policy, asking.stop, say, stopped)
        room = min(asking.max_new_tokens, self.policy.positions - len(prompt))
        with self.policy.evaluating(adapter=adapter), contextlib.suppress(_Enough):
            self.policy.generate([prompt], room, stream, asking.sampling)
        return stream.finish()


class _Enough(Exception):  # noqa: N818 - no error: it ends a generation from inside
    pass


class _Stream:
    """Transformers calls ``put`` with the prompt, then with each new id, and ``end`` at the end."""

    def __init__(
        self, policy: Policy, stop: tuple[str, ...], say: Callable[[str], None], stopped: Callable[[], bool]
    ) -> None:
        self._policy, self._stop, self._say, self._stopped = policy, stop, say, stopped
        self._stops = set(policy.stop_ids())
        self._ids: list[int] = []
        self._ended = ""
        self._text = ""
        self._said = 0
        self._from = self._upto = 0  # ids whose text stands, with some before them that spacing may depend on
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return self._look()
        for token in value.reshape(-1).tolist():
            if token in self._stops:
                self._ended = "stop"
                return None
            self._ids.append(token)
        self._grow(last=False)
        return self._look()

    def end(self) -> None:
        """Nothing: ``finish`` also ends what was cut off."""

    def _look(self) -> None:
        if self._stopped():
            self._ended = "cut"
            raise _Enough

    def _grow(self, *, last: bool) -> None:
        """Add to the text what the new ids say, once their last character is whole, and say what stands."""
        before, now = (self._decoded(self._ids[self._from : end]) for end in (self._upto, len(self._ids)))
        if len(now) > len(before) and (last or not now.endswith(_UNFINISHED)):
            self._text += now[len(before) :]
            self._from, self._upto = self._upto, len(self._ids)
        cut = min((at for text in self._stop if (at := self._text.find(text)) >= 0), default=-1)
        if cut >= 0:
            self._text, self._ended = self._text[:cut], "stop"
        held = 0 if cut >= 0 or last else max((_overlap(self._text, text) for text in self._stop), default=0)
        if len(self._text) - held > self._said:
            self._say(self._text[self._said : len(self._text) - held])
            self._said = len(self._text) - held
        if cut >= 0 and not last:
            raise _Enough

    def _decoded(self, ids: list[int]) -> str:
        return str(self._policy.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def finish(self) -> Answer:
        self._grow(last=True)
        return Answer(self._text, tuple(self._ids), self._ended or "length")


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end may become that stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _refuse_unreadable(conversation: Conversation, special_tokens: Sequence[str]) -> None:
    """Half characters, and control tokens where they would act as such. Raises DataError."""
    calls = [call for turn in conversation.turns for call in turn.calls]
    framed = [*strings(conversation.tools), *strings([[call.name, call.arguments] for call in calls])]
    said = (text for turn in conversation.turns for text in (turn.content, turn.thinking))
    if any(LONE_SURROGATE.search(text) for text in (*said, *framed)):
        raise DataError("a text has half a surrogate pair", "", "write the whole character")
    if token := next((token for token in special_tokens if any(token in text for text in framed)), None):
        raise DataError(f"a tool or a tool call has the control token {token}", "", "remove it")


def load(folder: Path, terminal: Terminal) -> Speaker:
    """The model of a run folder, as it trained, or of a plain model folder.

    Special tokens that somebody writes in a message are text there, and never open a turn of another role.
    """
    place = bare.find(folder)
    bases.refuse_scorer(place or folder, "a conversation")
    if place is not None:
        speaker = Speaker(bare.inspect(place).load(terminal), _name(folder))
    else:
        prepared, files = finished.open_run(folder, terminal)
        policy = finished.live(prepared, files, terminal)[1]
        policy.renderer.thinking = prepared.recipe.data.thinking  # asks as the run was trained to be asked
        assert prepared.base is not None
        speaker = Speaker(policy, _name(folder), prepared.recipe.model, prepared.base.layout != "native")
    renderer = speaker.policy.renderer
    renderer.literals = tuple(gather.special_tokens(renderer))
    return speaker


def _name(folder: Path) -> str:
    return folder.resolve().name
