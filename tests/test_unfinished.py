"""A folder that takes long to make: what counts as finished is found again, by the same command alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import unfinished
from finetune.errors import EnvironmentFault, ModelError

KEEP = ("*.safetensors", ".measured.json")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make(out: Path, made_of: object, error: BaseException | None = None) -> set[str]:
    """Fill the folder, with the error at its end; what was there at its beginning."""
    with unfinished.folder(out, made_of, KEEP) as folder:
        found = names(folder)
        for name in ("model-1.safetensors", "model-2.safetensors.part", "config.json", ".measured.json"):
            (folder / name).write_text(name)
        (folder / "original").mkdir()
        if error is not None:
            raise error
    return found


@pytest.mark.parametrize("error", [EnvironmentFault("the disk is full", "x"), KeyboardInterrupt(), OSError(28, "full")])
def test_the_same_command_finds_what_was_finished(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    with pytest.raises((EnvironmentFault, KeyboardInterrupt)):
        make(out, {"a": 1}, error)
    assert not out.exists()
    assert make(out, {"a": 1}) == {"model-1.safetensors", ".measured.json"}
    assert names(tmp_path) == {"out"}


def test_another_command_finds_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", {"a": 1}, KeyboardInterrupt())
    assert make(tmp_path / "out", {"a": 2}) == set()
    assert names(tmp_path) == {"out"}


def test_what_cannot_succeed_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        make(tmp_path / "out", {"a": 1}, ModelError("no", "x"))
    assert names(tmp_path) == set()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with unfinished.folder(tmp_path / "out", {"a": 1}, KEEP) as folder:
        (folder / "model-1.safetensors").write_text("x")
        with pytest.raises(EnvironmentFault, match="another finetune process is writing this folder"):
            make(tmp_path / "out", {"a": 1})
    assert names(tmp_path / "out") == {"model-1.safetensors"}
