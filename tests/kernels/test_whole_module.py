"""Modules trained whole: fp32 masters that the model around them does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils import ModulesToSaveWrapper

from tests import tiny

IDS = torch.tensor([[5, 250, 17, 80, 44]])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
def test_masters_are_fp32_and_the_model_is_the_base(tiny_base: Path, name: str, compute: str) -> None:
    bare = tiny.adapt(tiny.load(tiny_base, compute, compute), wake=False)
    with bare.evaluating():
        wanted = bare.model(IDS).logits
    policy = tiny.adapt(tiny.load(tiny_base, compute, compute), wake=False, modules_to_save=[name])
    wrappers = [module for module in policy.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrappers
    for wrapper in wrappers:
        assert {value.dtype for value in wrapper.modules_to_save.parameters()} == {torch.float32}
        assert {value.dtype for value in wrapper.original_module.parameters()} == {wanted.dtype}
    with policy.evaluating():
        found = policy.model(IDS).logits
    assert found.dtype == wanted.dtype
    assert tiny.distance(found, wanted) < {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-6}[compute]


def test_a_small_step_moves_every_entry(tiny_base: Path) -> None:
    """S16: at a rate of 1e-5 a bf16 master would round nearly every update away."""
    policy = tiny.adapt(tiny.load(tiny_base, "bf16", "bf16"), wake=False, modules_to_save=["lm_head"])
    before = tiny.weights(policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        for name, gradient in tiny.gradient_of(policy, tiny.samples([20, 20])).items():
            policy.trainable()[name].grad = gradient
        optimizer.step()
    (name,) = (name for name in before if "lm_head" in name)
    moved = (policy.trainable()[name] != before[name]).float().mean()
    assert float(moved) > 0.99
