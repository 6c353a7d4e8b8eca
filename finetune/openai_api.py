"""OpenAI's shapes: what a request may say, and how answers and errors are written.

What would change an answer and cannot be served is refused, never passed over; what changes nothing is let through.
Source: OpenAI's API reference, "Chat" and "Completions (legacy)", and the types of its Python client.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import messages
from finetune.answer import Answer, Asking
from finetune.conversation import Conversation, RowFault
from finetune.errors import FinetuneError
from finetune.terminal import clean

_STOPS = 16
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Refusal(Exception):  # noqa: N818 - the answer to a request
    """An error in OpenAI's shape. ``status``: HTTP's."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": clean(message, 600), "type": kind, "param": param, "code": code}}
        super().__init__(message)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Any = None


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class Asked(BaseModel):
    """What both kinds of request may say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # These are served with the one value that asks for nothing.
    n: int | None = Field(None, ge=1, le=1)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    # These say nothing about the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def longest(self) -> int | None:
        return self.max_tokens

    def asking(self, usual: Asking) -> Asking:
        """As the server answers by itself, but for what the request says."""
        said = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        sampling = replace(usual.sampling, **{name: value for name, value in said.items() if value is not None})
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > _STOPS or "" in stop:
            raise Refusal(400, f"stop: give at most {_STOPS} texts, none of them empty", param="stop")
        return Asking(sampling=sampling, max_new_tokens=self.longest() or usual.max_new_tokens, stop=tuple(stop))

    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: _ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)

    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> Conversation:
        """What is asked, with the tools that may be called. Raises Refusal."""
        try:
            tools = () if self.tool_choice == "none" else messages.tools_of({"tools": self.tools})
            return Conversation(messages.listed(self.messages, "messages"), tools)
        except RowFault as fault:
            raise Refusal(400, str(fault), param=fault.column) from None


class CompletionRequest(Asked):
    """``POST /v1/completions``: a text that is gone on with, outside any template."""

    prompt: str | list[int] | list[str]
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=1)
    logprobs: None = None
    suffix: None = None

    def asked(self) -> str | tuple[int, ...]:
        """A text, or ids. Raises Refusal."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1 and isinstance(self.prompt[0], str):
            return self.prompt[0]
        ids = tuple(token for token in self.prompt if isinstance(token, int))
        if not ids or len(ids) < len(self.prompt):
            raise Refusal(400, "prompt: one text, or one list of token ids, at a time", param="prompt")
        return ids


def read(body: bytes, shape: type[Asked]) -> Any:
    """A request's body as ``shape``. Raises Refusal."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = "is not served here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{place}: {what}", param=clean(place)) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON object: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def refused(error: FinetuneError) -> Refusal:
    """What cannot be asked of the model, as an answer."""
    what, _, fix = error.faults[0]
    code = "context_length_exceeded" if "positions" in what else None
    return Refusal(400, f"{what}; {fix}" if fix else what, code=code)


@dataclass(frozen=True)
class Reply:
    """The parts of one answer. ``chat``: to a chat request, else to a completion. ``tools``: calls are looked for."""

    model: str
    chat: bool
    tools: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, said: Answer, prompt_tokens: int) -> dict[str, Any]:
        text, calls = self._parted(said)
        body: dict[str, Any] = {"text": said.text}
        if self.chat:
            body = {"message": {"role": "assistant", "content": text or None if calls else text, "refusal": None}}
            if calls:
                body["message"]["tool_calls"] = calls
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": "tool_calls" if calls else said.ended}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, [choice]) | {"usage": usage(said, prompt_tokens)}

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}) if self.chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else {"text": text})

    def ending(self, said: Answer) -> list[dict[str, Any]]:
        """What a stream ends with. Where tools may be called it is all of the answer."""
        if not self.tools:
            return [self._chunk({} if self.chat else {"text": ""}, said.ended)]
        text, calls = self._parted(said)
        numbered = [{"index": index, **call} for index, call in enumerate(calls)]
        chunks = [self._chunk({"content": text})] if text else []
        chunks += [self._chunk({"tool_calls": [call]}) for call in numbered]
        return [*chunks, self._chunk({}, "tool_calls" if calls else said.ended)]

    def last(self, said: Answer, prompt_tokens: int) -> dict[str, Any]:
        """The chunk of a stream whose usage was asked for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._frame(kind, []) | {"usage": usage(said, prompt_tokens)}

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else delta
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _parted(self, said: Answer) -> tuple[str, list[dict[str, Any]]]:
        return parted(said.text) if self.tools else (said.text, [])


def usage(said: Answer, prompt_tokens: int) -> dict[str, int]:
    """Tokens of the prompt, and of the answer without its stop token."""
    count = len(said.ids)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}


def parted(text: str) -> tuple[str, list[dict[str, Any]]]:
    """An answer → its text, and its calls in the form that Qwen's templates write (``<tool_call>{…}</tool_call>``).

    Where one of them is no call, all stays text.
    """
    calls = []
    for written in _CALL.findall(text):
        try:
            call = json.loads(written, parse_constant=_refuse_constant)
            name, arguments = call["name"], call.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                return text, []
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return text, []
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return (_CALL.sub("", text).strip() if calls else text), calls
