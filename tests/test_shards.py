"""Shards written tensor by tensor: safetensors reads them as its own, and memory holds one tensor at a time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import headers
from finetune.errors import EnvironmentFault
from finetune.headers import Tensor, header_of
from finetune.shards import ShardWriter

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [(3, 5), (7,), (), (2, 3, 4), (0, 4)]
    return {
        f"{dtype}.{len(size)}.{'é' if not size else 'x'}": (torch.randn(size, generator=generator) * 3).to(kind)
        for dtype, kind in DTYPES.items()
        for size in sizes
    }


def _layout(values: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    return {
        name: Tensor(shard="s", dtype=name.split(".")[0], shape=tuple(value.shape)) for name, value in values.items()
    }


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    values = _values()
    with ShardWriter(tmp_path / "a", header_of(_layout(values))) as shard:
        for name, value in values.items():
            shard.add(name, value)
    read = load_file(tmp_path / "a")
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name
    assert headers.read(tmp_path / "a") == {
        name: Tensor(shard="a", dtype=entry.dtype, shape=entry.shape) for name, entry in _layout(values).items()
    }


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"F32.a": whole.T, "F32.b": whole[:, 1], "F32.c": whole[1:, ::2]}
    with ShardWriter(tmp_path / "a", header_of(_layout(views))) as shard:
        for name, value in views.items():
            shard.add(name, value)
    assert all(torch.equal(value, views[name]) for name, value in load_file(tmp_path / "a").items())


def test_the_bytes_of_a_tensor_are_those_of_safetensors(tmp_path: Path) -> None:
    values = {"F32.a": torch.randn(4, 4), "F32.b": torch.randn(2)}
    with ShardWriter(tmp_path / "a", header_of(_layout(values))) as shard:
        for name, value in values.items():
            shard.add(name, value)
    save_file(values, tmp_path / "b", {"format": "pt"})
    bodies = [path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]
              for path in (tmp_path / "a", tmp_path / "b")]  # fmt: skip
    assert bodies[0] == bodies[1]


def test_order_and_completeness_are_kept(tmp_path: Path) -> None:
    values = {"F32.a": torch.zeros(2), "F32.b": torch.zeros(2)}
    with (
        pytest.raises(AssertionError, match=r"F32\.b is not the tensor due"),
        ShardWriter(tmp_path / "a", header_of(_layout(values))) as shard,
    ):
        shard.add("F32.b", values["F32.b"])
    with (
        pytest.raises(AssertionError, match=r"F32\.b.* were not written"),
        ShardWriter(tmp_path / "a", header_of(_layout(values))) as shard,
    ):
        shard.add("F32.a", values["F32.a"])


def test_each_tensor_goes_to_the_file_at_once(tmp_path: Path) -> None:
    """Nothing is gathered: after each tensor the file has grown by it."""
    values = {f"F32.{index}": torch.zeros(100_000) for index in range(4)}
    with ShardWriter(tmp_path / "a", header_of(_layout(values))) as shard:
        start = (tmp_path / "a").stat().st_size
        for index, (name, value) in enumerate(values.items(), 1):
            shard.add(name, value)
            shard._file.flush()
            assert (tmp_path / "a").stat().st_size >= start + index * 400_000
            assert not any(isinstance(held, torch.Tensor) for held in vars(shard).values())


class _Full:
    """A file on a full disk."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_a_full_disk_is_a_fault_of_the_environment(tmp_path: Path) -> None:
    values = {"F32.a": torch.zeros(2)}
    shard = ShardWriter(tmp_path / "a", header_of(_layout(values)))
    shard._file.close()
    shard._file = _Full(shard._file)
    with pytest.raises(EnvironmentFault, match="cannot write: No space left"):
        shard.add("F32.a", values["F32.a"])
