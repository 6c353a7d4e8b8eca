"""Publish a release: one commit on the hub, of exactly the files that verify, read back and compared.

Publishing cannot be undone, since what was public once may have been copied: so a new repository is private unless
asked otherwise, and an existing one stays as it is. ``HfApi.upload_folder`` is not used: with hf_xet installed it
splits large folders into several commits, and a reader could meet half a release.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__, manifest, verify
from finetune.errors import EnvironmentFault, Fault, FinetuneError, ModelError
from finetune.fetch import disk
from finetune.fetch.access import Access
from finetune.interrupts import StopRequest, stop_requests
from finetune.runfolder import read_json
from finetune.terminal import ByteBar, Terminal, clean, size
from finetune.upload import Meter, Source, coded, open_way, settled

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

_UNUSABLE = "config.json.unusable"  # proof.UNUSABLE, whose room would load torch
_HUBS_OWN = ".gitattributes"
_NOT_KNOWN = "**Not known**: "


@dataclass(frozen=True, kw_only=True)
class Release:
    """A folder that verifies. ``listed``: every file's sha-256; ``made``: its provenance, as manifest.json says."""

    folder: Path
    listed: dict[str, str]
    made: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.listed)

    def not_known(self) -> list[str]:
        """What its card says of licences that are not known."""
        card = self.folder / "README.md"
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
        return [clean(line.removeprefix(_NOT_KNOWN)) for line in lines if line.startswith(_NOT_KNOWN)]

    def message(self) -> tuple[str, str]:
        """The commit's first line and its description: which run, and the digest that names all other digests."""
        base, recipe = self.made.get("base") or {}, self.made.get("recipe") or {}
        run = Path(str(recipe.get("output") or self.folder.resolve().name)).name
        digest = self.listed[verify.MANIFEST]
        came = f"base: {base.get('name')} {base.get('commit') or ''}".rstrip()
        lines = [f"{verify.MANIFEST} sha-256: {digest}", came]
        return clean(f"Release of run {run}, manifest {digest[:16]}"), "\n".join(map(clean, lines))


def push(
    folder: Path, repo: str, terminal: Terminal, *, private: bool = True, revision: str | None = None
) -> dict[str, Any]:
    """Upload the release ``folder`` to the hub's ``repo`` in one commit, and compare what arrived; → the commit.

    The token is the environment's HF_TOKEN, else the one that ``hf auth login`` stored. An interruption leaves the
    branch as it was; a repository that was made for this push stays, empty.

    Args:
        repo: ``owner/name``. private: whether a repository that is made now is private; an existing one stays as it is.
        revision: the branch, which must exist; without it, main.

    Raises:
        ModelError: no release, or one that is marked unusable.
        FinetuneError: it does not verify, or what arrived is not what was sent.
        EnvironmentFault: the name, the token, the repository's other files, the hub or the way to it.
        Interrupted: stopped on request.
    """
    terminal.status(f"checking {folder}", last=True)
    release = _opened(folder, terminal)
    way = open_way(repo, revision or "main")
    with stop_requests() as stop, settled():
        from huggingface_hub import HfApi

        api = HfApi(endpoint=way.endpoint, token=way.token, library_name="finetune", library_version=__version__)
        try:
            with coded(way, "ask"):
                head = _head(api, way, private, terminal)
            commit = _publish(api, way, head, release, terminal, stop)
        except KeyboardInterrupt:
            raise stop.interrupted("nothing was published") from None
        terminal.status("reading it back", last=True)
        with coded(way, "read"):
            differing = _differences(release, _present(api, way, commit))
    if differing:
        fix = "push it again; if that does not help, remove the commit on the hub's page"
        raise FinetuneError.of([Fault(what, f"{way.where}/tree/{commit}", fix) for what in differing])
    terminal.say(f"{'pushed' if commit != head else 'it was there already'}: {way.where}/tree/{commit}")
    for line in _loading(release, way.repo, commit):
        terminal.say(line)
    return {"repo": way.repo, "commit": commit, "url": f"{way.where}/tree/{commit}", "changed": commit != head}


def _opened(folder: Path, terminal: Terminal) -> Release:
    if (folder / _UNUSABLE).exists():
        what = "it is marked unusable: its merge did not pass the proof"
        raise ModelError(what, str(folder), "merge and release anew")
    try:
        found = verify.faults(folder, ByteBar.over(terminal, "verifying", folder.rglob("*")).more)
    except verify.NoRelease as error:
        raise ModelError(str(error), str(folder), "name a folder that `finetune release` made") from None
    if found:
        raise FinetuneError.of([Fault(what, str(folder), "make the release again; nothing was sent") for what in found])
    sums = verify.bounded(folder / verify.SUMS)
    listed = verify.listed_in(sums) | {verify.SUMS: manifest.digest_bytes(sums)}
    return Release(folder=folder, listed=listed, made=read_json(folder / verify.MANIFEST).get("provenance") or {})


