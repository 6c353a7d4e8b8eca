"""How the hub is written to: the way and the token, files that tell how far they came, and every fault as one message.

The requests are huggingface_hub's own. While they run, its progress bars, its log and what it reports about this
machine are off, and every wait has an end. Files go by the hub's plain HTTP storage, which is what the tests can serve.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault, FinetuneError
from finetune.fetch import access, disk
from finetune.fetch.access import Access
from finetune.interrupts import StopRequest
from finetune.terminal import Progress, Terminal, clean

SECONDS = 120.0
"""How long to wait for the hub's next bytes; a commit of many files takes it a while."""
STATE = {
    "ask": "nothing was sent",
    "create": "nothing was sent",
    "upload": "nothing was published",
    "commit": "nothing was published",
    "read": "it was published, and could not be read back",
}
"""The stages, and how things stand when the hub refuses in one of them."""
_BROKEN = {
    "ask": "check the network, HF_ENDPOINT and the proxy, or try later; nothing was sent",
    "create": "check the network, HF_ENDPOINT and the proxy, or try later; nothing was sent",
    "upload": "the same command goes on from there: what came is kept, and nothing was published",
    "commit": "the same command finds out whether it was published, and goes on",
    "read": "the same command compares it again: it was published, and could not be read back",
}
"""What to do where a connection broke, or the hub failed."""
_MB = 1_000_000


def open_way(repo: str, revision: str) -> Access:
    """The way to a branch, with a token that may write; nothing is asked yet, save to renew a stored login.

    Raises:
        EnvironmentFault: no name of a repository or branch, no endpoint, offline, no token.
        ModelError: no branch can have this name.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    fix = "write it as owner/name, where owner is your account or an organisation of yours"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise EnvironmentFault(clean(str(error)), clean(repo), fix) from None
    if not disk.is_hub_id(repo):
        raise EnvironmentFault("this names no owner and repository", clean(repo), fix)
    if disk.COMMIT.fullmatch(revision):
        raise EnvironmentFault("this is a commit, and only a branch can take another", revision, "name a branch")
    way = access.open_access(repo, revision)
    if access.offline():
        raise EnvironmentFault("offline, and the hub is to be written to", way.where, "unset HF_HUB_OFFLINE")
    try:
        token = way.token or get_token()
    except Exception as error:  # of a login that has to be renewed; its classes differ between versions
        fix = "set HF_TOKEN in the environment"
        raise EnvironmentFault("the stored login cannot be used", way.where, fix) from error
    if not token:
        fix = "set HF_TOKEN in the environment to a token with write permission, or log in with `hf auth login`"
        raise EnvironmentFault("there is no token to write with", way.where, fix)
    return dataclasses.replace(way, token=token)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """The library as it is to behave inside; afterwards all its settings are as before."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    make, log = _http._GLOBAL_CLIENT_FACTORY, logging.getLogger("huggingface_hub")
    shown, level, reports = not are_progress_bars_disabled(), log.level, constants.HF_HUB_DISABLE_TELEMETRY

    def patient() -> Any:
        client = make()
        client.event_hooks["request"].append(_bounded)
        return client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about things that are decided here
        disable_progress_bars()
        log.setLevel(logging.CRITICAL)
        constants.HF_HUB_DISABLE_TELEMETRY = True
        set_client_factory(patient)
        try:
            yield
        finally:
            set_client_factory(make)
            constants.HF_HUB_DISABLE_TELEMETRY = reports
            log.setLevel(level)
            if shown:
                enable_progress_bars()


def _bounded(request: Any) -> None:
    """An end to the waits of a request; the library says of most that they have none, and so nothing less holds."""
    request.extensions["timeout"] = dict.fromkeys(("read", "write", "pool"), SECONDS) | {"connect": access.SECONDS}


