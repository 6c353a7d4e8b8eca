"""The original Qwen of 2023 (``model_type: qwen``), whose checkpoints are laid out otherwise than what trains them.

The layers are Qwen2's: with tensors renamed and the fused ``c_attn`` cut into q, k and v, ``Qwen2ForCausalLM`` computes
the same bits (measured against the model's own code in fp32: 0.0 in logits at every length up to 2048, loss and
gradients to 1e-8). So the checkpoint is read into native layers and its remote code is never run; under transformers 5
that code loads without an error and computes something else.

Beyond ``seq_length`` (2048) the original, in evaluation only, stretches the rotary base in steps with the length
(dynamic NTK) and scales late queries (logn); its training does neither. A recipe's ``rope:`` takes one choice for
training, evaluation and export.

Sources: the model's own modeling_qwen.py and configuration; the README of the Qwen repository; the Tongyi Qianwen
agreement.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from finetune.families import TONGYI

MODEL_TYPE = "qwen"
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOP_TOKENS = ("<|im_end|>",)
TEMPLATE = "ChatML with a system block always first; role, newline and content are tokenised one by one"
LICENSES = {name: TONGYI for size in ("7B", "14B", "72B") for name in (f"Qwen-{size}", f"Qwen-{size}-Chat")}

PUBLISHED_VOCABULARY = 151_643
"""Ranks of the published ``qwen.tiktoken``; every published model has more embedding rows than that."""
_LARGEST = 10_000_000
RECORD = "finetune_rope"
"""The key of a config that says with which choice the model was made."""
ROPES = tuple(f"{kind}{logn}" for kind in ("plain", "bucket-4096", "bucket-8192") for logn in ("", "+logn"))

_TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2",  # the branch under SiLU
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LEFTOVER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


class Piece(NamedTuple):
    """A native tensor's origin: the stored tensor's name, and its rows where it is a part of that one."""

    stored: str
    rows: tuple[int, int] | None = None


class Rope(NamedTuple):
    """A choice beyond ``seq_length``: rotary base, longest context, and where logn begins (0: nowhere)."""

    theta: float
    longest: int
    logn_from: int


def pieces(layers: int, hidden: int) -> dict[str, Piece]:
    """Native tensor name → where the original has it."""
    found = {name: Piece(stored) for name, stored in _TOP.items()}
    for layer in range(layers):
        old, new = f"transformer.h.{layer}", f"model.layers.{layer}"
        for native, stored in _LAYER.items():
            found[f"{new}.{native}.weight"] = Piece(f"{old}.{stored}.weight")
        for index, native in enumerate(_FUSED):
            rows = (index * hidden, (index + 1) * hidden)
            for part in ("weight", "bias"):
                found[f"{new}.{native}.{part}"] = Piece(f"{old}.attn.c_attn.{part}", rows)
    return found


def is_leftover(stored: str) -> bool:
    """Buffers that old checkpoints carry beside their weights."""
    return _LEFTOVER.search(stored) is not None


def refusals(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, fix) of everything in a config that the native layers cannot express."""
    found = [(what, "use the folder as published") for what in _odd_numbers(config)]
    if found:
        return found
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("no_bias") is not True:
        found.append(("no_bias is not true: every linear would have a bias", "only no_bias models can be read"))
    if config.get("rotary_pct", 1.0) != 1.0:
        found.append((f"rotary_pct is {config['rotary_pct']!r}: rotation of a part of each head", "it must be 1.0"))
    if type(heads) is int and config.get("kv_channels", 0) * heads != hidden:
        what = f"kv_channels {config.get('kv_channels')!r} × {heads} heads is not hidden_size {hidden!r}"
        found.append((what, "config.json belongs to another model"))
    if config.get("tie_word_embeddings", False):
        found.append(("tie_word_embeddings is true: no published model has that", "use the folder as published"))
    if config.get("scale_attn_weights", True) is not True:
        found.append(("scale_attn_weights is not true: attention would not be scaled", "no published model has that"))
    for part in ("visual", "audio"):
        if part in config:
            found.append((f"this is a {part} model (Qwen-VL or Qwen-Audio)", "only text models can be trained"))
    return found


def _odd_numbers(config: dict[str, Any]) -> list[str]:
    """Numbers that no model has: of another type, not finite, or not positive."""
    found = []
    for key in ("seq_length", "kv_channels", "max_position_embeddings"):
        value = config.get(key, 1)
        if type(value) is not int or not 0 < value < _LARGEST:
            found.append(f"{key} is {value!r}, which is a number that cannot be")
    for key in ("layer_norm_epsilon", "rotary_emb_base"):
        value = config.get(key, 1)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            found.append(f"{key} is {value!r}, which is a number that cannot be")
    if config.get(RECORD) not in (None, *ROPES):
        found.append(f"{RECORD} is {config[RECORD]!r}, which is no choice")
    return found


def native_config(config: dict[str, Any], rope: str | None, dtype: str) -> dict[str, Any]:
    """The ``Qwen2ForCausalLM`` config of an original one. Raises KeyError for a number that is missing."""
    choice = rope_choice(config, rope)
    native = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": config["hidden_size"],
        "intermediate_size": _half(config["intermediate_size"]),  # the original's is the sum of both branches
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_act": "silu",
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": choice.theta},
        "max_position_embeddings": choice.longest,
        "initializer_range": config.get("initializer_range", 0.02),
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": dtype,
    }
    chosen = {RECORD: rope} if rope else {}
    return native | chosen | ({"logn_from": choice.logn_from} if choice.logn_from else {})


def _half(both: Any) -> Any:
    return both // 2 if type(both) is int and both % 2 == 0 else None


def rope_choice(config: dict[str, Any], rope: str | None) -> Rope:
    """What a recipe's ``rope:`` means for this config; without one, the length at which the original is exact."""
    trained_at, base = int(config["seq_length"]), float(config["rotary_emb_base"])
    if rope is None:
        return Rope(base, trained_at, 0)
    if config.get(RECORD):  # its rotary base is the stretched one already
        base /= _stretch(config, str(config[RECORD]))
    kind, _, logn = rope.partition("+")
    logn_from = trained_at if logn else 0
    if kind == "plain":
        return Rope(base, max(trained_at, int(config.get("max_position_embeddings", trained_at))), logn_from)
    return Rope(base * _stretch(config, rope), max(int(kind.removeprefix("bucket-")), trained_at), logn_from)


def _stretch(config: dict[str, Any], rope: str) -> float:
    """What the choice multiplies the rotary base with."""
    kind, dim = rope.partition("+")[0], int(config["kv_channels"])
    if kind == "plain":
        return 1.0
    alpha = _alpha(int(kind.removeprefix("bucket-")), int(config["seq_length"]))
    return float(alpha ** (dim / (dim - 2)))


def _alpha(length: int, trained_at: int) -> float:
    """The original's NTK factor for a context of ``length`` (modeling_qwen.py, get_ntk_alpha): 1, 3, 7, 15 …"""
    return float(max(2 ** math.ceil(math.log2(length / trained_at) + 1) - 1, 1))


def original_config(config: dict[str, Any], rope: str | None) -> dict[str, Any]:
    """The original config that evaluates at any length as the choice says; without a choice it stays as it is."""
    if rope is None:
        return config
    choice = rope_choice(config, rope)
    return config | {
        "rotary_emb_base": choice.theta,
        "use_dynamic_ntk": False,
        "use_logn_attn": bool(choice.logn_from),
        RECORD: rope,
    }
