"""A LoRA adapter's folder, read and judged: what each module's update is, whatever the file calls it."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune import pickles
from finetune.errors import ModelError
from finetune.runfolder import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_BOTH = ("wte", "embed_tokens", "lm_head")
FUSED = "attn.c_attn"


@dataclass
class Update:
    """One module's low-rank update: s · B A, with DoRA's lengths where it has them."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    lengths: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class Adapter:
    """An adapter by what it does: updates by module name, and tensors of modules that are trained in another way."""

    updates: dict[str, Update] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def read(source: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter in a folder, and PEFT's config of it.

    Raises:
        ModelError: no LoRA, a damaged file, or settings whose effect lies outside the pairs of matrices.
    """
    config = read_json(source / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError("this is no LoRA adapter", str(source / CONFIG), "only LoRA can change its layout")
    _refuse_config(config, source)
    return _parse(_read(source), config, source), config


def _read(source: Path) -> dict[str, torch.Tensor]:
    if (source / WEIGHTS).is_file():
        try:
            return load_file(source / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot be read: {error}", str(source / WEIGHTS), "fetch the adapter again") from None
    if not (source / "adapter_model.bin").is_file():
        raise ModelError(f"no {WEIGHTS} here", str(source), "fetch the adapter again")
    with tempfile.TemporaryDirectory(prefix="finetune-adapter-") as scratch:
        pickles.unpack_one(source / "adapter_model.bin", Path(scratch) / WEIGHTS)
        return {name: value.clone() for name, value in load_file(Path(scratch) / WEIGHTS).items()}


_UNSERVED = {
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
}
"""Settings whose effect lies outside the pair of matrices, with what each must be."""


def _refuse_config(config: dict[str, Any], source: Path) -> None:
    """Settings that cannot be carried over, and values that PEFT would not take."""
    where = str(source / CONFIG)
    for key, legal in _UNSERVED.items():
        if config.get(key, legal[0]) not in (*legal, None):
            raise ModelError(f"{key} is {config[key]!r}, which cannot change its layout", where, "merge it instead")
    if type(config.get("lora_alpha")) not in (int, float) or not config["lora_alpha"] > 0:
        raise ModelError(f"lora_alpha is {config.get('lora_alpha')!r}", where, "fetch the adapter again")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(type(value) in (int, float) for value in pattern.values()):
            raise ModelError(f"{key} is no mapping of names to numbers", where, "fetch the adapter again")
        for word in pattern:
            try:
                re.compile(word)
            except re.error:
                raise ModelError(f"{key} has {word!r}, which is no pattern", where, "mend it") from None
    named = config.get("trainable_token_indices")
    unknown = [name for name in named if name.rpartition(".")[2] not in _BOTH] if isinstance(named, dict) else []
    if unknown:
        raise ModelError(f"trainable_token_indices names {unknown[0]!r}", where, f"it may name {', '.join(_BOTH)}")


def _parse(weights: dict[str, torch.Tensor], config: dict[str, Any], source: Path) -> Adapter:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    found = Adapter()
    for key, value in weights.items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if module:
            parts.setdefault(module, {})[part.removesuffix(".weight")] = value
        else:
            found.others[key.removeprefix(PREFIX)] = value
    for module, pair in parts.items():
        if not {"A", "B"} <= set(pair) <= {"A", "B", "magnitude_vector"}:
            raise ModelError(f"{module} has {', '.join(sorted(pair))} instead of a LoRA pair", str(source))
        _refuse_pair(module, pair, source)
        scale = _scale(module, pair["A"].shape[0], config)
        found.updates[module] = Update(pair["A"], pair["B"], scale, pair.get("magnitude_vector"))
    return found


def _refuse_pair(module: str, pair: dict[str, torch.Tensor], source: Path) -> None:
    a, b = pair["A"], pair["B"]
    for value in pair.values():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ModelError(f"{module} holds numbers that are not finite or not fractions", str(source))
    fused = module.endswith(FUSED)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (fused and b.shape[0] % 3):
        what = f"{module} has A {list(a.shape)} and B {list(b.shape)}, which are no pair for it"
        raise ModelError(what, str(source), "fetch the adapter again")


def _scale(module: str, rank: int, config: dict[str, Any]) -> float:
    pattern = config.get("alpha_pattern") or {}
    alpha = next((a for word, a in pattern.items() if re.match(rf"(.*\.)?({word})$", module)), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
