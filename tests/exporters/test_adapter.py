"""S18: an adapter that a consumer scales by alpha / r is the adapter that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import model
from finetune.exporters import adapter
from tests import tiny


def effect(policy: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW by the consumer's formula: (alpha / r) · B A, whatever else the config says."""
    import re

    found = {}
    for key, a in weights.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pattern = config.get("alpha_pattern") or {}
            alpha = next((v for w, v in pattern.items() if re.match(rf"(.*\.)?({w})$", name)), config["lora_alpha"])
            found[name] = alpha / a.shape[0] * weights[key.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 3}}],
    ids=["plain", "rslora", "rslora with patterns"],
)
def test_the_consumers_formula_gives_what_was_trained(tiny_base: Path, fields: dict[str, Any]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), **fields)
    weights, config = model.adapter_weights(policy.model), model.adapter_config(policy.model, "base")
    exported = adapter.plain(config, weights)
    assert not exported["use_rslora"]
    served = effect(policy, exported, weights)
    for name, module in policy.causal_lm.named_modules():
        if name in served:
            trained = module.get_delta_weight("default")
            assert tiny.distance(served[name], trained) < 1e-6
    assert len(served) == 14
    if fields:  # the trap is there: with the flag merely dropped it is another model
        dropped = effect(policy, config | {"use_rslora": False}, weights)
        assert max(tiny.distance(dropped[name], served[name]) for name in served) > 0.1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trained rows"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_what_vllm_cannot_load_is_named(change: dict[str, Any], what: str) -> None:
    weights = {"base_model.model.x.lora_A.weight": torch.zeros(8, 2)}
    assert adapter.refusals({"bias": "none"}, weights, "vllm") == []
    (found,) = adapter.refusals({"bias": "none"} | change, weights, "vllm")
    assert found.startswith(what)
    assert adapter.refusals(change, weights, "peft") == []
    assert "--max-lora-rank 8" in adapter.advice(weights, "vllm")
