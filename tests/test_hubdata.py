"""Data sets on the hub: the rows, the commit they come from, and every refusal, against a small hub on this machine."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from finetune import hubdata
from finetune.errors import DataError, EnvironmentFault, FinetuneError
from finetune.fetch import access
from tests.datahub import NEW, OLD, REPO, DataHub, running

SECRET, SAVED = "hf_secretFromTheEnvironment", "hf_savedByALogin"
ROOT = Path(__file__).resolve().parents[1]


def texts(word: str, count: int = 4) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}", "label": i} for i in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    """The hub, an empty cache, a token that a login left on the disk, and a local folder of the data set's name."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(SAVED)
    decoy = tmp_path / "here" / REPO
    decoy.mkdir(parents=True)
    (decoy / "train.jsonl").write_bytes(jsonl(texts("local")))
    monkeypatch.chdir(tmp_path / "here")
    commits = {
        OLD: {"train.jsonl": jsonl(texts("old"))},
        NEW: {"README.md": b"# Rows\n", "train.jsonl": jsonl(texts("new")), "test.jsonl": jsonl(texts("held", 2))},
    }
    with running(DataHub(commits=commits, refs={"main": NEW, "v1": OLD, "refs/pr/7": OLD})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint + "/")
        _as_imported(monkeypatch, served.endpoint, tmp_path / "hf")
        yield served
    huggingface_hub.close_session()


