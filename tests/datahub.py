"""A small hub of data sets on this machine: what ``datasets`` asks for when it streams one, with the faults that a test
asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import NEW, OLD, Answering, Asked, serving

__all__ = ["NEW", "OLD", "REPO", "DataHub", "running"]
REPO = "Acme/Chat-Rows"


@dataclass
class DataHub:
    """``commits``: commit → file name → bytes. Every other field is a fault, and all are off."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    token: str | None = None
    gated: bool = False
    """Files only for ``token``; the description is open, as the hub's is."""
    private: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """The next answers with this file end after so many bytes, and the connection with them."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Answered to every request for this file."""
    described: Any = None
    """Sent as the description, whatever was asked for."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entries(self, commit: str, above: str, deep: bool) -> list[dict[str, Any]]:
        """The tree's folders and files below ``above``."""
        found: dict[str, dict[str, Any]] = {}
        start = f"{above}/" if above else ""
        for name, data in self.commits[commit].items():
            if not name.startswith(start):
                continue
            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                path = start + "/".join(parts[:depth])
                if deep or depth == 1:
                    found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            if deep or len(parts) == 1:
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return list(found.values())


class _Handler(Answering):
    hub: DataHub

    def do_HEAD(self) -> None:  # noqa: N802 - the library names it
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802 - the library names it
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path).strip("/")
        given = self.headers["authorization"]
        allowed = hub.token is None or given == f"Bearer {hub.token}"
        if given and not allowed and not hub.gated:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif (hub.private and not allowed) or REPO not in path:
            self._refuse(401 if hub.private or "/api/" in self.path else 404, "RepoNotFound")
        elif path.startswith(f"api/datasets/{REPO}/tree/"):
            self._tree(path.split("/", 6)[5:], parse_qs(url.query).get("recursive") == ["true"])
        elif path.startswith(f"api/datasets/{REPO}"):
            self._describe(path.partition("/revision/")[2])
        elif hub.gated and not allowed:
            self._refuse(403 if given else 401, "GatedRepo")
        else:
            commit, _, name = path.partition("/resolve/")[2].partition("/")
            self._file(hub.refs.get(commit, commit), name)

    def _describe(self, revision: str) -> None:
        commit = self.hub.refs.get(revision, revision)
        if self.hub.described is not None:
            self._json(self.hub.described)
        elif commit not in self.hub.commits:
            self._refuse(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": name} for name in self.hub.commits[commit]]
            self._json({"id": REPO, "sha": commit, "siblings": siblings, "tags": [], "private": self.hub.private})

    def _tree(self, parts: list[str], deep: bool) -> None:
        entries = self.hub.entries(parts[0], "/".join(parts[1:]), deep)
        if entries:
            self._json(entries)
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, commit: str, name: str) -> None:
        data = self.hub.commits[commit].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        if name in self.hub.statuses:
            self._refuse(self.hub.statuses[name])
            return
        headers = {"etag": f'"{hashlib.sha1(data).hexdigest()}"', "x-repo-commit": commit, "accept-ranges": "bytes"}
        asked = self.headers["range"]
        if not asked or self.command == "HEAD":
            self._answer(200, data, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        headers["content-range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        cuts = self.hub.cuts.get(name)
        self._answer(206, part, headers, cuts.pop(0) if cuts else None)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"x-error-code": code, "x-error-message": message, "x-repo-commit": NEW}
        self._answer(status, b"{}", {key: word for key, word in headers.items() if word})


@contextmanager
def running(hub: DataHub) -> Iterator[DataHub]:
    """Serve on a free port while inside."""
    with serving(hub, _Handler):
        yield hub
