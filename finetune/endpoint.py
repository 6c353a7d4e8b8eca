"""The requests of OpenAI's API, answered one at a time; others wait in line.

Every request needs the start's token, and a Host header that names this machine: a page in a browser has neither.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.answer import Answer, Asking, Speaker
from finetune.conversation import Conversation
from finetune.errors import FinetuneError
from finetune.openai_api import Asked, ChatRequest, CompletionRequest, Refusal, Reply, read, refused

HERE = ("127.0.0.1", "localhost")
_LONGEST_BODY = 4 * 2**20
_WAITING = 64
"""Requests in line; beyond that one is told to come later."""


Question = Conversation | str | tuple[int, ...]
"""Turns, a text to go on with, or its ids."""


def voices(speaker: Speaker) -> dict[str, bool]:
    """The models that may be asked for → whether with the adapter: the run by its folder's name, and its base."""
    if not speaker.base:
        return {speaker.name: True}
    return {speaker.name if speaker.name != "base" else "adapter": True, "base": False}


@dataclass
class Job:
    """One answer in the making. ``news``: the prompt's tokens, pieces of text, and None at the end, in this order."""

    news: asyncio.Queue[int | str | None] = field(default_factory=asyncio.Queue)
    stopped: bool = False
    made: asyncio.Future[Answer] = field(init=False)


class Line:
    """The one thread that asks the model; who comes while it is busy waits. Tokenizers are not safe in two threads."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.closing = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._jobs: set[asyncio.Future[Answer]] = set()

    def ask(self, asked: Question, asking: Asking, *, with_adapter: bool) -> Job:
        """Queue a question. Raises Refusal where the line is too long."""
        if len(self._jobs) > _WAITING:
            raise Refusal(429, f"{_WAITING} requests are waiting already; try again later", code="rate_limit_exceeded")
        loop, job = asyncio.get_running_loop(), Job()

        def tell(news: int | str) -> None:
            loop.call_soon_threadsafe(job.news.put_nowait, news)

        def stopped() -> bool:
            return job.stopped or self.closing

        def work() -> Answer:
            if stopped():
                return Answer("", (), "cut")
            prompt = self._ids(asked)
            tell(len(prompt))
            return self.speaker.answer(prompt, asking, tell, adapter=with_adapter, stopped=stopped)

        job.made = loop.run_in_executor(self._thread, work)
        self._jobs.add(job.made)
        job.made.add_done_callback(self._jobs.discard)
        job.made.add_done_callback(lambda _: job.news.put_nowait(None))
        return job

    def _ids(self, asked: Question) -> tuple[int, ...]:
        if isinstance(asked, Conversation):
            return self.speaker.prompt(asked)
        return self.speaker.plain(asked)

    def close(self) -> None:
        """End the answer in the making at its next token, and those in line before they begin."""
        self.closing = True


class _Gate:
    """Refuses whoever does not know the token, or came by another host's name (DNS rebinding)."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (_response(refusal) if refusal else self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        named = [value for name, value in scope["headers"] if name == b"host"]
        if len(named) != 1 or named[0].partition(b":")[0].decode("latin-1") not in HERE:
            return Refusal(403, f"ask for {HERE[0]} or {HERE[1]}", code="wrong_host")
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not secrets.compare_digest(given[0], self._token):
            return Refusal(401, "the token that the start printed is missing or wrong", code="invalid_api_key")
        return None


def _response(refusal: Refusal) -> JSONResponse:
    more = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(refusal.body, refusal.status, more)


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return _response(refusal)
        except FinetuneError as error:
            return _response(refused(error))
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:  # noqa: BLE001 - a request never ends the server, nor shows a traceback
            return _response(_failure(error))

    return endpoint


def _failure(error: Exception) -> Refusal:
    return Refusal(500, f"the model could not answer: {type(error).__name__}: {error}")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


class _Endpoint:
    def __init__(self, line: Line, usual: Asking) -> None:
        self._line, self._usual, self._voices = line, usual, voices(line.speaker)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in self._voices]})

    async def model(self, request: Request) -> Response:
        self._voice(request.path_params["name"])
        return JSONResponse(_card(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        asked: ChatRequest = read(await _body(request), ChatRequest)
        conversation = asked.conversation()
        calls = bool(conversation.tools) and self._line.speaker.calls_tools
        return await self._answer(request, asked, conversation, Reply(asked.model, True, calls))

    async def completions(self, request: Request) -> Response:
        asked: CompletionRequest = read(await _body(request), CompletionRequest)
        return await self._answer(request, asked, asked.asked(), Reply(asked.model, False))

    async def _answer(self, request: Request, asked: Asked, question: Question, reply: Reply) -> Response:
        job = self._line.ask(question, asked.asking(self._usual), with_adapter=self._voice(asked.model))
        gone = asyncio.ensure_future(_until_gone(request, job))
        try:
            begun = await job.news.get()
            if begun is None:  # it ended before the model was asked
                await job.made
                raise _ending()
            assert isinstance(begun, int)
            if not asked.stream:
                while await job.news.get() is not None:
                    pass
                said = await job.made
                if said.ended == "cut":
                    raise _ending()
                return JSONResponse(reply.whole(said, begun))
        except asyncio.CancelledError:
            job.stopped = True
            raise
        finally:
            gone.cancel()
        events = _events(job, reply, begun, with_usage=asked.usage_wanted())
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _voice(self, name: str) -> bool:
        if name not in self._voices:
            what = f"the model {name!r} is not served here; there is {', '.join(self._voices)}"
            raise Refusal(404, what, param="model", code="model_not_found")
        return self._voices[name]


async def _events(job: Job, reply: Reply, prompt_tokens: int, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. Whoever stops listening ends the answer."""
    try:
        if opening := reply.opening():
            yield _event(opening)
        while (text := await job.news.get()) is not None:
            if not reply.tools:
                yield _event(reply.piece(str(text)))
        try:
            said = await job.made
            if said.ended == "cut":
                raise _ending()
            for chunk in reply.ending(said):
                yield _event(chunk)
            if with_usage:
                yield _event(reply.last(said, prompt_tokens))
        except Exception as error:  # noqa: BLE001 - the status was sent: the error is an event
            yield _event((error if isinstance(error, Refusal) else _failure(error)).body)
        yield "data: [DONE]\n\n"
    finally:
        job.stopped = True


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _until_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.stopped = True


def _ending() -> Refusal:
    return Refusal(503, "the server is ending", code="server_ending")


async def _body(request: Request) -> bytes:
    """The request's body. Raises Refusal for one that is too large, before all of it has come."""
    found = b""
    async for piece in request.stream():
        found += piece
        if len(found) > _LONGEST_BODY:
            raise Refusal(413, f"the body is larger than {_LONGEST_BODY // 2**20} MiB")
    return found


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "finetune"}


def app(line: Line, usual: Asking, token: str) -> ASGIApp:
    """The endpoint. ``usual``: how a request is answered that does not say how."""
    serving = _Endpoint(line, usual)
    routes = [
        Route("/v1/models", _guarded(serving.models)),
        Route("/v1/models/{name:path}", _guarded(serving.model)),
        Route("/v1/chat/completions", _guarded(serving.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(serving.completions), methods=["POST"]),
    ]
    handlers: Any = {HTTPException: _http_error}
    return Starlette(routes=routes, middleware=[Middleware(_Gate, token=token)], exception_handlers=handlers)
