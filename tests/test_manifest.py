"""Manifests: any flipped bit, missing, additional or renamed file is found and named."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from finetune import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-1"
    folder.mkdir()
    for name, data in {"a.json": b"{}", "weights": bytes(range(256)) * 40, "empty": b""}.items():
        (folder / name).write_bytes(data)
    manifest.write(folder, manifest.digests(folder))
    return folder


def test_digest_is_sha256_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(5000)
    (tmp_path / "x").write_bytes(data)
    seen: list[int] = []
    monkeypatch.setattr(manifest, "_BLOCK", 1024)
    assert manifest.digest(tmp_path / "x", seen.append) == hashlib.sha256(data).hexdigest()
    assert seen == [1024, 1024, 1024, 1024, 904]
    assert manifest.digest_bytes(data) == hashlib.sha256(data).hexdigest()


def test_a_whole_folder_has_no_faults(folder: Path) -> None:
    assert manifest.faults(folder) == []


def test_every_flipped_bit_is_found(folder: Path) -> None:
    source = random.Random(1)
    for _ in range(200):
        path = folder / source.choice(["a.json", "weights"])
        before = path.read_bytes()
        data = bytearray(before)
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        path.write_bytes(data)
        assert manifest.faults(folder) == [f"step-1/{path.name} is damaged (its digest differs)"]
        path.write_bytes(before)


def test_missing_additional_and_renamed_files_are_found(folder: Path) -> None:
    (folder / "more").write_text("")
    assert manifest.faults(folder) == ["step-1/more is not in the manifest"]
    (folder / "more").unlink()
    (folder / "empty").rename(folder / "Empty")
    assert manifest.faults(folder) == ["step-1/Empty is not in the manifest", "step-1/empty is missing"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}'])
def test_a_damaged_manifest_is_a_fault(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_text(text)
    assert manifest.faults(folder) == ["step-1/manifest.json is missing or damaged"]


def test_an_absent_folder_is_a_fault(tmp_path: Path) -> None:
    assert manifest.faults(tmp_path / "nothing") == ["nothing/manifest.json is missing or damaged"]


def test_files_below_are_named_by_their_path_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "d").write_text("y")
    manifest.write(tmp_path, manifest.digests(tmp_path))
    assert manifest.faults(tmp_path) == []
    (tmp_path / "a" / "b" / "c").write_text("z")
    (tmp_path / "d").unlink()
    os.mkfifo(tmp_path / "d")  # reading it would wait for ever
    found = manifest.faults(tmp_path)
    assert [fault.partition("/")[2] for fault in found] == [
        "a/b/c is damaged (its digest differs)", "d is damaged (its digest differs)",
    ]  # fmt: skip
