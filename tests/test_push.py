"""``push``: the release is published and nothing else, in one commit, or nothing is; against a hub on this machine."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

from finetune import proof, push, seal, upload, verify
from finetune.errors import EnvironmentFault, FinetuneError, Interrupted, ModelError
from finetune.terminal import Terminal
from tests import runs, uploadhub
from tests.uploadhub import FIRST, TOKEN, UploadHub

REPO = "acme/tiny"
SAVED = "hf_savedByALogin"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


def make(folder: Path, seed: int = 0, **more: bytes) -> Path:
    """A release of a few files, sealed as ``finetune release`` seals it; ``more``: further files."""
    (folder / "adapter").mkdir(parents=True)
    files = {
        "README.md": CARD.encode(),
        "LICENSE": b"terms",
        "config.json": json.dumps({"seed": seed}).encode(),
        "model.safetensors": random.Random(seed).randbytes(2_500_000),
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": random.Random(seed + 1).randbytes(300_000),
    }
    for name, data in (files | more).items():
        (folder / name).write_bytes(data)
    made = {"base": {"name": "Qwen/Qwen-14B", "commit": "c" * 40}, "recipe": {"output": "/home/me/runs/dates"}}
    seal.write(folder, made | {"licence": "apache-2.0"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The hub, an empty cache, a token that may write, and another that a login left on the disk."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    (tmp_path / "hf").mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between the library's attempts
    sought = hosts_sought(monkeypatch)
    huggingface_hub.close_session()
    with uploadhub.running(UploadHub()) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint + "/")
        # Whatever the library asked for by itself would come here too, and be seen.
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield served
        huggingface_hub.close_session()
    assert sought <= {"127.0.0.1"}


def hosts_sought(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """Every host whose address is asked for from now on; of this machine alone one is given."""
    found: set[object] = set()
    ask = socket.getaddrinfo

    def asked(host: object, *rest: Any, **more: Any) -> Any:
        found.add(host)
        return ask("127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests, and not to be changed."""
    return make(tmp_path_factory.mktemp("release") / "out")


def pushed(folder: Path, repo: str = REPO, *, private: bool = True, revision: str | None = None) -> str:
    out = io.StringIO()
    push.push(folder, repo, Terminal(out), private=private, revision=revision)
    assert TOKEN not in out.getvalue()
    return out.getvalue()


def refused(kind: type[FinetuneError], folder: Path, repo: str = REPO, *, revision: str | None = None) -> str:
    out = io.StringIO()
    with pytest.raises(kind) as caught:
        push.push(folder, repo, Terminal(out), revision=revision)
    assert type(caught.value) is kind
    for fault in caught.value.faults:
        assert fault.fix
        assert "\n" not in str(fault)
    assert TOKEN not in str(caught.value) + out.getvalue()
    return str(caught.value)


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_the_release_arrives_whole_private_and_in_one_commit(hub: UploadHub, made: Path) -> None:
    out = pushed(made)
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.files == FIRST | contents(made)
    (message,) = repo.messages
    digest = verify.listed_in((made / "SHA256SUMS").read_bytes())["manifest.json"]
    assert message["summary"] == f"Release of run dates, manifest {digest[:16]}"
    assert digest in message["description"]
    assert f"Qwen/Qwen-14B {'c' * 40}" in message["description"]
    assert "/home/me" not in json.dumps(message)
    commit = repo.branches["main"]
    assert f"pushed: {hub.endpoint}/{REPO}/tree/{commit}" in out
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", revision="{commit}")' in out
    assert f'from_pretrained(base, "{REPO}", revision="{commit}", subfolder="adapter")' in out
    assert f"hf download {REPO} --revision {commit}" in out
    assert "uploading to acme/tiny, MB 2/3" in out or "uploading to acme/tiny, MB 3/3" in out
    assert all("agent" not in path and "whoami" not in path for path in hub.paths())
    assert all("torch" not in asked.headers["user-agent"] for asked in hub.asked)


