"""Data sets on the hub: which commit a name means, which splits it has, and its rows as a stream.

Nothing of a data set is ever run: ``datasets`` has had no scripts since 4.0, and only its readers of plain files serve
here. The rows are read at one commit, so that a run that is resumed meets the same ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from finetune.datafolder import encoded, no_split, said, unreadable
from finetune.errors import DataError, EnvironmentFault, FinetuneError, ModelError
from finetune.fetch import access, disk
from finetune.fetch.access import Access
from finetune.runfolder import disk_fault
from finetune.terminal import clean

_READERS = ("arrow", "csv", "json", "parquet", "text")
"""The readers of ``datasets`` that make rows of plain files; others need codecs, or make a row of a whole file."""
_TRIES = 2
"""One try to open or read is six requests of huggingface_hub, 28 s with the pause after; ``datasets`` would try 20
times, some 9 minutes."""


def commit(name: str, revision: str | None = None) -> str:
    """The commit that a branch or tag of a data set names now; without ``revision``, its main branch.

    Raises:
        DataError: no such data set or revision.
        EnvironmentFault: offline, no access, no connection.
    """
    return _pinned(name, revision).revision


def splits(name: str, revision: str | None = None, subset: str | None = None) -> list[str]:
    """The splits of a data set. Raises what ``stream`` raises before its first row."""
    return _names(_builder(_pinned(name, revision), subset))


def stream(name: str, split: str, revision: str | None = None, subset: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one split as they come; what is wrong with the name, the split or the access is said at the call.

    A connection that breaks is taken up again at the same byte. Images and other media stay encoded.

    Args:
        subset: one of the configurations that the data set's page names.

    Raises:
        DataError: no such data set, revision, subset or split; nothing in it that can be read; or contents that cannot
            be read, with the row reached.
        EnvironmentFault: offline, no access, no connection, no cache that can be written; in the midst of the rows
            with the row reached.
    """
    at = _pinned(name, revision)
    builder = _builder(at, subset)
    if split not in _names(builder):
        no_split(split, _names(builder), at.where)
    return _rows(at, builder, split)


class _DataAccess(Access):
    """The way to a model's repository, for a data set's."""

    @property
    def where(self) -> str:
        """The data set's page, without a password that the endpoint may hold."""
        address = urlsplit(self.endpoint)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}/datasets/{self.repo}"

    def ask(self) -> Any:
        """The hub's JSON about the revision, None where the answer is none."""
        answer = self._request("GET", f"api/datasets/{self.repo}/revision/{quote(self.revision, safe='')}")
        try:
            return answer.json()
        except ValueError:
            return None

    def enter(self) -> None:
        """Ask for a file of it: the hub describes a gated data set to everybody, but refuses its files."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            self._request("HEAD", f"datasets/{self.repo}/resolve/{self.revision}/README.md")
        except EntryNotFoundError:
            return

    def _request(self, method: str, path: str) -> Any:
        """Attempts are few: somebody waits for the first word."""
        from huggingface_hub import get_session, hf_raise_for_status

        pauses = list(access.PAUSES[:2])
        while True:
            try:
                url = f"{self.endpoint}/{path}"
                answer = get_session().request(method, url, headers=self.headers, timeout=access.SECONDS)
                hf_raise_for_status(answer)
                return answer
            except access.transport() as error:
                if not pauses or not access.passes(error):
                    raise
                time.sleep(pauses.pop(0))


def _pinned(name: str, revision: str | None) -> _DataAccess:
    """The way to the commit that the revision names now, once it is known to be open."""
    import datasets

    if access.offline() or datasets.config.HF_HUB_OFFLINE:
        what = f"offline, and the data set {clean(name)} is on the hub"
        fix = f"unset HF_HUB_OFFLINE, or fetch it (hf download {clean(name)} --repo-type dataset --local-dir FOLDER)"
        raise EnvironmentFault(what, fix=f"{fix} and name that folder")
    try:
        given = access.open_access(name, revision or "main")
    except ModelError as error:
        raise DataError(*error.faults[0]) from None
    at = _DataAccess(repo=given.repo, revision=given.revision, endpoint=given.endpoint, token=given.token)
    try:
        described = at.ask()
        sha = described["sha"]
        sound = disk.COMMIT.fullmatch(sha) and (sha == at.revision or not disk.COMMIT.fullmatch(at.revision))
        at = dataclasses.replace(at, revision=sha)
        at.enter()
    except (access.transport(), OSError) as error:
        raise _fault(at, error, at.where) from None
    except (KeyError, TypeError):
        sound = None
    if not sound:
        raise EnvironmentFault("this endpoint does not answer as the hub does", at.where, "check HF_ENDPOINT")
    return at


def _builder(at: _DataAccess, subset: str | None) -> Any:
    """The reader that ``datasets`` finds for the files, at the commit, by their names and the README alone."""
    import datasets

    _settle(at)
    try:
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{at.repo}", subset, revision=at.revision, token=at.token or False
        )
    except Exception as error:  # noqa: BLE001 — what the README's YAML raises has no class that this package may import
        if type(error) is RuntimeError and "script" in str(error):
            fix = "name the revision refs/convert/parquet if the hub has made one: the same rows as Parquet"
            raise DataError(f"it holds a script, and none is run: {said(error)}", at.where, fix) from None
        raise _fault(at, error, at.where) from None
    if builder.name not in _READERS or not builder.config.data_files:
        what = f"its files are of the kind {builder.name}, which holds no rows of text"
        raise DataError(what, at.where, "name a data set in JSON, CSV, Parquet, Arrow or text files")
    return builder


def _settle(at: Access) -> None:
    """Settings of ``datasets`` that it reads when it is imported, or has no other way for: the endpoint as it is named
    now, an end to its attempts, and no word to a third host about what is read."""
    from datasets import config

    config.HF_ENDPOINT = at.endpoint
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = _TRIES


def _names(builder: Any) -> list[str]:
    return [str(split) for split in builder.config.data_files]


def _rows(at: _DataAccess, builder: Any, split: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for row in encoded(builder.as_streaming_dataset(split=split)):
            yield row
            number += 1
    except unreadable(access.transport()) as error:
        raise _fault(at, error, f"{at.where}, split {split}, after row {number}") from None


def _fault(at: _DataAccess, error: Exception, place: str) -> FinetuneError:
    """The coded form of whatever ``datasets`` raised while it opened or read a data set."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, access.transport()):
        try:
            with at.coded():
                raise error
        except FinetuneError as refusal:
            what, _, fix = refusal.faults[0]
            kind = DataError if isinstance(refusal, ModelError) else EnvironmentFault
            return kind(what, place, fix)
    if isinstance(error, ConnectionError | LocalEntryNotFoundError):
        return EnvironmentFault(
            f"the hub cannot be reached: {said(error)}", place, "check the network, HF_ENDPOINT and the proxy"
        )
    if isinstance(error, OSError) and error.errno:
        full = disk_fault(error, Path(error.filename or disk.cache())).faults[0]
        return EnvironmentFault(full.what, full.where, "set HF_HOME to a folder that can be written and has room")
    return DataError(f"cannot be read: {said(error)}", place, "name a subset, a revision and files that can be read")
