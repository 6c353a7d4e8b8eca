"""A small hub on this machine that takes uploads: repositories, the large files' storage, commits, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub import Answering, Asked, serving

TOKEN = "hf_secretThatMayWrite"
FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
_LARGE = (".safetensors", "tokenizer.json")


@dataclass
class Repository:
    """``commits``: commit → files; ``branches``: name → commit; ``messages``: the commits' headers, in order."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


@dataclass
class UploadHub:
    """Every field but the first three is a fault or a habit, and all are off."""

    repos: dict[str, Repository] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    owner: str = "acme"
    answers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Part of a path → the next refusals of it: a status, and the hub's words."""
    codes: dict[int, str] = field(default_factory=dict)
    """The code in the head of a refusal of this status."""
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Part of a path → what happens once before it is answered."""
    pause: float = 0.0
    """Seconds of rest after each MB that comes."""
    part: int = 0
    """Large files are taken in parts of so many bytes."""
    always_public: bool = False
    twist: Callable[[str, bytes], bytes] | None = None
    """What a committed file becomes."""
    moved: str = ""
    """Another host that the answer to a commit names."""
    raw: dict[str, bytes] = field(default_factory=dict)
    """Part of a path → this body instead of the right one."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make(self, repo: str, private: bool = True, **files: bytes) -> Repository:
        self.repos[repo] = made = Repository(private=private)
        made.add("main", FIRST | files)
        return made

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]


class _Handler(Answering):
    hub: UploadHub

    def do_HEAD(self) -> None:  # noqa: N802 - the library names it
        self._serve()

    def do_GET(self) -> None:  # noqa: N802 - the library names it
        self._serve()

    def do_POST(self) -> None:  # noqa: N802 - the library names it
        self._serve()

    def do_PUT(self) -> None:  # noqa: N802 - the library names it
        self._serve()

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        for part, happen in list(hub.meanwhile.items()):
            if part in path and hub.meanwhile.pop(part, None):
                happen()
        body = self._body(int(self.headers["content-length"] or 0))
        if body is None:
            return
        for part, refusals in hub.answers.items():
            if part in path and refusals:
                self._refuse(*refusals.pop(0))
                return
        for part, raw in hub.raw.items():
            if part in path:
                self._answer(200, raw)
                return
        if path.startswith("/store/"):
            self._store(path, body)
        elif self.headers["authorization"] != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            good = json.loads(body)["content"].startswith("---\n")
            errors = [] if good else [{"message": "no header"}]
            self._json({"errors": errors, "warnings": [{"message": "of no weight"}]}, 200 if good else 400)
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._of_repo(path, body)

    def _body(self, length: int) -> bytes | None:
        """What was sent along, None where the sender broke off."""
        data = b""
        while len(data) < length:
            block = self.rfile.read(min(1_000_000, length - len(data)))
            data += block
            if not block:
                self.close_connection = True
                return None
            time.sleep(self.hub.pause)
        return data

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.hub.owner:
            self._refuse(403, "You don't have the rights to create a model under this namespace")
        elif name in self.hub.repos:
            self._refuse(409, "You already created this model repo")
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.make(name, private and not self.hub.always_public)
            self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        hub, objects = self.hub, []
        for one in asked["objects"]:
            oid, length, header = one["oid"], one["size"], {}
            href = f"{hub.endpoint}/store/{oid}"
            if hub.part:
                count = -(-length // hub.part)
                header = {"chunk_size": str(hub.part)} | {str(n + 1): f"{href}/{n + 1}" for n in range(count)}
                href += "/whole"
            actions = {"upload": {"href": href, "header": header}}
            objects.append({"oid": oid, "size": length} | ({} if oid in hub.store else {"actions": actions}))
        self._json({"transfer": "multipart" if hub.part else "basic", "objects": objects})

    def _store(self, path: str, body: bytes) -> None:
        """Whole, or part by part; what has another digest than its name is not kept."""
        _, _, oid, *part = path.split("/")
        with self.hub.lock:
            if part and part[0] != "whole":
                self.hub.store[f"{oid}/{part[0]}"] = body
            else:
                parts = (
                    [self.hub.store.pop(f"{oid}/{one['partNumber']}") for one in json.loads(body)["parts"]]
                    if part
                    else []
                )
                data = b"".join(parts) if part else body
                if hashlib.sha256(data).hexdigest() != oid:
                    self._refuse(400, "other bytes than were announced")
                    return
                self.hub.store[oid] = data
        self._answer(200, b"{}", {"etag": '"kept"'})

    def _of_repo(self, path: str, body: bytes) -> None:
        found = next((name for name in self.hub.repos if f"/{name}/" in f"{path}/"), None)
        if found is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
            return
        repo, (what, *rest) = self.hub.repos[found], path.partition(f"/{found}")[2].strip("/").split("/")
        revision = rest[0] if rest else "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        elif what in ("", "revision"):
            siblings = [{"rfilename": name} for name in repo.commits[commit]]
            self._json({"id": found, "sha": commit, "private": repo.private, "siblings": siblings})
        elif what == "preupload":
            self._modes(json.loads(body)["files"], repo.commits[commit])
        elif what == "commit":
            self._commit(found, repo, revision, [json.loads(line) for line in body.splitlines()])
        elif what == "tree":
            self._json([_entry(name, data) for name, data in repo.commits[commit].items()])
        else:
            self._file(commit, repo.commits[commit]["/".join(rest[1:])])

    def _modes(self, files: list[dict[str, Any]], present: dict[str, bytes]) -> None:
        told = []
        for one in files:
            large = one["path"].endswith(_LARGE)
            entry = _entry(one["path"], present[one["path"]]) if one["path"] in present else {}
            oid = entry.get("lfs", entry).get("oid")
            told.append(
                {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": told})

    def _commit(self, name: str, repo: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            self._refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(repo.commits[repo.branches[branch]])
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "deletedFile":
                del files[value["path"]]
            else:
                data = base64.b64decode(value["content"]) if key == "file" else self.hub.store[value["oid"]]
                files[value["path"]] = self.hub.twist(value["path"], data) if self.hub.twist else data
        repo.messages.append(header)
        commit = repo.add(branch, files)
        at = self.hub.moved or self.hub.endpoint
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{at}/{name}/commit/{commit}"})

    def _file(self, commit: str, data: bytes) -> None:
        headers = {"etag": f'"{hashlib.sha1(data).hexdigest()}"', "x-repo-commit": commit}
        self._answer(200, data, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"content-type": "application/json"})

    def _refuse(self, status: int, message: str = "", code: str = "") -> None:
        headers = {"x-error-code": code or self.hub.codes.get(status, ""), "x-error-message": message}
        self._answer(status, b"{}", {key: word for key, word in headers.items() if word})


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if name.endswith(_LARGE):
        digest = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return entry


@contextmanager
def running(hub: UploadHub) -> Iterator[UploadHub]:
    """Serve on a free port while inside."""
    with serving(hub, _Handler):
        yield hub
