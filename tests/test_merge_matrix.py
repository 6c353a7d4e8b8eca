"""What a merge does to every weight, held against PEFT's own arithmetic in float64: tied and untied, LoRA, rsLoRA and
DoRA, full precision, bf16, NF4 and FP4 (S8, S10, S12, S17 of the catalogue of silent errors)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import base as bases
from finetune import merge, model, shards
from finetune.fold import Fold
from finetune.kernels import frozen_linear
from finetune.loading import BaseForm

METHODS: dict[str, dict[str, Any]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
FORMS = {
    "fp32": BaseForm(weights="fp32", double=False, compute="fp32", device="cpu"),
    "bf16": BaseForm(weights="bf16", double=False, compute="bf16", device="cpu"),
    "nf4": BaseForm(weights="nf4", double=True, compute="fp32", device="cpu"),
    "fp4": BaseForm(weights="fp4", double=False, compute="fp32", device="cpu"),
}
FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def trained(folder: Path, form: BaseForm, fields: dict[str, Any]) -> Any:
    """A live model whose adapter does something."""
    policy = model.attach(model.load_base(bases.inspect(folder), form), {**FIELDS, **fields}, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in policy.model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
            if "magnitude" in name:
                value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
    return policy


@torch.no_grad()
def wanted(policy: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module → the weight that was trained against, and what the adapter makes of it; by PEFT's fields, in float64."""
    found = {}
    for name, layer in policy.causal_lm.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = (getattr(layer, part)["default"].weight.double() for part in ("lora_A", "lora_B"))
        dense = frozen_linear.dense_weight(layer.base_layer, torch.float32).double()
        made = dense + layer.scaling["default"] * (b @ a)
        if layer.use_dora["default"]:
            length = layer.lora_magnitude_vector["default"].weight.double()
            made = made * (length / made.norm(dim=1))[:, None]
        found[name] = (dense, made)
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_update_is_the_trained_one(
    tied: bool, method: str, form: BaseForm, tmp_path: Path, build_tiny: Callable[..., Path]
) -> None:
    stored = "bfloat16" if form.weights == "bf16" else "float32"
    folder = build_tiny(tmp_path / "base", dtype=stored, tie_word_embeddings=tied)
    base = bases.inspect(folder)
    policy = trained(folder, form, METHODS[method])
    weights = model.adapter_weights(policy.model)
    config = model.adapter_config(policy.model, "base")
    plan = merge.make_plan(base, form, weights, config, replayed=True)
    out = tmp_path / "out"
    out.mkdir()
    merge.apply(plan, base, weights, out, "native", lambda done, of: None)
    shutil.copyfile(folder / "config.json", out / "config.json")
    merged = {name: value for shard in base.shards for name, value in load_file(out / shard).items()}
    expected = wanted(policy)
    assert len(expected) == 6
    for name, (dense, made) in expected.items():
        update, found = made - dense, merged[f"{name}.weight"].double() - dense
        if stored == "float32":
            assert float((found - update).norm() / update.norm()) <= 1e-6, name
        else:  # each value is rounded up or down, and along the update that evens out
            assert abs(float((found * update).sum() / update.square().sum()) - 1) <= 1e-2, name
            step = made.abs().log2().floor().exp2() * 2**-7
            assert bool(((found - update).abs() <= step).all()), name
    if stored == "float32":  # everything else as it was, the tied matrix once
        with shards.Reader(base) as reader:
            for name, value in merged.items():
                if name.removesuffix(".weight") not in expected and not plan.folds.get(name, Fold()).replay:
                    assert torch.equal(value, reader.tensor(name)), name
    assert ("lm_head.weight" in merged) is not tied