def _as_imported(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """What the libraries read from the environment when they were imported, as this test's environment has it."""
    for name, value in {
        "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_OFFLINE": False, "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"), "AGENT_HARNESSES_PATH": str(home / "agents.json"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name in (
        "HF_ENDPOINT",
        "HF_UPDATE_DOWNLOAD_COUNTS",
        "STREAMING_OPEN_MAX_RETRIES",
        "STREAMING_READ_MAX_RETRIES",
    ):
        monkeypatch.setattr(datasets.config, name, getattr(datasets.config, name))  # so that they are put back
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(access, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()


def words(rows: Iterator[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def refused(kind: type[FinetuneError], split: str = "train", name: str = REPO, **given: Any) -> str:
    with pytest.raises(kind) as caught:
        list(hubdata.stream(name, split, **given))
    (fault,) = caught.value.faults
    assert fault.fix
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_jsonl(hub: DataHub) -> None:
    assert list(hubdata.stream(REPO, "train")) == texts("new")
    assert list(hubdata.stream(REPO, "test")) == texts("held", 2)
    assert hubdata.splits(REPO) == ["train", "test"]


def test_rows_of_parquet_over_several_files(hub: DataHub) -> None:
    hub.commits[NEW] = {
        "data/train-00000-of-00002.parquet": parquet(texts("a")),
        "data/train-00001-of-00002.parquet": parquet(texts("b")),
        "data/validation-00000-of-00001.parquet": parquet(texts("c")),
    }
    assert list(hubdata.stream(REPO, "train")) == texts("a") + texts("b")
    assert hubdata.splits(REPO) == ["train", "validation"]


def test_a_row_keeps_what_its_turns_hold(hub: DataHub) -> None:
    """Turns of different shapes in one column: ``datasets`` holds them as JSON, and they come back as they were."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "two"}]}]},
    ]
    hub.commits[NEW] = {"train.jsonl": jsonl(rows)}
    assert list(hubdata.stream(REPO, "train")) == rows


def test_images_stay_the_bytes_they_are(hub: DataHub) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "pages": datasets.List(datasets.Image())})
    rows = [{"text": "a", "pages": [{"bytes": b"no image at all", "path": None}]}]
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    out = io.BytesIO()
    pq.write_table(table, out)
    hub.commits[NEW] = {"train.parquet": out.getvalue()}
    assert list(hubdata.stream(REPO, "train")) == rows


def test_a_subset_of_the_readme(hub: DataHub) -> None:
    readme = (
        "configs:\n- config_name: easy\n  data_files: easy/*.jsonl\n- config_name: hard\n  data_files: hard/*.jsonl"
    )
    hub.commits[NEW] = {
        "README.md": f"---\n{readme}\n---\n# Rows\n".encode(),
        "easy/a.jsonl": jsonl(texts("easy")),
        "hard/a.jsonl": jsonl(texts("hard")),
    }
    assert words(hubdata.stream(REPO, "train", subset="hard")) == [f"hard {i}" for i in range(4)]
    said = refused(DataError)
    assert "easy" in said
    assert "hard" in said
    assert "easy" in refused(DataError, subset="middling")


# --- which commit -----------------------------------------------------------------------------------------------------


def test_the_commit_is_what_the_name_means_now(hub: DataHub) -> None:
    assert (hubdata.commit(REPO), hubdata.commit(REPO, "v1"), hubdata.commit(REPO, OLD)) == (NEW, OLD, OLD)
    assert hubdata.commit(REPO, "refs/pr/7") == OLD
    hub.refs["main"] = OLD
    assert hubdata.commit(REPO, "main") == OLD


def test_a_commit_reads_the_same_rows_after_the_branch_has_moved(hub: DataHub) -> None:
    hub.refs["main"] = OLD
    fixed = hubdata.commit(REPO)
    hub.refs["main"] = NEW
    assert words(hubdata.stream(REPO, "train", fixed)) == [f"old {i}" for i in range(4)]
    assert words(hubdata.stream(REPO, "train")) == [f"new {i}" for i in range(4)]


def test_a_branch_that_moves_while_rows_come_changes_nothing(hub: DataHub) -> None:
    hub.refs["main"] = OLD
    rows = hubdata.stream(REPO, "train", "main")
    hub.refs["main"] = NEW
    assert words(rows) == [f"old {i}" for i in range(4)]
    assert {asked.path.split("/")[5] for asked in hub.asked if "/resolve/" in asked.path} == {OLD}


# --- what is sent and kept --------------------------------------------------------------------------------------------


def test_the_token_is_the_environments_or_none(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    list(hubdata.stream(REPO, "train"))
    assert not {asked.headers.get("authorization") for asked in hub.asked} - {None}
    hub.asked.clear()
    hub.token = SECRET
    hub.private = True
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert words(hubdata.stream(REPO, "train"))
    about = [asked for asked in hub.asked if REPO in asked.path]
    assert {asked.headers.get("authorization") for asked in about} == {f"Bearer {SECRET}"}


def test_nothing_is_asked_of_another_host(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` by itself would tell a third host the name of what is read."""
    reached = []
    connect, look = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", lambda self, at: (reached.append(at[0]), connect(self, at))[1])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: (reached.append(host), look(host, *rest, **more))[1]
    )
    list(hubdata.stream(REPO, "train"))
    assert set(reached) == {"127.0.0.1"}


def test_nothing_is_written_but_in_the_cache(hub: DataHub, tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if tmp_path / "hf" not in path.parents)
    list(hubdata.stream(REPO, "train"))
    assert sorted(path for path in tmp_path.rglob("*") if tmp_path / "hf" not in path.parents) == before
    assert not list((tmp_path / "hf").rglob("*.jsonl")), "rows are streamed, not kept"


def test_a_script_beside_the_rows_is_never_run(hub: DataHub, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n".encode()
    hub.commits[NEW] |= {"loader.py": code, "__init__.py": code, "setup.py": code}
    assert list(hubdata.stream(REPO, "train")) == texts("new")
    hub.commits[OLD]["Chat-Rows.py"] = code  # the name of what used to be run
    said = refused(DataError, revision="v1")
    assert "script" in said
    assert "refs/convert/parquet" in said
    assert not ran.exists()
    assert not [asked for asked in hub.asked if asked.path.endswith(("loader.py", "setup.py"))]


def test_the_installed_library_has_no_switch_to_run_code(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    with pytest.raises(ValueError, match="trust_remote_code"):
        datasets.load_dataset_builder(f"hf://datasets/{REPO}", revision=NEW, token=False, trust_remote_code=True)


def test_the_environment_alone_is_enough(hub: DataHub, tmp_path: Path) -> None:
    """A process of its own, as a user's: the libraries read the endpoint and the cache when they are imported."""
    code = f"from finetune import hubdata; print([row['text'] for row in hubdata.stream({REPO!r}, 'test')])"
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint + "/", "HF_HOME": str(tmp_path / "other"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "['held 0', 'held 1']\n", done.stderr
    assert (tmp_path / "other" / "datasets").is_dir()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_split_that_is_not_there(hub: DataHub) -> None:
    said = refused(DataError, "validation")
    assert "no split validation" in said
    assert "train, test" in said
    assert f"/datasets/{REPO}" in said


def test_what_is_not_on_the_hub(hub: DataHub) -> None:
    assert "no such repository" in refused(DataError, name="Acme/Nothing")
    assert "no revision v9" in refused(DataError, revision="v9")
    assert "no name" in refused(DataError, name="../Chat")
    assert "no name" in refused(DataError, revision="../main")
    with pytest.raises(DataError):
        hubdata.commit("Acme/Nothing")


def test_gated_for_who_has_no_token_and_for_who_has_the_wrong_one(
    hub: DataHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated, hub.token = True, SECRET
    assert "gated, and there is no token" in refused(EnvironmentFault)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "gated, and the token in HF_TOKEN has no access" in refused(EnvironmentFault)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert words(hubdata.stream(REPO, "train"))


def test_a_token_that_the_hub_does_not_accept(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "does not accept the token" in refused(EnvironmentFault)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nothing(hub: DataHub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    said = refused(EnvironmentFault)
    assert "offline" in said
    assert "name that folder" in said
    with pytest.raises(EnvironmentFault):
        hubdata.commit(REPO)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "cannot be reached" in refused(EnvironmentFault)


@pytest.mark.parametrize("described", [[], {"sha": "main"}, {"id": REPO}, {"sha": 7}])
def test_an_endpoint_that_is_no_hub(hub: DataHub, described: Any) -> None:
    hub.described = described
    assert "does not answer as the hub does" in refused(EnvironmentFault)


def test_another_commit_than_was_asked_for(hub: DataHub) -> None:
    hub.described = {"sha": NEW}
    assert "does not answer as the hub does" in refused(EnvironmentFault, revision=OLD)


def test_files_that_hold_no_rows(hub: DataHub) -> None:
    hub.commits[NEW] = {"README.md": b"# Nothing\n", "LICENSE": b"terms"}
    assert "cannot be read" in refused(DataError)
    hub.commits[OLD] = {"train/a.png": b"png", "train/b.png": b"png"}
    assert "imagefolder" in refused(DataError, revision="v1")


@pytest.mark.parametrize("path", ["/etc/*.jsonl", "../*.jsonl", "http://127.0.0.1:1/a.jsonl", "hf://datasets/A/B/x"])
def test_a_readme_that_points_elsewhere(hub: DataHub, path: str) -> None:
    hub.commits[NEW]["README.md"] = f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n".encode()
    with pytest.raises((DataError, EnvironmentFault)):
        hubdata.stream(REPO, "train")


def test_a_readme_that_is_no_yaml(hub: DataHub) -> None:
    hub.commits[NEW]["README.md"] = b"---\nconfigs: [\n---\n"
    assert "cannot be read" in refused(DataError)


def test_a_cache_that_cannot_be_written(hub: DataHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    assert "set HF_HOME" in refused(EnvironmentFault)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "set HF_HOME" in refused(EnvironmentFault)


# --- in the midst -----------------------------------------------------------------------------------------------------


def shards(hub: DataHub, second: bytes) -> str:
    """Two files of one split, four rows in the first; the name of the second."""
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    hub.commits[NEW] = dict(zip(names, (parquet(texts("a")), second), strict=True))
    return names[1]


def test_a_connection_that_breaks_is_taken_up_again(hub: DataHub) -> None:
    name = shards(hub, parquet(texts("b", 2000)))
    hub.cuts[name] = [100, 0, 3000]
    assert list(hubdata.stream(REPO, "train")) == texts("a") + texts("b", 2000)
    assert hub.cuts[name] == []


def test_a_connection_that_stays_broken_names_the_row(hub: DataHub) -> None:
    hub.cuts[shards(hub, parquet(texts("b")))] = [10] * 100
    rows = hubdata.stream(REPO, "train")
    assert [next(rows) for _ in range(4)] == texts("a")
    with pytest.raises(EnvironmentFault) as caught:
        next(rows)
    assert "cannot be reached" in str(caught.value)
    assert "after row 4" in str(caught.value)


def test_a_file_that_the_hub_refuses_in_the_midst_names_the_row(hub: DataHub) -> None:
    name = shards(hub, parquet(texts("b")))
    hub.statuses[name] = 403
    said = refused(EnvironmentFault)
    assert "after row 4" in said
    assert "403" in said


@pytest.mark.parametrize("second", [b"PAR1 and then nothing that Parquet knows", parquet(texts("b"))[:-40] + b"x" * 40])
def test_contents_that_cannot_be_read_name_the_row(hub: DataHub, second: bytes) -> None:
    shards(hub, second)
    assert "after row 4" in refused(DataError)


def test_json_that_is_broken(hub: DataHub) -> None:
    hub.commits[NEW] = {"train.jsonl": jsonl(texts("a")) + b'{"text": oops}\n'}
    assert "JSON parse error" in refused(DataError)


def test_columns_that_change_their_type(hub: DataHub) -> None:
    shards(hub, parquet([{"text": ["no", "text"], "label": 1}]))
    said = refused(DataError)
    assert "after row" in said


def test_a_recipe_trains_on_a_data_set_of_the_hub(hub: DataHub, work: Path) -> None:
    """Checked, trained, resumed: at the commit that the branch meant, and refused once it means another."""
    from tests.runs import OUTPUT, chat, finetune, train

    hub.commits[NEW]["train.jsonl"] = jsonl([chat(f"{n}", "x") for n in range(9)])
    hub.commits[NEW]["test.jsonl"] = jsonl([chat("held", "x")])
    said = finetune("data", "check", REPO, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["sources"][0]["summary"]["trainable"] == 9
    changes = (f"data.train_path={REPO}", f"data.eval_path={REPO}", "evaluate.metrics=[loss]", "train.steps=2")
    said = train(*changes)
    assert said.code == 0, said.err
    identity = json.loads((OUTPUT / "identity.json").read_text())
    assert identity["data"] == {REPO: NEW}
    assert "nothing to do" in train(*changes).out
    hub.commits[OLD]["train.jsonl"], hub.commits[OLD]["test.jsonl"] = (
        hub.commits[NEW][name] for name in ("train.jsonl", "test.jsonl")
    )
    hub.refs["main"] = OLD
    said = train(*changes)
    assert said.code == 3
    assert f"{REPO}: this file is not the one that the run began with" in said.err