@contextlib.contextmanager
def coded(way: Access, stage: str) -> Iterator[None]:
    """Every failure inside as one coded message. ``stage``: of ``STATE``."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    malformed = (AttributeError, KeyError, TypeError, ValueError)
    try:
        yield
    except (access.transport(), OfflineModeIsEnabled, OSError, RuntimeError, *malformed) as error:
        raise _fault(way, stage, error) from None


def _fault(way: Access, stage: str, error: BaseException) -> FinetuneError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if type(error) is RuntimeError and error.__cause__ is not None:  # the library's word for a file that failed
        return _fault(way, stage, error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return _refusal(way, stage, error)
    said = _said(way, str(error)) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return EnvironmentFault("offline, and the hub is to be written to", way.where, "unset HF_HUB_OFFLINE")
    if isinstance(error, access.transport()):
        return EnvironmentFault(f"the connection to the hub does not hold: {said}", way.where, _BROKEN[stage])
    if isinstance(error, OSError):
        fix = f"mend that and run again; {STATE[stage]}"
        return EnvironmentFault(f"cannot be read: {error.strerror or said}", str(error.filename or way.where), fix)
    if said.startswith("Invalid metadata"):
        return EnvironmentFault(f"the hub refuses the card: {said}", way.where, "release again; nothing was published")
    what = f"this endpoint refuses, or does not answer as the hub does: {said}"
    return EnvironmentFault(what, way.where, "check HF_ENDPOINT, and look at that page before the next try")


def _refusal(way: Access, stage: str, error: Any) -> FinetuneError:
    """What a status means at this stage, and the hub's own words where it has any."""
    from huggingface_hub import errors

    status, owner = error.response.status_code, way.repo.partition("/")[0]
    said = _said(way, error.server_message or error.response.headers.get("x-error-message") or "")
    what, fix = f"the hub answers HTTP {status}", "check HF_ENDPOINT and the token"
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"the repository has no branch {clean(way.revision)}"
        fix = "make it on its page, or leave --revision out"
    elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        what, fix = "the hub does not accept the token", "set HF_TOKEN in the environment to one with write permission"
    elif status == 403:
        what = "the token may not write there"
        fix = f"set HF_TOKEN in the environment to a token with write permission of somebody who may write to {owner}"
    elif status == 404 and stage == "create":
        what, fix = f"there is no owner {owner}, or the token does not belong to it", "check the name and the token"
    elif status == 404 or isinstance(error, errors.RepositoryNotFoundError):
        what, fix = "there is no such repository, or the token may not see it", "check the name and the token"
    elif status == 409 and stage == "create":
        what, fix = "there is a repository of this name, which the token may not see", "check the token, or the name"
    elif status in (409, 412):
        what = "somebody else changed the repository meanwhile"
        fix = "see what changed; then give the same command again"
    elif access.passes(error):
        return EnvironmentFault(what + (f": {said}" if said else ""), way.where, _BROKEN[stage])
    return EnvironmentFault(what + (f": {said}" if said else ""), way.where, f"{fix}; {STATE[stage]}")


def _said(way: Access, text: str) -> str:
    """Another's words for a terminal, without the token that they may repeat."""
    return clean(" ".join(text.replace(way.token or "\0", "…").split()))


class Meter:
    """Bytes read of all files together, shown in whole MB; files are read by several threads."""

    def __init__(self, terminal: Terminal, total: int) -> None:
        self._terminal, self._total, self._lock = terminal, total, threading.Lock()
        self.begin("reading, MB")

    def begin(self, label: str) -> None:
        self._progress, self._places, self._shown = Progress(self._terminal, label), dict[str, int](), 0

    def told(self, name: str, place: int) -> None:
        with self._lock:
            self._places[name] = place
            done = sum(self._places.values())
            if done // _MB != self._shown and done < self._total:
                self._shown = done // _MB
                self._progress(self._shown, self._whole, clean(name))

    def finish(self) -> None:
        self._progress(self._whole, self._whole)

    @property
    def _whole(self) -> int:
        return -(-self._total // _MB)


class Source(io.BufferedReader):
    """A file on its way. Given as an open file, the library sends it over HTTP; a request to stop ends it at once."""

    def __init__(self, path: Path, name: str, meter: Meter, stop: StopRequest) -> None:
        super().__init__(io.FileIO(path))
        self._name, self._meter, self._stop = name, meter, stop

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stop.requested:
            raise KeyboardInterrupt
        data = super().read(size)
        self._meter.told(self._name, self.tell())
        return data
