"""A run's copies elsewhere: whole or not taken, wherever fsspec reaches, and an empty folder goes on from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from finetune import loop
from tests import runs
from tests.runs import OUTPUT, train
from tests.test_run import signal_at

MEMORY = "train.copy_to=memory://bucket/runs"


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """Another place: an object store's shape, in this process."""
    there = fsspec.filesystem("memory")
    yield there
    there.store.clear()
    there.pseudo_dirs[:] = [""]


def copies(there: fsspec.AbstractFileSystem, root: str = "/bucket/runs/one") -> list[str]:
    return sorted(str(path).rpartition("/")[2] for path in there.ls(root, detail=False))


def interrupted(patch: pytest.MonkeyPatch, *overrides: str, step: int = 5) -> runs.Said:
    """The command, asked to stop in that step."""
    with patch.context() as asking:
        signal_at(asking, loop.torch.nn.utils, "clip_grad_norm_", step)
        return train(*overrides)


def same_as(trained: Path, *, judged: bool = True) -> None:
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert runs.curve() == runs.curve(trained / OUTPUT)
    for name in () if not judged else ("scores.json", "samples.jsonl", "losses.jsonl"):
        assert (OUTPUT / name).read_bytes() == (trained / OUTPUT / name).read_bytes()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_another_machine_goes_on_from_the_copy_and_ends_with_the_same_bits(
    work: Path, trained: Path, bucket: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = MEMORY if kind == "memory" else f"train.copy_to=file://{work}/mounted"
    assert interrupted(monkeypatch, place).code == 6
    shutil.rmtree("runs")
    said = train(place)
    assert said.code == 0, said.err
    assert "taken over from " in said.out
    assert "going on after step 5" in said.out
    same_as(trained)
    shutil.rmtree("runs")
    said = train(place)  # what is finished is there, too
    assert "this run is finished (6 steps)" in said.out
    same_as(trained)


def test_only_whole_copies_are_kept_and_no_more_than_asked(work: Path, bucket: Any) -> None:
    bucket.pipe_file("/bucket/runs/one/step-00000001-00000000000000000001/adapter/half", b"a copy that was cut off")
    bucket.pipe_file("/bucket/runs/one/notes.txt", b"somebody's")
    assert train(MEMORY, "train.save_every=1").code == 0
    found = copies(bucket)
    assert "notes.txt" in found
    assert len([name for name in found if name.startswith("step-")]) == 2
    assert not bucket.glob("/bucket/**/*.tmp")
    assert not list(Path("runs").rglob("*.tmp-*"))
    newest = [name for name in found if name.startswith("step-")][-1]
    names = {path.partition(newest)[2] for path in bucket.find("/bucket/runs/one") if newest in path}
    assert {"/manifest.json", "/identity.json", "/finished.json", "/checkpoints/step-00000006/state.json"} <= names
    before = bucket.find("/bucket")
    assert train(MEMORY, "train.save_every=1").code == 0  # finished: nothing new to send
    assert bucket.find("/bucket") == before


def damage_bit(there: Any, copy: str) -> None:
    name = f"{copy}/checkpoints/step-00000004/optimizer.safetensors"
    data = bytearray(there.cat_file(name))
    data[len(data) // 2] ^= 1
    there.pipe_file(name, bytes(data))


def cut_off(there: Any, copy: str) -> None:
    name = f"{copy}/checkpoints/step-00000004/adapter_model.safetensors"
    there.pipe_file(name, there.cat_file(name)[:-7])


def without_manifest(there: Any, copy: str) -> None:
    there.rm(f"{copy}/manifest.json")


def torn_manifest(there: Any, copy: str) -> None:
    there.pipe_file(f"{copy}/manifest.json", there.cat_file(f"{copy}/manifest.json")[:-30])


def file_lost(there: Any, copy: str) -> None:
    there.rm(f"{copy}/identity.json")


def climbing(there: Any, copy: str) -> None:
    stored = json.loads(there.cat_file(f"{copy}/manifest.json"))
    stored["sha256"]["../../../escaped"] = "0" * 64
    there.pipe_file(f"{copy}/manifest.json", json.dumps(stored).encode())


@pytest.mark.parametrize("harm", [damage_bit, cut_off, without_manifest, torn_manifest, file_lost, climbing])
def test_a_copy_that_is_not_whole_is_passed_over_for_the_one_before(
    work: Path, trained: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, harm: Any
) -> None:
    assert train(MEMORY, options=["--until", "2"]).code == 0
    assert train(MEMORY, options=["--until", "4"]).code == 0
    newest = copies(bucket)[-1]
    assert newest.startswith("step-00000004")
    for name in copies(bucket):
        if name.startswith("step-00000004"):
            harm(bucket, f"/bucket/runs/one/{name}")
    shutil.rmtree("runs")
    said = train(MEMORY)
    assert said.code == 0, said.err
    assert "going on after step 2" in said.out
    assert ("is passed over" in said.out) == (harm is not without_manifest)
    same_as(trained, judged=False)  # --until judges where it pauses
    assert not (work / "escaped").exists()


def test_a_place_that_fails_stops_nothing_and_is_told_once(
    work: Path, trained: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.copies._PAUSE", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "put_file", refuse)
        said = train(MEMORY, "train.save_every=1")
    assert said.code == 5
    assert said.out.count("no copy could be made (the bucket\x1b is full)".replace("\x1b", " ")) == 1
    assert said.err.count("\n") == 1
    assert "the run is whole in runs/one, but its last state could not be copied" in said.err
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert train(MEMORY, "train.save_every=1").code == 0  # "the same command tries again"
    assert len(copies(bucket)) == 1
    assert train(MEMORY, "train.save_every=1").code == 0
    assert len(copies(bucket)) == 1, "nothing new to send"


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("the bucket\x1b is full")


def test_a_place_that_fails_for_a_while_gets_the_last_state(
    work: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.copies._PAUSE", 0.01)
    real, calls = type(bucket).put_file, []

    def shaky(self: Any, *words: Any, **more: Any) -> None:
        calls.append(words)
        if len(calls) % 30 == 1:
            raise ConnectionError("reset")
        real(self, *words, **more)

    monkeypatch.setattr(type(bucket), "put_file", shaky)
    said = train(MEMORY, "train.save_every=1")
    assert said.code == 0, said.err
    assert said.out.count("no copy could be made") == 1
    assert any(path.endswith("finished.json") for path in bucket.find("/bucket"))


def test_a_place_that_cannot_be_read_refuses_a_fresh_start(
    work: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bucket), "ls", refuse)
    said = train(MEMORY)
    assert said.code == 5
    assert "copies of this run cannot be looked for" in said.err
    assert not (OUTPUT / "identity.json").exists()


def test_another_run_of_the_same_name_is_refused(work: Path, bucket: Any) -> None:
    assert train(MEMORY, options=["--until", "2"]).code == 0
    shutil.rmtree("runs")
    said = train(MEMORY, "train.seed=4")
    assert said.code == 2
    assert "memory://bucket/runs/one holds a run of this name: " in said.err
    assert "train.seed: was 3, is 4 now" in said.err
    assert not (OUTPUT / "identity.json").exists()


@pytest.mark.parametrize(("url", "told"), [("nope://bucket/runs", "Protocol not known"), ("s3://bucket/runs", "s3fs")])
def test_what_a_place_needs_is_told_before_anything_loads(work: Path, url: str, told: str) -> None:
    if told == "s3fs" and _has("s3fs"):
        pytest.skip("s3fs is installed here")
    said = train(f"train.copy_to={url}")
    assert said.code == 5
    assert told in said.err
    assert said.err.count("\n") == 1
    assert not (OUTPUT / "identity.json").exists()


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