def _head(api: HfApi, way: Access, private: bool, terminal: Terminal) -> str:
    """The commit that the branch names now, in a repository that is made if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found, made = api.model_info(way.repo, revision=way.revision), False
    except RepositoryNotFoundError:
        if way.revision != "main":
            what = f"there is no such repository, and a new one has no branch {clean(way.revision)}"
            raise EnvironmentFault(what, way.where, "leave --revision out") from None
        with coded(way, "create"):
            api.create_repo(way.repo, private=private)
        found, made = api.model_info(way.repo, revision=way.revision), True
        if private and not found.private:
            what = "it was to be private, and the hub made it public"
            raise EnvironmentFault(what, way.where, "make it private on its page; nothing was sent") from None
    seen = "private" if found.private else "public: everybody can read and copy what is pushed"
    terminal.say(f"{way.where} {'was made' if made else 'exists and stays as it is'}, {seen}")
    if not disk.COMMIT.fullmatch(found.sha or ""):
        raise ValueError("it names no commit")
    return str(found.sha)


def _publish(api: HfApi, way: Access, head: str, release: Release, terminal: Terminal, stop: StopRequest) -> str:
    """Upload the large files, then commit everything at once on top of ``head``. → the commit"""
    from huggingface_hub import CommitOperationDelete

    with coded(way, "ask"):
        gone = _superseded(way, head, _present(api, way, head), release)
    for what in release.not_known():
        terminal.say(f"not known, and the card says so: {what}")
    terminal.say(f"pushing {len(release.listed)} files, {size(release.bytes)}, as one commit")
    message, description = release.message()
    with contextlib.ExitStack() as opened, coded(way, "upload"):
        meter = Meter(terminal, release.bytes)
        additions = [_addition(release, name, opened.enter_context(Source(release.folder / name, name, meter, stop)))
                     for name in release.listed]  # fmt: skip
        meter.begin(f"uploading to {way.repo}, MB")
        once = {made.upload_info.sha256: made for made in additions}  # the library would send equal files side by side
        api.preupload_lfs_files(way.repo, list(once.values()), revision=way.revision, free_memory=False)
        meter.finish()
        deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone]
        # Cut off while the hub commits, nobody would know the outcome: so a request to stop waits for the answer.
        with stop.deferred(), coded(way, "commit"):
            made = api.create_commit(
                way.repo, [*deletions, *additions], commit_message=message, commit_description=description,
                revision=way.revision, parent_commit=head,
            )  # fmt: skip
            if not disk.COMMIT.fullmatch(made.oid):
                raise ValueError("it names no commit")
            return str(made.oid)


def _present(api: HfApi, way: Access, commit: str) -> dict[str, RepoFile]:
    """The files of a commit, by name."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(way.repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _superseded(way: Access, head: str, present: dict[str, RepoFile], release: Release) -> list[str]:
    """Files of a former release that this one does without. Raises EnvironmentFault where others' files lie there:
    nobody's digest would cover them, and they are not ours to delete."""
    from huggingface_hub import get_session, hf_raise_for_status

    others = {*present} - {*release.listed, _HUBS_OWN}
    former: dict[str, str] = {}
    if others and verify.SUMS in present and present[verify.SUMS].size <= verify.LIMIT:
        url = f"{way.endpoint}/{way.repo}/resolve/{head}/{verify.SUMS}"
        answer = get_session().get(url, headers=way.headers, follow_redirects=True)
        hf_raise_for_status(answer)
        with contextlib.suppress(ValueError):
            former = verify.listed_in(answer.content)
    if strange := sorted(others - {*former}):
        named = ", ".join(map(verify.shown, strange[:5])) + (", …" if len(strange) > 5 else "")
        what = f"it holds files that no release put there: {named}"
        raise EnvironmentFault(what, way.where, "name another repository, or remove them on its page; nothing was sent")
    return sorted(others)


def _addition(release: Release, name: str, source: Source) -> CommitOperationAdd:
    """One file as it is to be committed; the library reads and digests it here, so that it is compared once more."""
    from huggingface_hub import CommitOperationAdd

    made = CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
    if made.upload_info.sha256.hex() != release.listed[name]:
        what = f"{verify.shown(name)} changed while it was being pushed; nothing was sent"
        raise FinetuneError(what, str(release.folder), "make the release again")
    return made


def _differences(release: Release, arrived: dict[str, RepoFile]) -> list[str]:
    """What the commit has otherwise than the release. Of a small file the hub has git's blob id instead of a sha-256;
    the bytes it is computed from must be the released ones themselves."""
    found = []
    for name in sorted({*release.listed, *arrived}):
        remote, digest = arrived.get(name), release.listed.get(name)
        if digest is None and name == _HUBS_OWN:
            continue
        if digest is None or remote is None:
            found.append(f"{verify.shown(name)} {'is missing' if remote is None else 'is there, and was not released'}")
        elif remote.lfs is not None:
            if (remote.lfs.sha256, remote.lfs.size) != (digest, (release.folder / name).stat().st_size):
                found.append(f"{verify.shown(name)} arrived with other bytes")
        else:
            data = (release.folder / name).read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            if (manifest.digest_bytes(data), blob, len(data)) != (digest, remote.blob_id, remote.size):
                found.append(f"{verify.shown(name)} arrived with other bytes")
    return found


def _loading(release: Release, repo: str, commit: str) -> list[str]:
    lines, pinned = [], f'"{repo}", revision="{commit}"'
    if "config.json" in release.listed:
        lines.append(f"load it: AutoModelForCausalLM.from_pretrained({pinned})")
    for place in ("", "adapter"):
        if f"{place}/adapter_config.json".lstrip("/") in release.listed:
            below = f', subfolder="{place}"' if place else ""
            lines.append(f"load the adapter on its base: PeftModel.from_pretrained(base, {pinned}{below})")
    return [*lines, f"check it: hf download {repo} --revision {commit} --local-dir DIR, then finetune verify DIR"]
