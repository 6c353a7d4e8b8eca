"""How the hub is reached, and every way in which it refuses or fails as one coded message.

The session (proxies, offline switch) and the errors are huggingface_hub's. Its request headers are not used: building
them asks the endpoint for more than the model. The only token is ``HF_TOKEN`` of the environment; no message holds it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from finetune import __version__
from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.fetch import disk
from finetune.runfolder import disk_fault
from finetune.terminal import clean

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SECONDS = 10.0
"""How long to wait for a connection, or for the next bytes."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each further attempt."""
_HOST = re.compile(r"[\w.:-]+", re.ASCII)
_AGAIN = "the same command goes on from there"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who asks for which revision of what, and where."""

    repo: str
    revision: str
    endpoint: str
    token: str | None = field(repr=False)

    @property
    def where(self) -> str:
        """The repository's page, without a password that the endpoint may hold."""
        address = urlsplit(self.endpoint)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}/{self.repo}"

    @property
    def headers(self) -> dict[str, str]:
        given = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return {"user-agent": f"finetune/{__version__}", "accept-encoding": "identity", **given}

    def ask(self) -> Any:
        """The hub's JSON about the revision, None where the answer is none.

        Attempts are few: somebody waits for the first word.
        """
        from huggingface_hub import get_session, hf_raise_for_status

        url = f"{self.endpoint}/api/models/{self.repo}/revision/{quote(self.revision, safe='')}"
        pauses = list(PAUSES[:2])
        with self.coded():
            while True:
                try:
                    answer = get_session().get(url, params={"blobs": "true"}, headers=self.headers, timeout=SECONDS)
                    hf_raise_for_status(answer)
                    return answer.json()
                except transport() as error:
                    if not pauses or not passes(error):
                        raise
                    time.sleep(pauses.pop(0))
                except ValueError:
                    return None

    @contextlib.contextmanager
    def coded(self, name: str = "") -> Iterator[None]:
        """Every failure inside as one coded message. ``name``: the file that is on its way, if one is."""
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled:
            raise not_here(self.repo) from None
        except errors.HfHubHTTPError as error:
            raise self._refusal(error) from None
        except transport() as error:
            what, fix = f"the connection broke while {name} came", f"what came is kept: {_AGAIN}"
            if not name:
                what, fix = "the hub cannot be reached", "check the network, HF_ENDPOINT and the proxy"
            raise EnvironmentFault(f"{what}: {clean(str(error) or type(error).__name__)}", self.where, fix) from None
        except OSError as error:
            raise disk_fault(error, disk.cache()) from error

    def _refusal(self, error: HfHubHTTPError) -> FinetuneError:
        from huggingface_hub import errors

        status, where = error.response.status_code, self.where
        if isinstance(error, errors.GatedRepoError):
            what = "gated, and the token in HF_TOKEN has no access" if self.token else "gated, and there is no token"
            fix = "accept the terms at that page, then set HF_TOKEN in the environment to a token of that account"
            return EnvironmentFault(f"the repository is {what}", where, fix)
        if isinstance(error, errors.RevisionNotFoundError):
            what = f"the repository has no revision {clean(self.revision)}"
            return ModelError(what, where, "name a branch, a tag or a commit of it")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            fix = "check the id; for a private one set HF_TOKEN in the environment to a token that may read it"
            return ModelError("there is no such repository, or it is private", where, fix)
        if status == 401:
            what = "the hub does not accept the token in HF_TOKEN" if self.token else "the hub asks for a token"
            return EnvironmentFault(what, where, "set HF_TOKEN in the environment to a valid token")
        said = clean((error.server_message or "").replace(self.token or "\0", "…"))
        what = f"the hub answers HTTP {status}" + (f": {said}" if said else "")
        return EnvironmentFault(what, where, f"try later: {_AGAIN}" if passes(error) else "check HF_ENDPOINT, HF_TOKEN")


def open_access(repo: str, revision: str) -> Access:
    """The way to a revision by the environment's endpoint and token.

    Raises:
        ModelError: no repository or revision can have this name.
        EnvironmentFault: the endpoint or the token cannot work.
    """
    if not disk.is_hub_id(repo) or not disk.REVISION.fullmatch(revision):
        what = f"{clean(repo)} at {clean(revision)} is no name that the hub could have"
        raise ModelError(what, fix="name it as owner/name, with a branch, a tag or a commit")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token.isascii() or not token.isprintable():
        raise EnvironmentFault("it holds characters that no token has", "HF_TOKEN", "copy the token again, or unset it")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        address = urlsplit(endpoint)
        sound = address.scheme in ("http", "https") and _HOST.fullmatch(address.hostname or "") and address.port != 0
    except ValueError:
        sound = None
    if not sound:
        raise EnvironmentFault("this is no web address", "HF_ENDPOINT", "write it as https://host, or unset it")
    return Access(repo=repo, revision=revision, endpoint=endpoint, token=token or None)


def offline() -> bool:
    values = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in values)


def not_here(repo: str) -> EnvironmentFault:
    fix = "unset HF_HUB_OFFLINE to fetch it, or copy the model here and name its folder"
    return EnvironmentFault(f"offline, and {repo} is not whole in the cache", str(disk.cache()), fix)


def transport() -> type[Exception]:
    """What the HTTP client raises: httpx's base error or its successor's, whichever huggingface_hub came with."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def passes(error: Exception) -> bool:
    """Whether another attempt may succeed: a broken connection, a busy or failing server."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 429) or status >= 500
