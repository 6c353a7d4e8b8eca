"""Base models whose shape is known before a byte is fetched, so that a plan can be made without them.

Only numbers that a config file states. Not a list of what can be trained: any local folder of a supported family can.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple


class KnownModel(NamedTuple):
    """Config numbers of one base model; widths in elements, ``max_position_embeddings`` in tokens."""

    name: str
    aliases: tuple[str, ...]
    family: Literal["llama", "qwen2", "qwen3"]
    license: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    attention_bias: bool
    evidence: str
    seq_length: int | None = None  # of the original Qwen, which has choices beyond it


_QWEN15 = KnownModel(
    name="Qwen/Qwen1.5-14B",
    aliases=("Qwen1.5-14B",),
    family="qwen2",
    license="tongyi-qianwen",
    hidden_size=5120,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    head_dim=128,
    vocab_size=152064,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    attention_bias=True,
    evidence="published card of the model",
)

_QWEN1 = _QWEN15._replace(
    name="Qwen/Qwen-14B",
    aliases=("Qwen-14B",),
    max_position_embeddings=2048,
    evidence="published card of the model, and its README",
    seq_length=2048,
)

_QWEN25 = _QWEN15._replace(
    name="Qwen/Qwen2.5-14B",
    aliases=("Qwen2.5-14B",),
    license="apache-2.0",
    intermediate_size=13824,
    num_hidden_layers=48,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    evidence="published card of the model; key-value heads partly from memory",
)

_QWEN3 = _QWEN25._replace(
    name="Qwen/Qwen3-14B",
    aliases=("Qwen3-14B",),
    family="qwen3",
    intermediate_size=17408,
    num_hidden_layers=40,
    vocab_size=151936,
    max_position_embeddings=40960,
    attention_bias=False,
    evidence="heads and layers from the published card; MLP width and positions from memory",
)

_SMOLLM2 = KnownModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    aliases=("SmolLM2-135M-Instruct", "data/bases/smollm2-135m-instruct"),
    family="llama",
    license="apache-2.0",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    attention_bias=False,
    evidence="read from the weights themselves",
)

_TINY = KnownModel(
    name="data/bases/tiny",
    aliases=(),
    family="qwen2",
    license="apache-2.0",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
    tie_word_embeddings=False,
    max_position_embeddings=1024,
    attention_bias=True,
    evidence="random weights made by this project",
)

MODELS: tuple[KnownModel, ...] = (
    _QWEN1,
    _QWEN1._replace(name="Qwen/Qwen-14B-Chat", aliases=("Qwen-14B-Chat",)),
    _QWEN15,
    _QWEN15._replace(name="Qwen/Qwen1.5-14B-Chat", aliases=("Qwen1.5-14B-Chat",)),
    _QWEN25,
    _QWEN25._replace(
        name="Qwen/Qwen2.5-14B-Instruct", aliases=("Qwen2.5-14B-Instruct",), max_position_embeddings=32768
    ),
    _QWEN3,
    _QWEN3._replace(name="Qwen/Qwen3-14B-Base", aliases=("Qwen3-14B-Base",), max_position_embeddings=32768),
    _SMOLLM2,
    _TINY,
)


def find(name: str) -> KnownModel | None:
    """The known model of that name or alias; folder spellings such as ``./data/bases/tiny/`` are the same alias."""
    if not name:
        return None
    plain = os.path.normpath(name)
    for model in MODELS:
        if plain == model.name or plain in model.aliases:
            return model
    return None


def names() -> list[str]:
    """Every name and alias, for suggestions."""
    return [word for model in MODELS for word in (model.name, *model.aliases)]
