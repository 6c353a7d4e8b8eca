"""The run folder: files whole or not at all, one holder at a time, leftovers cleared, faults of the disk coded."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from finetune import runfolder
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder, atomic_folder, read_json, write_atomic, write_json


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert path.read_bytes() == '{\n  "é": [\n    1,\n    2.5,\n    null\n  ]\n}\n'.encode()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_absent_and_damaged_json_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_text('{"a": ')
    assert read_json(tmp_path / "a.json") is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentFault, match="cannot write") as caught:
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert ("free some space" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))


def test_a_folder_appears_in_one_rename(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x" / "out") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "x" / "out").exists()
    with atomic_folder(tmp_path / "x" / "out") as temporary:
        (temporary / "b").write_text("2")
        assert (tmp_path / "x" / "out" / "a").exists()
    assert [path.name for path in (tmp_path / "x").rglob("*")] == ["out", "b"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    expected = EnvironmentFault if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_folder(tmp_path / "out") as temporary:  # noqa: PT012 - the block is the subject
        (temporary / "new").write_text("2")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        with pytest.raises(EnvironmentFault, match="another finetune process"), RunFolder(tmp_path / "run").lock():
            pass
        # Another folder is another lock.
        with RunFolder(tmp_path / "other").lock():
            pass
    with folder.lock():
        pass


def test_a_lock_file_without_a_holder_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("4711")
    with RunFolder(tmp_path).lock():
        pass


def test_leftovers_go_and_the_rest_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for name in ("scores.json.tmp-7", "checkpoints/step-00000002.tmp-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    (tmp_path / "finished.json.tmp-99").write_text("")
    (folder.checkpoints / "step-00000001").mkdir()
    folder.metrics.write_text("")
    folder.clear_leftovers()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "checkpoints", "checkpoints/step-00000001", "metrics.jsonl",
    }  # fmt: skip


def test_a_folder_that_cannot_be_made_is_coded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write: Not a directory"):
        runfolder.make_folder(tmp_path / "file" / "run")


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    runfolder.remove(tmp_path / "nothing")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    runfolder.remove(tmp_path / "link")
    assert (tmp_path / "target" / "kept").exists()
