"""Bases in the original Qwen layout for tests: the committed vectors, and tiny ones with a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import load_script

VECTORS = Path(__file__).parent / "vectors" / "qwen1"
SAFE, PICKLED = VECTORS / "tiny-safetensors", VECTORS / "tiny-bin-bf16"


def copy(source: Path, target: Path) -> Path:
    """A vector's checkpoint without its reference, to damage."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("reference.safetensors")))


def reference(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "reference.safetensors")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's shards by its stored name."""
    return {
        name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in load_file(path).items()
    }


def build(folder: Path, build_tiny: Callable[..., Path], **overrides: Any) -> Path:
    """A tiny base with a tokenizer in the original layout, in several shards."""
    scratch = folder.with_name(f"{folder.name}-native")
    wide = {"num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048}
    build_tiny(scratch, **(wide | overrides))
    load_script("data/make_qwen1_base.py").build(scratch, folder, shard_bytes=100_000)
    shutil.rmtree(scratch)
    return folder


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Edit one stored tensor; the shard that it lies in."""
    places = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    shard = folder / places[name]
    found = load_file(shard)
    found[name] = edit(found[name].clone()).contiguous()
    save_file(found, shard, {"format": "pt"})
    return shard


def config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
