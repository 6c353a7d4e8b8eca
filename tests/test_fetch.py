"""A hub id: what is fetched, what is not, and every way in which it can fail, against a small hub on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from finetune import fetch, hardware
from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.fetch import Fetched, access, disk
from finetune.terminal import Terminal
from tests.hub import NEW, OLD, REPO, Hub, running

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
BIG = 700_000
SECRET, SAVED = "hf_secretFromTheEnvironment", "hf_savedByALogin"
STRAYS = [
    "modeling_qwen.py", "LICENSE.py", "README.md", "model.safetensors", "consolidated.safetensors", "model-q4.gguf",
    "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "training_args.bin", "original/config.json",
    "original/consolidated.00.safetensors", "onnx/model.onnx", "../config.json", "configuration_qwen.py",
]  # fmt: skip


def contents(seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    return {
        "config.json": json.dumps({"model_type": "qwen2", "seed": seed}).encode(),
        "generation_config.json": b'{"do_sample": true}',
        "tokenizer.json": b'{"large": true}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"",
        "LICENSE": b"terms",
        "NOTICE.txt": b"notice",
        "USE_POLICY.md": b"policy",
        INDEX: json.dumps(index).encode(),
        **{shard: rng.randbytes(BIG) for shard in SHARDS},
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, an empty cache, and a token that a login has left on the disk."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(SAVED)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(access, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand of them, and no power to fail here
    huggingface_hub.close_session()
    commits = {OLD: contents(0), NEW: contents(1)}
    for files in commits.values():
        files |= dict.fromkeys(STRAYS, b"stray")
    with running(Hub(commits=commits, refs={"main": NEW, "v1": OLD, "pr/7": OLD})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint + "/")
        # Whatever the library asked for by itself would come here too, and be seen.
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        yield served
        huggingface_hub.close_session()


def get(revision: str | None = None, out: io.StringIO | None = None) -> Fetched:
    return fetch.fetch(REPO, revision, Terminal(out or io.StringIO()))


def refused(kind: type[FinetuneError], revision: str | None = None) -> str:
    with pytest.raises(kind) as caught:
        get(revision)
    (fault,) = caught.value.faults
    assert fault.fix
    assert SECRET not in str(caught.value)
    return str(caught.value)


def holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).read_bytes() == data for name, data in files.items())


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_model_and_licence_are_fetched_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    out = io.StringIO()
    found = get(out=out)
    assert found == Fetched(folder=found.folder, repo=REPO, commit=NEW, origin="hub")
    assert {path.name for path in found.folder.iterdir()} == set(contents())
    assert holds(found.folder, contents(1))
    # Each once, no stray ever; an empty file needs no asking.
    assert sorted([*hub.files_asked(), "chat_template.jinja"]) == sorted(contents())
    assert {asked.path.split("/")[1] for asked in hub.asked} == {"api", "Acme", "store"}
    assert [asked.path for asked in hub.asked if "/api/" in asked.path] == [f"/api/models/{REPO}/revision/main"]
    assert out.getvalue().endswith(f"fetching {REPO}, MB 2/2\n")
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_the_library_itself_finds_what_was_fetched(hub: Hub, tmp_path: Path) -> None:
    found = get()
    cache = tmp_path / "hf" / "hub"
    whole = huggingface_hub.snapshot_download(REPO, cache_dir=cache, local_files_only=True)
    assert Path(whole) == found.folder
    one = huggingface_hub.try_to_load_from_cache(REPO, SHARDS[0], cache_dir=cache, revision="main")
    assert one == str(found.folder / SHARDS[0])
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.nb_files, list(repo.refs)) == (REPO, len(contents()), ["main"])


def test_what_the_library_fetched_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    """The bytes lie in the cache by their digest, from whatever commit or tool."""
    get()
    hub.commits[OLD][SHARDS[0]] = hub.commits[NEW][SHARDS[0]]
    hub.asked.clear()
    assert holds(get("v1").folder, {SHARDS[0]: contents(1)[SHARDS[0]], SHARDS[1]: contents(0)[SHARDS[1]]})
    assert SHARDS[0] not in hub.files_asked()
    assert SHARDS[1] in hub.files_asked()


def test_a_second_fetch_asks_for_the_listing_alone(hub: Hub) -> None:
    get()
    hub.asked.clear()
    out = io.StringIO()
    get(out=out)
    assert not hub.files_asked()
    assert out.getvalue() == ""


@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("v1", OLD), ("pr/7", OLD), (OLD, OLD)])
def test_a_revision_becomes_a_commit(hub: Hub, revision: str | None, commit: str) -> None:
    found = get(revision)
    assert (found.commit, found.folder.name) == (commit, commit)
    assert fetch.local(REPO, revision) == found


def test_a_branch_that_moved_is_followed_once_its_files_are_whole(hub: Hub) -> None:
    hub.refs["main"] = OLD
    old = get()
    hub.refs["main"], hub.instead[SHARDS[1]] = NEW, b"wrong"
    refused(ModelError)
    assert fetch.local(REPO) == old
    hub.instead.clear()
    assert get().commit == NEW
    assert fetch.local(REPO) != old


def test_one_file_of_weights_without_an_index(hub: Hub) -> None:
    for name in (INDEX, *SHARDS):
        del hub.commits[NEW][name]
    assert (get().folder / "model.safetensors").read_bytes() == b"stray"
    assert "pytorch_model.bin" not in hub.files_asked()


def test_pickles_only_where_there_is_no_safetensors(hub: Hub) -> None:
    for name in (INDEX, *SHARDS, "model.safetensors"):
        del hub.commits[NEW][name]
    found = get()
    assert (found.folder / "pytorch_model.bin").is_file()
    assert "training_args.bin" not in hub.files_asked()


@pytest.mark.parametrize("gone", ["config.json", "weights", SHARDS[1], "index"])
def test_a_repository_that_is_no_whole_model_is_refused(hub: Hub, gone: str) -> None:
    files = hub.commits[NEW]
    if gone == "weights":
        for name in [name for name in files if name.endswith((".safetensors", ".bin")) or name == INDEX]:
            del files[name]
    elif gone == "index":
        files[INDEX] = b"no json"
    else:
        del files[gone]
    said = refused(ModelError)
    assert (gone if gone in files or "." in gone else "weights that can be read") in said
    assert SHARDS[0] not in hub.files_asked()


@pytest.mark.parametrize("shard", ["../../../escape.safetensors", "modeling_qwen.py", "a\x1b[31m.safetensors", 5])
def test_an_index_names_weights_in_its_own_folder(hub: Hub, tmp_path: Path, shard: object) -> None:
    hub.commits[NEW] |= {INDEX: json.dumps({"weight_map": {"a": shard}}).encode(), str(shard): b"stray"}
    assert "no weights that can be read" in refused(ModelError)
    assert hub.files_asked() == [INDEX]
    assert not list(tmp_path.rglob("escape*"))


def test_config_alone(hub: Hub) -> None:
    assert fetch.config(REPO) == {"model_type": "qwen2", "seed": 1}
    assert hub.files_asked() == ["config.json"]
    assert fetch.local(REPO) is None
    assert fetch.config(REPO, "v1")["seed"] == 0
    hub.asked.clear()
    assert fetch.config(REPO, NEW)["seed"] == 1
    assert not hub.asked  # a commit does not change
    hub.commits[NEW]["config.json"] = b"[]"
    with pytest.raises(ModelError, match="not a JSON object"):
        fetch.config(REPO)


def test_a_broken_connection_is_taken_up_again_within_one_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it breaks: only attempts that bring nothing are counted."""
    monkeypatch.setattr(access, "PAUSES", (0.01, 0.01))
    hub.cuts[SHARDS[0]] = [100_000, 0, 100_000, 0, 100_000]
    assert holds(get().folder, contents(1))
    ranges = [asked.headers.get("range") for asked in hub.asked if asked.path.endswith(SHARDS[0])]
    assert list(dict.fromkeys(ranges)) == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_a_second_fetch_goes_on_from_the_bytes_that_came(hub: Hub) -> None:
    hub.cuts[SHARDS[0]] = [500_000, 0, 0, 0]
    said = refused(EnvironmentFault)
    assert f"the connection broke while {SHARDS[0]} came" in said
    assert "the same command goes on from there" in said
    assert fetch.local(REPO) is None
    hub.asked.clear()
    out = io.StringIO()
    assert holds(get(out=out).folder, contents(1))
    asked = next(asked for asked in hub.asked if asked.path == f"/store/{NEW}/{SHARDS[0]}")
    start = int(re.fullmatch(r"bytes=(\d+)-", asked.headers["range"]).group(1))  # type: ignore[union-attr]
    assert start == 500_000
    assert asked.status == 206
    assert "config.json" not in hub.files_asked()
    assert re.search(rf"fetching {REPO}, MB 1/2  {SHARDS[1]}  ETA \d+s\n", out.getvalue())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_a_crash_damaged_is_fetched_afresh(hub: Hub, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    came: list[int] = []
    monkeypatch.setattr(fetch._Meter, "add", lambda meter, name, count: came.append(count * (name == SHARDS[0])))
    hub.ranges = ranges
    blobs = disk.home(REPO) / "blobs"
    blobs.mkdir(parents=True)
    for name, length in zip(SHARDS, (5000, BIG + 7), strict=True):
        (blobs / f"{hashlib.sha256(contents(1)[name]).hexdigest()}.incomplete").write_bytes(bytes(length))
    assert holds(get().folder, contents(1))
    assert sum(came) == BIG - 5000  # what was for nothing is taken back


def test_a_part_longer_than_what_the_hub_sends_does_not_stay_for_ever(hub: Hub) -> None:
    hub.cuts[SHARDS[0]] = [500_000, 0, 0, 0]
    refused(EnvironmentFault)
    hub.instead[SHARDS[0]] = b"short"
    assert "HTTP 416" in refused(EnvironmentFault)
    assert "other bytes" in refused(ModelError)
    hub.instead.clear()
    assert holds(get().folder, contents(1))


def test_a_blob_of_the_wrong_length_is_replaced(hub: Hub) -> None:
    """As a full disk or another tool may have left it."""
    folder = get().folder
    (folder / SHARDS[1]).resolve().write_bytes(b"cut")
    assert holds(get().folder, contents(1))


def test_a_stop_keeps_what_came(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    came = 0

    def stop(meter: Any, name: str, count: int) -> None:
        nonlocal came
        came += count if name == SHARDS[0] else 0
        if came > 200_000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch._Meter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            get()
    (part,) = (disk.home(REPO) / "blobs").glob("*.incomplete")
    assert part.stat().st_size == came
    assert holds(get().folder, contents(1))
    assert f"bytes={came}-" in [asked.headers.get("range") for asked in hub.asked]


def test_two_processes_fetch_a_file_once(hub: Hub) -> None:
    """The lock is the library's own: here it is held as a process that uses the library would hold it."""
    digest = hashlib.sha256(contents(1)[SHARDS[0]]).hexdigest()
    path = disk.cache() / ".locks" / disk.home(REPO).name / f"{digest}.lock"
    path.parent.mkdir(parents=True)
    blob = disk.home(REPO) / "blobs" / digest
    out = io.StringIO()
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetching = threading.Thread(target=get, kwargs={"out": out})
        fetching.start()
        until = time.monotonic() + 5
        while "waiting" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        blob.write_bytes(contents(1)[SHARDS[0]])
    fetching.join(timeout=5)
    assert f"another process is fetching {SHARDS[0]}: waiting for it\n" in out.getvalue()
    assert fetch.local(REPO) is not None
    assert SHARDS[0] not in hub.files_asked()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(SHARDS[0], "altered"), (SHARDS[0], "short"), (SHARDS[0], "long"), ("config.json", "altered"), (INDEX, "short")],
)
def test_wrong_bytes_never_enter_the_cache(hub: Hub, name: str, kind: str) -> None:
    right = contents(1)[name]
    hub.instead[name] = {"altered": bytes([right[0] ^ 1]) + right[1:], "short": right[:-1], "long": right * 40}[kind]
    said = refused(ModelError)
    assert f"{name} came with other bytes than the hub names" in said
    assert fetch.local(REPO) is None
    kept = {path.name for path in (disk.home(REPO) / "blobs").iterdir()}
    assert not [path for path in kept if path.endswith(".incomplete")]
    assert len(hub.asked) < 40
    hub.instead.clear()
    assert holds(get().folder, contents(1))


