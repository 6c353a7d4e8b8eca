"""The start of an endpoint on 127.0.0.1: its port, its token, and what it says about serving in earnest."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import socket
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from finetune import answer, checkpoint, endpoint
from finetune.answer import Asking, Speaker
from finetune.endpoint import HERE, Line
from finetune.errors import EnvironmentFault
from finetune.exporters import adapter
from finetune.runfolder import RunFolder
from finetune.terminal import Terminal, clean

TOKEN = "FINETUNE_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_GRACE = 5
"""Seconds that open connections have at the end."""


def serve(folder: Path, port: int, usual: Asking, terminal: Terminal) -> None:
    """Serve until Ctrl-C. ``usual``: how a request is answered that does not say how.

    Raises:
        EnvironmentFault: the port is taken, or the token of the environment is too short.
        ModelError: no model is there.
    """
    token, given = _token(), TOKEN in os.environ
    with _listening(port) as opened:
        speaker = answer.load(folder, terminal)
        line = Line(speaker)
        where, models = f"http://{HERE[0]}:{opened.getsockname()[1]}/v1", ", ".join(endpoint.voices(speaker))
        terminal.say(f"{clean(str(folder))}: {where}   models: {clean(models)}   (Ctrl-C ends)")
        terminal.say(f"token: {f'that of {TOKEN}' if given else token}   (Authorization: Bearer …)")
        terminal.say("for trying out: one answer at a time, nothing is kept. For production:")
        for command in production(folder, speaker):
            terminal.say(f"  {clean(command, 600)}")
        with contextlib.suppress(KeyboardInterrupt):  # the server hands the signal on when it has ended
            Server(endpoint.app(line, usual, token), line).run(sockets=[opened])
    terminal.say("ended")


def _token() -> str:
    token = os.environ.get(TOKEN)
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        fix = "leave it out: a start makes one"
        raise EnvironmentFault(f"needs {_SHORTEST_TOKEN} printable ASCII characters or more", TOKEN, fix)
    return token or secrets.token_urlsafe(24)


def _listening(port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HERE[0], port))
        opened.listen()
    except OSError as error:
        opened.close()
        what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise EnvironmentFault(f"port {port} {what}", "--port", "give another one; 0 takes a free one") from None
    return opened


def production(folder: Path, speaker: Speaker) -> list[str]:
    """What to type to serve the same with vLLM, by what `finetune export` and `finetune merge` write."""
    if not speaker.base:
        return [shlex.join(["vllm", "serve", str(folder)])]
    read = checkpoint.read_adapter(RunFolder(folder).adapter)
    merged = f"{speaker.name}-merged"
    if speaker.converted or adapter.refusals(read.config, read.weights, "vllm"):
        return [shlex.join(["finetune", "merge", str(folder), "--out", merged]), shlex.join(["vllm", "serve", merged])]
    out, (name, _) = f"{speaker.name}-adapter", endpoint.voices(speaker)
    export = ["finetune", "export", str(folder), "--to", "adapter", "--target", "vllm", "--out", out]
    lora = ["--enable-lora", "--max-lora-rank", str(adapter.vllm_rank(read.weights)), "--lora-modules", f"{name}={out}"]
    return [shlex.join(export), shlex.join(["vllm", "serve", speaker.base, *lora])]


class Server(uvicorn.Server):
    """Uvicorn, quiet, which ends answers when it is told to end: it waits for them."""

    def __init__(self, application: ASGIApp, line: Line) -> None:
        super().__init__(
            uvicorn.Config(
                application, http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None,
                log_level="critical", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE,
            )
        )  # fmt: skip
        self._line = line

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._line.close()
        super().handle_exit(sig, frame)