def test_large_files_go_in_parts_where_the_hub_asks_for_it(hub: UploadHub, made: Path) -> None:
    hub.part = 1_000_000
    pushed(made)
    assert hub.repos[REPO].files == FIRST | contents(made)
    assert len([path for path in hub.paths() if path.startswith("/store/")]) == 3 + 1 + 1 + 1


def test_equal_files_are_sent_once(hub: UploadHub, tmp_path: Path) -> None:
    """Two threads of the library that read one file would each send parts of it."""
    data = random.Random(3).randbytes(3_000_000)
    folder = make(tmp_path / "out", **{f"copy-{n}.safetensors": data for n in range(4)})
    pushed(folder)
    assert hub.repos[REPO].files == FIRST | contents(folder)
    assert len([path for path in hub.paths() if path.startswith("/store/")]) == 3


def test_a_download_of_it_verifies(
    hub: UploadHub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``finetune release`` made of a trained run; the download is huggingface_hub's own."""
    Path("base/LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    said = runs.finetune("release", "runs/one", "--out", "out", "--what", "both", "--data-licence", "cc0-1.0")
    assert said.code == 0, said.err
    pushed(Path("out"))
    (message,) = hub.repos[REPO].messages
    assert message["summary"].startswith("Release of run one, manifest ")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    to = tmp_path / "down"
    commit = hub.repos[REPO].branches["main"]
    huggingface_hub.HfApi(endpoint=hub.endpoint).snapshot_download(REPO, revision=commit, local_dir=to)
    assert {name: data for name, data in contents(to).items() if not name.startswith(".cache")} == contents(Path("out"))
    assert verify.faults(to) == []


def test_the_librarys_settings_are_as_before(hub: UploadHub, made: Path) -> None:
    log = logging.getLogger("huggingface_hub")

    def state() -> tuple[object, ...]:
        return (
            are_progress_bars_disabled(), log.level, constants.HF_HUB_DISABLE_TELEMETRY, _http._GLOBAL_CLIENT_FACTORY,
            signal.getsignal(signal.SIGINT), len(huggingface_hub.get_session().event_hooks["request"]),
        )  # fmt: skip

    enable_progress_bars()
    before = state()
    assert before[0] is False
    pushed(made)
    assert state() == before
    hub.answers["/commit/"] = [(500, "")]
    refused(EnvironmentFault, make(made.parent / "other", 5))
    assert state() == before


# --- what is sent -----------------------------------------------------------------------------------------------------


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[77] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def unseal(folder: Path) -> None:
    for name in ("manifest.json", "SHA256SUMS"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (flip, FinetuneError, "model.safetensors is damaged"),
        (lambda folder: (folder / "secrets.env").write_text("x"), FinetuneError, "secrets.env was added"),
        (lambda folder: (folder / "LICENSE").unlink(), FinetuneError, "LICENSE is missing"),
        (unseal, ModelError, "missing"),
        (lambda folder: (folder / "config.json").rename(folder / proof.UNUSABLE), ModelError, "marked unusable"),
    ],
)  # fmt: skip
def test_only_a_release_that_verifies_is_sent(
    hub: UploadHub, tmp_path: Path, spoil: Callable[[Path], object], kind: type[FinetuneError], said: str
) -> None:
    folder = make(tmp_path / "out")
    spoil(folder)
    assert said in refused(kind, folder)
    assert hub.asked == []


def test_a_folder_that_is_not_there(hub: UploadHub, tmp_path: Path) -> None:
    assert "no such folder" in refused(ModelError, tmp_path / "nowhere")
    assert hub.asked == []


def test_a_file_that_changes_meanwhile_is_not_sent(hub: UploadHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    hub.meanwhile["/tree/"] = lambda: flip(folder)
    assert "model.safetensors changed" in refused(FinetuneError, folder)
    assert hub.store == {}
    assert hub.repos[REPO].files == FIRST


def test_licences_that_are_not_known_are_said(hub: UploadHub, tmp_path: Path) -> None:
    card = CARD + "\n**Not known**: the licence of the data train.jsonl is unknown.\n"
    folder = make(tmp_path / "out", **{"README.md": card.encode()})
    assert "not known, and the card says so: the licence of the data train.jsonl is unknown." in pushed(folder)


# --- where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo", ["tiny", "a/b/c", "acme/ti ny", "acme/ti--ny", "acme/tiny.git", "-a/b", "../x", "", "a/é"]
)
def test_a_name_that_is_none(hub: UploadHub, made: Path, repo: str) -> None:
    assert "owner/name" in refused(EnvironmentFault, made, repo)
    assert hub.asked == []


def test_without_a_token_nothing_is_asked(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN" in refused(EnvironmentFault, made)
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    assert "copy the token again" in refused(EnvironmentFault, made)
    assert hub.asked == []


def test_a_stored_login_serves_where_the_environment_has_none(
    hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    pushed(made)
    assert hub.repos[REPO].messages
    Path(constants.HF_TOKEN_PATH).write_text(SAVED)
    assert "does not accept the token" in refused(EnvironmentFault, made)


def test_offline(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in refused(EnvironmentFault, made)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the library read it when it was imported
    assert "offline" in refused(EnvironmentFault, made)
    assert hub.asked == []


def test_a_new_repository_is_public_only_when_asked(hub: UploadHub, made: Path) -> None:
    assert "was made, public: everybody" in pushed(made, private=False)
    assert not hub.repos[REPO].private
    assert "exists and stays as it is, public" in pushed(made)
    assert not hub.repos[REPO].private
    hub.make("acme/closed")
    assert "exists and stays as it is, private" in pushed(made, "acme/closed", private=False)
    assert hub.repos["acme/closed"].private


def test_nothing_is_sent_where_the_hub_makes_public_what_was_to_be_private(hub: UploadHub, made: Path) -> None:
    hub.always_public = True
    assert "was to be private" in refused(EnvironmentFault, made)
    assert hub.repos[REPO].files == FIRST
    assert hub.store == {}


def test_a_branch_must_be_there(hub: UploadHub, made: Path) -> None:
    assert "a new one has no branch v2" in refused(EnvironmentFault, made, revision="v2")
    assert hub.repos == {}
    repo = hub.make(REPO)
    assert "no branch v2" in refused(EnvironmentFault, made, revision="v2")
    assert "only a branch" in refused(EnvironmentFault, made, revision="a" * 40)
    repo.branches["v2"] = repo.branches["main"]
    pushed(made, revision="v2")
    assert repo.files == FIRST
    assert repo.commits[repo.branches["v2"]] == FIRST | contents(made)


# --- what is there already --------------------------------------------------------------------------------------------


def test_the_same_release_again_makes_no_commit(hub: UploadHub, made: Path) -> None:
    pushed(made)
    assert "it was there already" in pushed(made)
    assert len(hub.repos[REPO].messages) == 1


def test_a_release_takes_the_place_of_the_former_one(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    pushed(make(tmp_path / "former", 7, **{"model-2.safetensors": b"more", "NOTICE": b"old"}))
    pushed(made)
    assert hub.repos[REPO].files == FIRST | contents(made)
    assert len(hub.repos[REPO].messages) == 2


def test_files_that_no_release_put_there_are_not_touched(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    repo = hub.make(REPO, **{"thesis.pdf": b"years"})
    before = dict(repo.files)
    assert "thesis.pdf" in refused(EnvironmentFault, made)
    assert repo.files == before
    repo.add("main", before | contents(make(tmp_path / "former", 7)))
    assert "thesis.pdf" in refused(EnvironmentFault, made)
    repo.add("main", {**FIRST, "SHA256SUMS": b"of something else", "x": b""})
    assert "put there: x" in refused(EnvironmentFault, made)
    assert hub.store == {}


def test_somebody_elses_commit_meanwhile_is_not_overwritten(hub: UploadHub, made: Path) -> None:
    repo = hub.make(REPO)
    hub.meanwhile["/commit/"] = lambda: str(repo.add("main", FIRST | {"other": b"theirs"}))
    assert "somebody else changed" in refused(EnvironmentFault, made)
    assert repo.files == FIRST | {"other": b"theirs"}


# --- what came out of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "SHA256SUMS", "manifest.json"])
def test_what_arrived_is_compared_with_what_was_released(hub: UploadHub, made: Path, name: str) -> None:
    hub.twist = lambda path, data: data[:-1] + b"#" if path == name else data
    said = refused(FinetuneError, made)
    assert f"{name} arrived with other bytes" in said
    assert said.count("arrived") == 1
    assert hub.repos[REPO].branches["main"] in said


def test_files_too_many_or_too_few_are_named(hub: UploadHub, made: Path) -> None:
    def change() -> None:
        repo = hub.repos[REPO]
        files = {name: data for name, data in repo.files.items() if name != "LICENSE"}
        repo.commits[repo.branches["main"]] = files | {"added.bin": b""}

    hub.make(REPO)
    hub.meanwhile["/tree/"] = lambda: hub.meanwhile.update({"/tree/": change})
    said = refused(FinetuneError, made)
    assert "LICENSE is missing" in said
    assert "added.bin is there, and was not released" in said


# --- the hub refuses, or cannot be reached ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/revision/", 401, "does not accept the token.*set HF_TOKEN.*nothing was sent"),
        ("/revision/", 500, "HTTP 500.*nothing was sent"),
        ("/create", 401, "does not accept the token"),
        ("/create", 403, "may not write there.*write permission.*acme"),
        ("/create", 404, "no owner acme"),
        ("/create", 409, "repository of this name.*may not see"),
        ("/create", 503, "HTTP 503.*nothing was sent"),
        ("/create", 402, "HTTP 402: pay first"),
        ("/tree/", 403, "may not write there.*nothing was sent"),
        ("/preupload/", 403, "may not write there.*nothing was published"),
        ("/objects/batch", 403, "may not write there"),
        ("/store/", 403, "may not write there.*nothing was published"),
        ("/commit/", 403, "may not write there.*nothing was published"),
        ("/commit/", 409, "somebody else changed"),
        ("/commit/", 413, "HTTP 413.*nothing was published"),
        ("/commit/", 504, "HTTP 504.*finds out whether it was published"),
    ],
)
def test_a_refusal_is_one_message(hub: UploadHub, made: Path, path: str, status: int, said: str) -> None:
    hub.answers[path] = [(status, f"pay first {TOKEN}")]
    text = refused(EnvironmentFault, made)
    assert re.search(said, text), text
    assert f"{hub.endpoint}/{REPO}" in text
    assert all(repo.files == FIRST for repo in hub.repos.values())


def test_another_owner(hub: UploadHub, made: Path) -> None:
    assert "write permission of somebody who may write to else" in refused(EnvironmentFault, made, "else/tiny")


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/store/"])
def test_a_hub_that_fails_for_a_while_is_asked_again(hub: UploadHub, made: Path, path: str) -> None:
    hub.answers[path] = [(503, "")] * 3
    pushed(made)
    assert hub.repos[REPO].files == FIRST | contents(made)


def test_storage_that_keeps_failing(hub: UploadHub, made: Path) -> None:
    hub.answers["/store/"] = [(500, "")] * 99
    assert "goes on from there" in refused(EnvironmentFault, made)
    assert hub.repos[REPO].files == FIRST


def test_a_failure_after_the_commit_says_that_it_was_made(hub: UploadHub, made: Path) -> None:
    hub.make(REPO)
    hub.meanwhile["/commit/"] = lambda: hub.answers.update({"/tree/": [(403, "")]})
    assert "it was published, and could not be read back" in refused(EnvironmentFault, made)
    assert "it was there already" in pushed(made)


def test_a_hub_that_is_not_there(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:password@127.0.0.1:{port}")
    said = refused(EnvironmentFault, made)
    assert f"127.0.0.1:{port}/{REPO}" in said
    assert "password" not in said
    assert "check the network" in said


@pytest.mark.parametrize(("path", "said"), [("/revision/", "nothing was sent"), ("/tree/", "nothing was sent"),
                                            ("/commit/", "finds out whether")])  # fmt: skip
def test_a_hub_that_says_nothing_is_not_waited_for(
    hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    hub.make(REPO)
    monkeypatch.setattr(upload, "SECONDS", 0.2)

    def dawdle() -> None:
        hub.meanwhile[path] = dawdle
        time.sleep(0.5)

    hub.meanwhile[path] = dawdle
    assert said in refused(EnvironmentFault, made)


def test_a_commit_whose_answer_was_lost_is_found(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make(REPO)
    with monkeypatch.context() as patched:
        patched.setattr(upload, "SECONDS", 0.3)
        hub.meanwhile["/commit/"] = lambda: time.sleep(0.6)
        refused(EnvironmentFault, made)
    time.sleep(0.5)
    assert "it was there already" in pushed(made)
    assert len(hub.repos[REPO].messages) == 1


@pytest.mark.parametrize("path", ["/revision/", "/create", "/preupload/", "/objects/batch", "/commit/", "/tree/"])
@pytest.mark.parametrize("raw", [b"<html>welcome to this network", b'["no", "hub"]', b'{"no": "hub"}'])
def test_an_endpoint_that_is_no_hub(hub: UploadHub, made: Path, path: str, raw: bytes) -> None:
    hub.raw[path] = raw
    assert "check HF_ENDPOINT" in refused(EnvironmentFault, made)


def test_an_answer_that_names_another_host(hub: UploadHub, made: Path) -> None:
    hub.moved = "https://elsewhere.example"
    assert "look at that page" in refused(EnvironmentFault, made)


def test_a_card_that_the_hub_refuses(hub: UploadHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", **{"README.md": b"no header"})
    assert "refuses the card" in refused(EnvironmentFault, folder)
    assert hub.repos[REPO].files == FIRST


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/preupload/", "/objects/batch", "/store/"])
def test_a_stop_leaves_the_branch_as_it_was(hub: UploadHub, made: Path, path: str) -> None:
    hub.make(REPO)
    hub.meanwhile[path] = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1))
    said = refused(Interrupted, made)
    assert "nothing was published" in said
    assert hub.repos[REPO].files == FIRST
    assert hub.repos[REPO].messages == []
    pushed(made)
    assert hub.repos[REPO].files == FIRST | contents(made)


def test_what_came_before_a_stop_is_not_sent_again(hub: UploadHub, made: Path) -> None:
    hub.make(REPO)
    hub.answers["/commit/"] = [(503, "")]
    refused(EnvironmentFault, made)
    sent = len([path for path in hub.paths() if path.startswith("/store/")])
    pushed(made)
    assert len([path for path in hub.paths() if path.startswith("/store/")]) == sent == 2


def test_a_stop_while_the_hub_commits_waits_for_its_answer(hub: UploadHub, made: Path) -> None:
    hub.make(REPO)
    hub.meanwhile["/commit/"] = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2))
    assert "nothing is lost" in refused(Interrupted, made)
    assert hub.repos[REPO].files == FIRST | contents(made)
    assert "it was there already" in pushed(made)


def test_the_uploads_of_many_files_end_at_a_stop(hub: UploadHub, tmp_path: Path) -> None:
    """The library waits for its threads when it is interrupted: each must end at its next block, not with its file."""
    more = {f"shard-{n}.safetensors": random.Random(n).randbytes(12_000_000) for n in range(6)}
    folder = make(tmp_path / "out", **more)
    hub.make(REPO)
    hub.pause = 0.5
    hub.meanwhile["/store/"] = lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGTERM))
    refused(Interrupted, folder)
    hub.pause = 0
    assert [oid for oid, data in hub.store.items() if len(data) > 3_000_000] == []
    assert hub.repos[REPO].files == FIRST