def test_an_endless_body_does_not_fill_the_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    monkeypatch.setattr(fetch._Meter, "add", lambda meter, name, count: came.append(count))
    hub.instead[SHARDS[0]] = bytes(20_000_000)
    refused(ModelError)
    assert sum(count for count in came if count > 0) < 3_000_000


def test_the_disk_is_asked_before_anything_large_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_disk", lambda path: 1_000_000)
    said = refused(EnvironmentFault)
    assert f"{REPO} needs 1.4 MB more, 1.0 MB are free" in said
    assert hub.files_asked() == [INDEX]


def test_only_what_is_still_to_come_needs_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cuts[SHARDS[1]] = [500_000, 0, 0, 0]
    refused(EnvironmentFault)
    monkeypatch.setattr(hardware, "free_disk", lambda path: 600_000)
    assert holds(get().folder, contents(1))


def test_a_disk_that_fills_up_on_the_way(hub: Hub) -> None:
    blobs = disk.home(REPO) / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(contents(1)[SHARDS[0]]).hexdigest()}.incomplete"
    part.symlink_to("/dev/full")
    said = refused(EnvironmentFault)
    assert "No space left on device" in said
    assert "free some space and run the same command again" in said
    part.unlink()
    assert holds(get().folder, contents(1))


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    assert "cannot write" in refused(EnvironmentFault)


