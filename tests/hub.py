"""A small hub on this machine: one repository's listing and files over HTTP, with the faults that a test asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "Acme/Tiny-1.5B"
OLD, NEW = "a" * 40, "b" * 40
_LARGE = (".safetensors", ".bin", "tokenizer.json", ".gguf")


@dataclass
class Asked:
    """One request as it came, and the status it was answered with."""

    path: str
    headers: dict[str, str]
    status: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass
class Hub:
    """``commits``: commit → file name → bytes. Every other field is a fault, and all are off."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    token: str | None = None
    gated: bool = False
    """Files only for ``token``; the listing is open, as the hub's is."""
    private: bool = False
    status: int = 0
    """Answered to every request."""
    statuses: list[int] = field(default_factory=list)
    """Answered to the next requests, one each; 0 is a right answer."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """The next answers with this file end after so many bytes, and the connection with them."""
    instead: dict[str, bytes] = field(default_factory=dict)
    """Other bytes than the listing names."""
    ranges: bool = True
    listing: Any = None
    """Sent as the listing, whatever was asked for."""
    said: dict[str, str] = field(default_factory=dict)
    """The body of refusals."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def files_asked(self) -> list[str]:
        """File names in the order asked for; where the hub sent the asker on to its store, once."""
        return [asked.name for asked in self.asked if "/resolve/" in asked.path]

    def describe(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.commits[commit].items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith(_LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPO, "sha": commit, "siblings": siblings}


class Answering(BaseHTTPRequestHandler):
    """Answers whole or cut off, and notes what was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and a body are two writes, and the second would wait 40 ms
    hub: Any

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        headed = {key.lower(): word for key, word in self.headers.items()}
        self.hub.asked.append(Asked(urlsplit(self.path).path, headed, status))
        self.send_response(status)
        for key, word in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, word)
        self.end_headers()
        with suppress(ConnectionError):  # who asked may have seen enough
            self.wfile.write(b"" if self.command == "HEAD" else body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(hub: Any, answering: type[Answering]) -> Iterator[None]:
    """A server of that hub on a free port of this machine, while inside."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (answering,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(Answering):
    hub: Hub

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        status = hub.status or (hub.statuses.pop(0) if hub.statuses else 0)
        allowed = hub.token is None or self.headers["authorization"] == f"Bearer {hub.token}"
        if status:
            self._refuse(status)
        elif parts[0] == "store":
            self._send(parts[-1], hub.commits[parts[1]][parts[-1]])
        elif self.headers["authorization"] and not allowed and not hub.gated:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif (hub.private and not allowed) or REPO not in url.path:
            self._refuse(401, "RepoNotFound")
        elif parts[:2] == ["api", "models"]:
            self._list(parts[-1], "blobs" in parse_qs(url.query))
        elif hub.gated and not allowed:
            self._refuse(403 if self.headers["authorization"] else 401, "GatedRepo")
        elif parts[-1].endswith(_LARGE):
            # Another host, as the hub's store is.
            self._answer(302, b"", {"location": f"http://localhost:{hub.port}/store/{parts[3]}/{parts[-1]}"})
        else:
            self._send(parts[-1], hub.commits[parts[3]][parts[-1]])

    def _list(self, revision: str, blobs: bool) -> None:
        commit = self.hub.refs.get(revision, revision)
        if self.hub.listing is not None:
            sent = self.hub.listing
            self._answer(200, sent if isinstance(sent, bytes) else json.dumps(sent).encode())
        elif commit not in self.hub.commits or not blobs:
            self._refuse(404, "RevisionNotFound")
        else:
            self._answer(200, json.dumps(self.hub.describe(commit)).encode())

    def _send(self, name: str, data: bytes) -> None:
        data = self.hub.instead.get(name, data)
        start, asked = 0, self.headers["range"]
        if asked and self.hub.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0:
            self._refuse(416)
            return
        cuts = self.hub.cuts.get(name)
        extra = {"content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self._answer(206 if start else 200, data[start:], extra, cuts.pop(0) if cuts else None)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"x-error-code": code, "x-error-message": message, "content-type": "application/json"}
        self._answer(status, json.dumps(self.hub.said).encode(), {key: word for key, word in headers.items() if word})


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port while inside."""
    with serving(hub, _Handler):
        yield hub
