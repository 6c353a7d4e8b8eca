"""A plain LoRA folder that PEFT and serving engines load: nothing in it needs a flag that a consumer may not know.

An engine that scales by alpha / r and does not read ``use_rslora`` serves another model without a word (78 % of the
adapter's effect was lost so); here the factor is folded into alpha.
"""

from __future__ import annotations

import re
from typing import Any

import torch

_PREFIX = "base_model.model."
TARGETS = ("peft", "vllm")
"""Whom the adapter is for."""


def plain(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The adapter's config with rsLoRA's factor in alpha: alpha' / r = alpha / sqrt(r), module by module where ranks
    differ (Kalajdzievski 2023, theorem 3.2). The weights stay as they are."""
    if not config.get("use_rslora"):
        return config
    alphas = {}
    for name, size in _ranks(weights).items():
        pattern = config.get("alpha_pattern") or {}
        alpha = next((a for word, a in pattern.items() if re.match(rf"(.*\.)?({word})$", name)), config["lora_alpha"])
        alphas[name] = alpha * size**0.5
    values = sorted(set(alphas.values()))
    usual = max(values, key=list(alphas.values()).count)
    odd = {re.escape(name): alpha for name, alpha in alphas.items() if alpha != usual}
    return config | {"use_rslora": False, "lora_alpha": usual, "alpha_pattern": odd}


def _ranks(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    return {
        key.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): value.shape[0]
        for key, value in weights.items()
        if key.endswith(".lora_A.weight")
    }


def refusals(config: dict[str, Any], weights: dict[str, torch.Tensor], target: str) -> list[str]:
    """What of the adapter that consumer cannot load. Empty: it can."""
    if target != "vllm":
        return []
    if config.get("peft_type", "LORA") != "LORA":
        return [f"{config['peft_type']} (finetune convert --to lora makes LoRA of it)"]
    found = []
    if config.get("use_dora"):
        found.append("DoRA")
    if config.get("modules_to_save"):
        found.append(f"modules_to_save ({', '.join(config['modules_to_save'])})")
    if config.get("trainable_token_indices"):
        found.append("trained rows of embedding and head")
    if config.get("bias", "none") != "none":
        found.append(f"bias: {config['bias']}")
    strange = [key for key in weights if not re.search(r"\.lora_[AB]\.weight$", key)]
    if not found and strange:
        found.append(strange[0])
    return found


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (its ``vllm/config/lora.py``; newer versions know 1 too)."""


def vllm_rank(weights: dict[str, torch.Tensor]) -> int:
    """The least value of --max-lora-rank that the adapter's modules fit under."""
    largest = max(_ranks(weights).values(), default=0)
    return next((size for size in _VLLM_RANKS if size >= largest), largest)


def advice(weights: dict[str, torch.Tensor], target: str) -> str:
    """What the consumer must be told beside the folder."""
    return f"start vLLM with --enable-lora --max-lora-rank {vllm_rank(weights)}" if target == "vllm" else ""
