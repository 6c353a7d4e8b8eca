"""The machine: what is asked of it, with stand-ins for the cards that are not here."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from finetune import hardware


def test_this_machine_is_described() -> None:
    found = hardware.detect()
    assert found.device in ("cpu", "cuda")
    assert 0 < found.free_memory <= found.memory
    assert found.threads == torch.get_num_threads()
    assert found.to_dict()["name"] == found.name
    assert found.instruction_set


@pytest.mark.parametrize(
    ("name", "capability", "bf16", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), True, 750),
        ("NVIDIA A100-SXM4-80GB", (8, 0), True, 250),
        ("NVIDIA GeForce RTX 4090", (8, 9), True, 140),
        ("NVIDIA L40S", (8, 9), True, 280),
        ("NVIDIA L4", (8, 9), True, 90),
        ("Tesla T4", (7, 5), False, 40),
        ("Tesla V100-SXM2-16GB", (7, 0), False, 95),
        ("NVIDIA Unheard-Of 9", (9, 9), True, None),
    ],
)
def test_cards(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], bf16: bool, tera: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20, 24))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = hardware.detect()
    assert (found.device, found.name, found.bf16, found.free_memory, found.memory) == ("cuda", name, bf16, 20, 24)
    assert found.flops == (tera * 1e12 if tera else None)


@pytest.mark.parametrize(
    ("flags", "bf16"), [("avx2 avx512f", False), ("avx2 avx512_bf16", True), ("amx_bf16", True), ("", False)]
)
def test_bf16_of_a_processor(monkeypatch: pytest.MonkeyPatch, flags: str, bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(hardware, "_probe_flops", lambda dtype, _: {"bfloat16": 2.0, "float32": 1.0}[dtype])
    found = hardware.detect()
    assert (found.device, found.bf16, found.flops) == ("cpu", bf16, 2.0 if bf16 else 1.0)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(3, 2, 1))
    assert hardware.free_disk(tmp_path / "a" / "b") == 1
    assert asked == [tmp_path]
    monkeypatch.chdir(tmp_path)
    assert hardware.free_disk(Path("runs/x")) == 1


def test_the_environment_names_what_bits_depend_on() -> None:
    found = hardware.environment(hardware.detect())
    assert {"device", "instruction_set", "threads", "torch", "transformers", "peft", "bitsandbytes"} <= set(found)
    assert found["torch"] == torch.__version__


def test_memory_in_use_is_of_this_process() -> None:
    if not torch.cuda.is_available():
        assert 10_000_000 < hardware.memory_in_use() < 1e12
