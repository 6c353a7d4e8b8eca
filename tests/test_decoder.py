"""The arithmetic on a config: the very tensors of real checkpoints, and the sizes that their makers state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune import known_models
from finetune.decoder import LINEARS, DecoderShape

Build = Callable[..., Path]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": 32}),
        ("qwen2", {"num_key_value_heads": 4, "num_hidden_layers": 3}),
    ],
)
def test_tensors_are_those_of_the_checkpoint(
    family: str, more: dict[str, Any], tied: bool, build_tiny: Build, tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path / "base", family=family, tie_word_embeddings=tied, **more)
    stored = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    shape = DecoderShape.from_config(json.loads((folder / "config.json").read_text()))
    assert shape.tensors() == stored
    assert shape.tied == tied
    assert shape.parameters() == sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    linear = sum(a * b for name, (a, *rest) in stored.items() for b in rest if name.split(".")[-2] in LINEARS)
    assert shape.linear_parameters() == linear


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("Qwen/Qwen1.5-14B", 14_167_290_880),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    known = known_models.find(name)
    assert known is not None
    assert DecoderShape.from_known(known).parameters() == parameters


def test_every_known_model_has_a_shape() -> None:
    for known in known_models.MODELS:
        shape = DecoderShape.from_known(known)
        assert (shape.layers, shape.family) == (known.num_hidden_layers, known.family)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "64", None, True])
def test_a_number_that_cannot_be_is_named(key: str, value: Any) -> None:
    known = known_models.find("data/bases/tiny")
    assert known is not None
    config = {**known._asdict(), "model_type": known.family, key: value}
    with pytest.raises(TypeError, match=f"{key} is {value!r}"):
        DecoderShape.from_config(config)


def test_the_tiny_base_is_the_known_one(tiny_base: Path) -> None:
    known = known_models.find("data/bases/tiny")
    assert known is not None
    config = json.loads((tiny_base / "config.json").read_text())
    assert DecoderShape.from_config(config) == DecoderShape.from_known(known)