def test_gated_without_a_token(hub: Hub) -> None:
    hub.gated, hub.token = True, SECRET
    said = refused(EnvironmentFault)
    assert "gated, and there is no token" in said
    assert f"{hub.endpoint}/{REPO}" in said
    assert "accept the terms at that page, then set HF_TOKEN in the environment" in said


def test_gated_with_a_token_that_has_no_access(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.token = True, "another"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "the token in HF_TOKEN has no access" in refused(EnvironmentFault)


def test_a_token_that_the_hub_does_not_accept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "another"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "does not accept the token in HF_TOKEN" in refused(EnvironmentFault)


def test_no_such_repository_or_a_private_one(hub: Hub) -> None:
    hub.private, hub.token = True, SECRET
    assert "there is no such repository, or it is private" in refused(ModelError)
    with pytest.raises(ModelError, match="no such repository"):
        fetch.fetch("Acme/Nothing", None, Terminal(io.StringIO()))


@pytest.mark.parametrize("revision", ["gone", "c" * 40])
def test_no_such_revision(hub: Hub, revision: str) -> None:
    assert f"no revision {revision}" in refused(ModelError, revision)


@pytest.mark.parametrize("revision", ["", "../../../etc", "a\nb", "-x"])
def test_a_name_that_no_revision_has_is_not_asked_for(hub: Hub, revision: str) -> None:
    if revision:
        assert "no name that the hub could have" in refused(ModelError, revision)
        assert not hub.asked
        assert fetch.local(REPO, revision) is None


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_server_is_asked_a_few_times(hub: Hub, status: int) -> None:
    hub.status, hub.said = status, {"error": f"overloaded \x1b[31m {SECRET}"}
    said = refused_with_token(status)
    assert "try later" in said
    assert "overloaded" in said
    assert "\x1b" not in said
    assert len(hub.asked) == 3


def refused_with_token(status: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        said = refused(EnvironmentFault)
    assert f"the hub answers HTTP {status}" in said
    return said


def test_a_server_that_fails_for_a_moment_is_no_fault(hub: Hub) -> None:
    hub.statuses = [503, 429, 0, 500, 0, 503, 0]
    assert holds(get().folder, contents(1))


def test_a_refusal_is_not_asked_again(hub: Hub) -> None:
    hub.status = 403
    assert "HTTP 403" in refused(EnvironmentFault)
    assert len(hub.asked) == 1


def test_an_endpoint_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    said = refused(EnvironmentFault)
    assert f"http://127.0.0.1:9/{REPO}: the hub cannot be reached" in said
    assert "password" not in said


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example", "http://", "http://a b", "http://a:port"])
def test_an_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT: this is no web address" in refused(EnvironmentFault)


@pytest.mark.parametrize(
    "listing",
    [
        b"<p>Log in to this network",
        [],
        {},
        {"siblings": None},
        {"sha": "../../x", "siblings": []},
        {"sha": OLD, "siblings": [1]},
        {"sha": OLD},
    ],
)
def test_an_answer_that_is_no_hubs(hub: Hub, listing: Any) -> None:
    hub.listing = listing
    assert "does not answer as the hub does" in refused(EnvironmentFault)


def test_a_commit_that_was_not_asked_for_is_refused(hub: Hub) -> None:
    hub.listing = hub.describe(NEW)
    assert "does not answer as the hub does" in refused(EnvironmentFault, OLD)


@pytest.mark.parametrize("entry", [{"blobId": "../../../escape"}, {"size": None}, {"blobId": None}, {"size": "9"}])
def test_a_file_that_nothing_vouches_for_is_refused(hub: Hub, entry: dict[str, Any]) -> None:
    hub.listing = hub.describe(NEW)
    for sibling in hub.listing["siblings"]:
        if sibling["rfilename"] == "config.json":
            sibling |= entry
    assert "no size or digest for config.json" in refused(EnvironmentFault)
    assert not hub.files_asked()


# --- the token --------------------------------------------------------------------------------------------------------


def test_the_token_comes_from_the_environment_and_goes_to_the_hub_alone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.gated, hub.private, hub.token = True, True, SECRET
    monkeypatch.setenv("HF_TOKEN", f" {SECRET}\n")
    out = io.StringIO()
    found = get(out=out)
    sent = {asked.headers.get("authorization") for asked in hub.asked if not asked.path.startswith("/store")}
    assert sent == {f"Bearer {SECRET}"}
    stores = [asked for asked in hub.asked if asked.path.startswith("/store")]
    assert stores
    assert not [asked for asked in stores if "authorization" in asked.headers]  # another host
    printed = capfd.readouterr()
    assert SECRET not in out.getvalue() + printed.out + printed.err + caplog.text + repr(found)
    assert SECRET not in repr(access.open_access(REPO, "main"))
    written = [path for path in disk.cache().parent.rglob("*") if path.is_file() and path.stat().st_size < 100_000]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_saved_token_is_not_read(hub: Hub) -> None:
    assert huggingface_hub.get_token() == SAVED  # the trap is set
    get()
    assert not [asked for asked in hub.asked if "authorization" in asked.headers]


def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for odd in ("é", "\nx", "\x7f"):
        monkeypatch.setenv("HF_TOKEN", f"{SECRET}{odd}x")
        assert "HF_TOKEN: it holds characters that no token has" in refused(EnvironmentFault)
    assert not hub.asked


# --- offline and local ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert "unset HF_HUB_OFFLINE to fetch it" in refused(EnvironmentFault)
    with pytest.raises(EnvironmentFault, match="not whole in the cache"):
        fetch.config(REPO)
    monkeypatch.delenv(name)
    found = get()
    hub.asked.clear()
    monkeypatch.setenv(name, "yes")
    assert get() == found
    assert get(NEW) == found
    assert fetch.config(REPO)["seed"] == 1
    refused(EnvironmentFault, "v1")
    assert not hub.asked


def test_a_library_that_is_offline_is_believed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It read the variable when it was first imported, which may be long ago."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in the cache" in refused(EnvironmentFault)


def test_local_wants_a_whole_snapshot(hub: Hub) -> None:
    assert fetch.local(REPO) is None
    found = get()
    assert fetch.local(REPO) == found
    for name in ("config.json", INDEX, *SHARDS):
        path = found.folder / name
        target = path.readlink()
        path.unlink()
        # Without its index the folder holds no weights that are named.
        assert fetch.local(REPO) is None, name
        path.symlink_to("../../blobs/gone")
        assert fetch.local(REPO) is None, name
        path.unlink()
        path.symlink_to(target)
    shutil.copytree(found.folder, disk.home(REPO) / "elsewhere")
    (disk.home(REPO) / "refs" / "main").write_text("../elsewhere")
    assert fetch.local(REPO) is None
    assert fetch.local("../Tiny") is None


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", None])
def test_the_cache_is_where_the_library_puts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable:
        monkeypatch.setenv(variable, "~/some/$USER_WORD")
        monkeypatch.setenv("USER_WORD", "word")
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert str(disk.cache()) == asked.stdout.strip()


@pytest.mark.parametrize("layout", ["hub/models/Acme/Tiny-1___5B", "hub/Acme/Tiny-1___5B", "models/Acme/Tiny-1___5B"])
@pytest.mark.parametrize("moved", [False, True])
def test_modelscope_folders_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, moved: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    if moved:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "moved"))
    folder = (tmp_path / "moved" if moved else tmp_path / "user" / ".cache" / "modelscope") / layout
    folder.mkdir(parents=True)
    for name, data in contents().items():
        (folder / name).write_bytes(data)
    found = fetch.local(REPO)
    assert found == Fetched(folder=folder, repo=REPO, commit="", origin="modelscope")
    assert fetch.local(REPO, "main") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get() == found
    assert fetch.config(REPO)["seed"] == 0
    (folder / SHARDS[1]).unlink()
    assert fetch.local(REPO) is None


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen-14B", "Qwen/Qwen2.5-14B-Instruct", "a/b", "a_b/_c", "qwen", "./base", "a/b/c", "../x", "a/..",
        "a/.b", "a/b.", "a--b/c", "a/b--c", "a/b..c", "a/b.git", "a/ b", "a/b\n", "é/b", "/a", "a/", "x" * 97 + "/b",
        "", "-a/b", "a-/b", f"{'x' * 96}/{'y' * 96}",
    ],
)  # fmt: skip
def test_a_hub_id_is_what_the_library_takes(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        taken = "/" in name
    except ValueError:
        taken = False
    assert fetch.is_hub_id(name) is taken
