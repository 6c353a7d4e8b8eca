"""Trained rows: PEFT's own arithmetic, values and gradients, without its copy of the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.kernels import trained_rows
from tests import tiny

IDS = torch.tensor([[5, 250, 7, 80, 7, 3, 9, 9, 201, 66, 12, 7]])
ROWS = {"embed_tokens": [7, 9, 250], "lm_head": [7, 9, 250]}


def adapted(folder: Path, weights: str) -> torch.nn.Module:
    model = tiny.load(folder, weights).model
    fields = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS)
    found = get_peft_model(model, fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if "trainable_tokens" in name:
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_values_and_gradients_are_pefts(tiny_base: Path, weights: str) -> None:
    found = []
    for settled in (False, True):
        model = adapted(tiny_base, weights)
        if settled:
            trained_rows.settle(model)
        logits = model(IDS).logits
        logits.float().square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if "trainable_tokens" in n}
        found.append((logits.detach(), gradients))
    (plain, wanted), (ours, given) = found
    assert float((plain - ours).abs().max()) <= 1e-5
    assert len(wanted) == 2
    for name, value in wanted.items():
        assert bool(value.abs().sum(dim=1).gt(0).all())
        assert tiny.distance(given[name], value) <= 1e-5


def test_rows_are_wide_masters_and_can_be_switched_off(tiny_base: Path) -> None:
    model = adapted(tiny_base, "bf16")
    trained_rows.settle(model)
    with torch.no_grad():
        on = model(IDS).logits
        with model.disable_adapter():
            off = model(IDS).logits
        assert torch.equal(off, tiny.load(tiny_base, "bf16").model(IDS).logits)
    assert not torch.equal(on, off)
    masters = [value for name, value in model.named_parameters() if "trainable_tokens" in name]
    assert {value.dtype for value in masters} == {torch.float32}


def test_reference_is_the_matrix_with_its_rows_exchanged() -> None:
    weight, rows = torch.zeros(5, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = trained_rows.reference(weight, rows, torch.tensor([3, 1]))
    assert found.tolist() == [[0, 0], [3, 4], [0, 0], [1, 2], [0, 0]]
